"""Reads a node of a captured graph as a function of symbolic indices: what is element (b, h, q, k) of this mask?

The reader starts at the mask with its own indices and walks to the inputs, as Inductor's loaders do: a view changes the
indices, a pointwise operation combines elements, ``torch.arange`` is its index. Each (node, indices) pair is read once.
An operation that it does not know, or cannot express exactly, becomes an `Opaque` leaf that reads the existing node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from sparsepass.graph.canonical import called, called_name
from sparsepass.masks.ir import Bool, Choice, Int, Logic, Pred, Prover, Unknown, Value, expr_of
from sparsepass.masks.values import COMPARISONS, NotExact, arithmetic, cast, compare, select, truth

Index = tuple[sympy.Expr, ...]
Handler = Callable[["MaskReader", fx.Node, Index], Value]
HANDLERS: dict[object, Handler] = {}
ZERO = sympy.Integer(0)
ONE = sympy.Integer(1)
READS_PER_NODE = 32
"""Different indices at which one node is followed: keeps the walk linear whatever the graph is."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for every function and method of these names in torch and ``operator``."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler  # a method call
            places = (torch.Tensor,) if name.startswith("__") else (operator, torch, torch.Tensor, torch.nn.functional)
            for module in places:
                if (function := getattr(module, name, None)) is not None:
                    HANDLERS[function] = handler
        return handler

    return register


def tensor_of(node: object) -> torch.Tensor | None:
    """The fake tensor that Dynamo recorded for ``node``; ``None`` where it is not a tensor."""
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def sizes_of(tensor: torch.Tensor) -> Index:
    return tuple(expr_of(size) for size in tensor.shape)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of the call by position, or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def scalar(argument: object) -> sympy.Expr | None:
    """A literal integer or a dynamic one as an expression; ``None`` for anything else."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("example_value", argument.meta.get("val"))
    if isinstance(argument, bool) or not isinstance(argument, (int, torch.SymInt)):
        return None
    return expr_of(argument)


def title(node: fx.Node) -> str:
    """How a message names the operation of ``node``."""
    if node.op == "placeholder":
        return f"the graph input '{node.name}'"
    return f"'{called_name(node)}' (node '{node.name}')"


@dataclass(frozen=True)
class Carrier:
    """An existing boolean node whose rows hold a predicate for every (batch, key), maybe with more keys at the end."""

    node: fx.Node
    detour: tuple[bool, int]
    """What is unhandy about it: having more keys, and a rank other than 2. The least is taken."""


class MaskReader:
    """Reads nodes of one graph. ``domain`` gives the size that each index variable stays below.

    ``carriers`` collects the nodes that hold a predicate for every pair of the variables ``batch`` and ``key``.
    """

    def __init__(
        self,
        logic: Logic,
        prover: Prover,
        domain: dict[sympy.Symbol, sympy.Expr],
        *,
        batch: sympy.Symbol,
        key: sympy.Symbol,
    ) -> None:
        self.logic = logic
        self.prover = prover
        self.domain = domain
        self.batch = batch
        self.key = key
        self.carriers: dict[Pred, Carrier] = {}
        self._memo: dict[tuple[fx.Node, Index], Value] = {}
        self._reads: dict[fx.Node, int] = {}
        self._variables: dict[fx.Node, sympy.Symbol] = {}

    def read(self, node: fx.Node, index: Index) -> Value:
        """Element ``index`` of ``node``."""
        memo = (node, index)
        if memo not in self._memo:
            self._reads[node] = self._reads.get(node, 0) + 1
            value = self._read(node, index)
            self._memo[memo] = value
            if isinstance(value, Bool):
                self._carry(value.pred, node, index)
        return self._memo[memo]

    def _read(self, node: fx.Node, index: Index) -> Value:
        if self._reads[node] > READS_PER_NODE:
            return self.leaf(node, index, f"{title(node)} is read at too many different positions")
        handler = HANDLERS.get(called(node)) if node.op in ("call_function", "call_method") else None
        if handler is None:
            why = "is computed outside of this graph" if node.op == "placeholder" else "is not understood"
            return self.leaf(node, index, f"{title(node)} {why}")
        try:
            return handler(self, node, index)
        except NotExact as reason:
            return self.leaf(node, index, f"{title(node)} {reason}")

    def leaf(self, node: fx.Node, index: Index, why: str) -> Value:
        """Element ``index`` of ``node`` as a symbol."""
        tensor = tensor_of(node)
        opaque = self.logic.opaque(node, index, why)
        if tensor is None or tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return Unknown(opaque)
        return Bool(self.logic.read(opaque)) if tensor.dtype is torch.bool else Int(opaque.symbol)

    def _carry(self, pred: Pred, node: fx.Node, index: Index) -> None:
        """Remember ``node`` for ``pred`` if its elements in order are [batch or 1, key], of these keys at least."""
        if not index or index[-1] != self.key:
            return
        sizes = sizes_of(self.tensor(node))
        longer = not self.prover.equal(sizes[-1], self.domain[self.key])
        if longer and not self.prover.nonpositive(self.domain[self.key] - sizes[-1]):
            return
        seen_batch = False
        for size, at in zip(sizes[:-1], index[:-1], strict=True):
            if at == self.batch and not seen_batch and self.prover.equal(size, self.domain[at]):
                seen_batch = True
            elif size != 1:
                return
        known, detour = self.carriers.get(pred), (longer, abs(len(index) - 2))
        if known is None or detour < known.detour:
            self.carriers[pred] = Carrier(node, detour)

    @property
    def visited(self) -> set[fx.Node]:
        """The nodes that were read."""
        return set(self._reads)

    # Helpers of the handlers

    def tensor(self, node: object) -> torch.Tensor:
        tensor = tensor_of(node)
        if tensor is None:
            raise NotExact("takes something that is not a tensor of this graph")
        return tensor

    def sizes(self, node: object) -> Index:
        return sizes_of(self.tensor(node))

    def dimension(self, dim: object, rank: int) -> int:
        if isinstance(dim, bool) or not isinstance(dim, int) or not -rank <= dim < rank:
            raise NotExact("has a dimension argument that is not a literal")
        return dim % rank

    def broadcast(self, node: fx.Node, index: Index, sizes: Index) -> Value:
        """Element of ``node`` that stands at ``index`` once it is broadcast to ``sizes``."""
        own = self.sizes(node)
        if len(own) > len(sizes):
            raise NotExact("shrinks its operand")
        skipped = len(sizes) - len(own)
        at = []
        for size, wide, position in zip(own, sizes[skipped:], index[skipped:], strict=True):
            if size == 1:
                at.append(ZERO)
            elif self.prover.equal(size, wide):
                at.append(position)
            else:
                raise NotExact(f"broadcasts a dimension of {size} to {wide}, which are not known to be equal")
        return self.read(node, tuple(at))

    def operand(self, operand: object, index: Index, sizes: Index) -> Value:
        """An operand of a pointwise operation with this result index and these result sizes."""
        if tensor_of(operand) is not None and isinstance(operand, fx.Node):
            return self.broadcast(operand, index, sizes)
        if isinstance(operand, bool):
            return Bool(self.logic.true if operand else self.logic.false)
        if (number := scalar(operand)) is not None:
            return Int(number)
        if isinstance(operand, float):
            return Choice(self.logic.true, operand, operand)
        raise NotExact("has an operand whose value is not known")

    def variable(self, node: fx.Node, size: sympy.Expr) -> sympy.Symbol:
        """The index variable, below ``size``, with which ``node`` looks along its operand."""
        if node not in self._variables:
            self._variables[node] = self.logic.variable("i")
            self.domain[self._variables[node]] = size
        return self._variables[node]

    def extreme(self, expr: sympy.Expr, largest: bool) -> sympy.Expr | None:
        """The largest (or smallest) value of ``expr`` over all indices, in sizes; ``None`` where that is not known."""
        expr = sympy.expand(expr)
        if self.logic.opaques_in(expr):
            return None
        for symbol in sorted(self.logic.depends(expr), key=str):
            slope = expr.coeff(symbol, 1)
            rest = sympy.expand(expr - slope * symbol)
            if not slope.is_number or rest.has(symbol):
                return None
            expr = sympy.expand(rest + slope * (self.domain[symbol] - 1) if (slope > 0) == largest else rest)
        return expr

    def never_positive(self, expr: sympy.Expr) -> bool:
        """Whether ``expr <= 0`` at every index, for every size that the graph accepts."""
        top = self.extreme(expr, largest=True)
        return top is not None and self.prover.nonpositive(top)


# Pointwise


def _binary(node: fx.Node) -> tuple[Any, Any]:
    unknown = set(node.kwargs) - {"input", "other"}
    if unknown or len(node.args) > 2:
        raise NotExact(f"has the argument {', '.join(sorted(unknown)) or 'alpha'}")
    return argument(node, 0, "input"), argument(node, 1, "other")


def _comparison(name: str) -> Handler:
    def handler(reader: MaskReader, node: fx.Node, index: Index) -> Value:
        left, right = _binary(node)
        for tensor, number in ((tensor_of(left), scalar(right)), (tensor_of(right), scalar(left))):
            if tensor is None or number is None or tensor.dtype in (torch.int64, torch.int32, torch.bool):
                continue
            if not tensor.dtype.is_floating_point and not (number.is_Integer and 0 <= number <= 127):
                raise NotExact(f"compares {tensor.dtype} with {number}, which wraps around")
        sizes = reader.sizes(node)
        a, b = reader.operand(left, index, sizes), reader.operand(right, index, sizes)
        return Bool(compare(name, a, b, reader.logic))

    return handler


def _arithmetic(name: str, swapped: bool = False) -> Handler:
    def handler(reader: MaskReader, node: fx.Node, index: Index) -> Value:
        left, right = _binary(node)
        if swapped:
            left, right = right, left
        sizes, dtype = reader.sizes(node), reader.tensor(node).dtype
        a, b = reader.operand(left, index, sizes), reader.operand(right, index, sizes)
        return arithmetic(name, a, b, dtype, reader.logic)

    return handler


for _name in COMPARISONS:
    handles(_name, f"__{_name}__")(_comparison(_name))
handles("greater_equal")(_comparison("ge"))
handles("greater")(_comparison("gt"))
handles("less_equal")(_comparison("le"))
handles("less")(_comparison("lt"))
handles("not_equal")(_comparison("ne"))
handles("add", "__add__", "__radd__")(_arithmetic("add"))
handles("sub", "subtract", "__sub__")(_arithmetic("sub"))
handles("rsub", "__rsub__")(_arithmetic("sub", swapped=True))
handles("mul", "multiply", "__mul__", "__rmul__")(_arithmetic("mul"))


def _connective(name: str, logical: bool) -> Handler:
    def handler(reader: MaskReader, node: fx.Node, index: Index) -> Value:
        if not logical and reader.tensor(node).dtype is not torch.bool:
            raise NotExact("combines the bits of integers")
        left, right = _binary(node)
        sizes = reader.sizes(node)
        a = truth(reader.operand(left, index, sizes), reader.logic)
        b = truth(reader.operand(right, index, sizes), reader.logic)
        return Bool(reader.logic.all_of(a, b) if name == "and" else reader.logic.any_of(a, b))

    return handler


handles("and_", "__and__", "__rand__", "bitwise_and")(_connective("and", logical=False))
handles("or_", "__or__", "__ror__", "bitwise_or")(_connective("or", logical=False))
handles("logical_and")(_connective("and", logical=True))
handles("logical_or")(_connective("or", logical=True))


@handles("invert", "inv", "__invert__", "bitwise_not", "logical_not")
def _negation(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    source = argument(node, 0, "input")
    logical = called_name(node) == "logical_not"
    if not logical and reader.tensor(source).dtype is not torch.bool:
        raise NotExact("combines the bits of integers")
    return Bool(reader.logic.negate(truth(reader.read(source, index), reader.logic)))


@handles("neg", "negative", "__neg__")
def _minus(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    value = reader.read(argument(node, 0, "input"), index)
    return arithmetic("sub", Int(ZERO), value, reader.tensor(node).dtype, reader.logic)


@handles("abs", "absolute", "__abs__")
def _absolute(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    value = reader.read(argument(node, 0, "input"), index)
    match value:
        case Int(expr) if reader.tensor(node).dtype is torch.int64:
            if expr.is_Integer:
                return Int(abs(expr))
            why = f"{title(node)} is a distance used as more than an upper bound"
            return Int(reader.logic.opaque(node, (sympy.expand(expr),), why, "abs").symbol)
        case Choice(pred, yes, no):
            return Choice(pred, abs(yes), abs(no))
    raise NotExact("takes the absolute value of data")


HANDLERS[abs] = _absolute  # Dynamo may record either spelling of the builtin


@handles("floordiv", "__floordiv__", "floor_divide")
def _floor_division(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    left, right = _binary(node)
    sizes = reader.sizes(node)
    a, b = reader.operand(left, index, sizes), reader.operand(right, index, sizes)
    if not isinstance(a, Int) or not isinstance(b, Int) or reader.tensor(node).dtype is not torch.int64:
        raise NotExact("divides what is not a 64-bit integer")
    if a.expr.is_Integer and b.expr.is_Integer and b.expr != 0:
        return Int(sympy.Integer(int(a.expr) // int(b.expr)))
    if b.expr == 1:
        return a
    why = f"{title(node)} groups positions into chunks of {b.expr} (chunked attention)"
    return Int(reader.logic.opaque(node, (a.expr, b.expr), why, "floordiv").symbol)


@handles("where")
def _where(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    if node.op == "call_method":
        raise NotExact("is the method form of where")
    yes, no = argument(node, 1, "input"), argument(node, 2, "other")
    if yes is None or no is None:
        raise NotExact("finds positions, which is data")
    return _choose(reader, node, index, argument(node, 0, "condition"), yes, no)


@handles("masked_fill", "masked_fill_")
def _masked_fill(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    return _choose(
        reader, node, index, argument(node, 1, "mask"), argument(node, 2, "value"), argument(node, 0, "input")
    )


def _choose(reader: MaskReader, node: fx.Node, index: Index, condition: object, yes: object, no: object) -> Value:
    sizes, dtype, logic = reader.sizes(node), reader.tensor(node).dtype, reader.logic
    test = truth(reader.operand(condition, index, sizes), logic)
    return select(test, _as(reader, yes, index, sizes, dtype), _as(reader, no, index, sizes, dtype), dtype, logic)


def _as(reader: MaskReader, operand: object, index: Index, sizes: Index, dtype: torch.dtype) -> Value:
    """``operand`` converted to the result's dtype, as torch promotes it."""
    value = reader.operand(operand, index, sizes)
    tensor = tensor_of(operand)
    if tensor is not None:
        return cast(value, tensor.dtype, dtype, reader.logic)
    source = torch.bool if isinstance(value, Bool) else torch.int64 if isinstance(value, Int) else torch.float64
    return cast(value, source, dtype, reader.logic)


_CASTS = (
    "to",
    "_to_copy",
    "type",
    "type_as",
    "bool",
    "float",
    "double",
    "half",
    "bfloat16",
    "int",
    "long",
    "cuda",
    "cpu",
)
_SAME = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy")


@handles(*_CASTS, *_SAME)
def _cast(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    source = argument(node, 0, "input", argument(node, 0, "self"))
    value = reader.read(source, index)
    return cast(value, reader.tensor(source).dtype, reader.tensor(node).dtype, reader.logic)
