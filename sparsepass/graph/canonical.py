"""Canonical form of a captured graph: one name per operation, whatever its spelling, as a networkx view.

Dynamo records the same operation as a function (``torch.matmul``), a method (``"matmul"``) or an operator (``@``), and
threads casts, ``contiguous`` and dropout at p = 0 between the operations that matter. ``CanonicalGraph`` names each
operation once and looks through the nodes that change no value, so that a pattern is written in one spelling only.
Nothing is mutated: the view refers to the nodes of the original graph.
"""

from __future__ import annotations

import bisect
import functools
import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import fx

Operand = Any
"""A ``fx.Node``, a ``Made`` or a constant."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation in canonical form: its name, its operands in order, and what else fixes its meaning."""

    name: str
    operands: tuple[Operand, ...]
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def commutative(self) -> bool:
        return self.name in ("add", "mul")

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={value}" for key, value in self.params)
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True, eq=False)
class Made:
    """A value that no node holds yet: the call ``target(*args, **kwargs)`` that the rewrite will add.

    Patterns must not touch the graph. Where one needs ``bmm``'s [B * H, S, D] as [B, H, S, D], it hands on this.
    ``target`` is a function, or the name of a method of the first argument.
    """

    target: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    """``example_value``: the fake tensor, as on a node."""

    @property
    def name(self) -> str:
        """For messages: the first node that it is made of."""
        return next((node.name for node in nodes_of(self)), str(self.target))


def nodes_of(source: Any) -> Iterator[fx.Node]:
    """The graph nodes that an operand, or a list of them, is made of."""
    if isinstance(source, fx.Node):
        yield source
    elif isinstance(source, Made):
        for given in (source.args, tuple(source.kwargs.values())):
            yield from nodes_of(given)
    elif isinstance(source, tuple | list):
        for part in source:
            yield from nodes_of(part)


IDENTITY = "identity"

_MATMUL = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")
_ADD = (torch.add, operator.add, "add", "__add__", "__radd__", operator.iadd, "add_", "__iadd__")
_SUB = (torch.sub, torch.subtract, operator.sub, "sub", "subtract", "__sub__", operator.isub, "sub_", "__isub__")
_MUL = (torch.mul, torch.multiply, operator.mul, operator.imul)
_MUL_NAMES = ("mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__")
_DIV = (torch.div, torch.divide, torch.true_divide, operator.truediv, operator.itruediv)
_DIV_NAMES = ("div", "divide", "true_divide", "__truediv__", "div_", "__itruediv__")
_MASKED_FILL = (torch.masked_fill, "masked_fill", "masked_fill_")
_WHERE = (torch.where, "where")
_SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, "softmax", "_softmax", "_safe_softmax")
_TRANSPOSE = (torch.transpose, torch.swapaxes, "transpose", "swapaxes", "swapdims")
_PERMUTE = (torch.permute, "permute")
_UNSQUEEZE = (torch.unsqueeze, "unsqueeze")
_GETITEM = (operator.getitem, "__getitem__")
_EXPAND = ("expand", "broadcast_to", torch.broadcast_to)
_RESHAPE = (torch.reshape, torch.flatten, torch.unflatten)
_RESHAPE_NAMES = ("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view", "view_copy")
_DROPOUT = (F.dropout, torch.dropout, "dropout")
_CAST = ("to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy")
_SAME = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy", torch.clone, torch.detach)
_SWAPS = ("mT", "mH", "adjoint", torch.adjoint)
_ALL_SWAPS = ("T", "H", "numpy_T", "matrix_H", "t", torch.t)
"""Of tensors of two dimensions. Of others ``T`` turns all of them around."""


def is_own(target: Any) -> bool:
    """False for a function that someone put in the place of torch's own."""
    if isinstance(target, types.FunctionType):
        return str(target.__globals__["__name__"]).partition(".")[0] == "torch"
    return not isinstance(target, types.MethodType | functools.partial)


SDPA = torch._C._nn.scaled_dot_product_attention
LINEAR = torch._C._nn.linear
"""Torch's own functions. They are never looked up in ``torch.nn.functional``, where users put theirs."""

_FLASH = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
)
"""SDPA's kernels, called by name: tuples whose first part is the output."""
_KERNELS = (
    *("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward"),
    "_scaled_dot_product_attention_math_for_mps",
)

_NAMES: dict[Any, str] = {}
for _name, _targets in {
    "matmul": _MATMUL,
    "baddbmm": (torch.baddbmm, "baddbmm"),
    "einsum": (torch.einsum, torch.functional.einsum),
    "add": _ADD,
    "sub": _SUB,
    "mul": (*_MUL, *_MUL_NAMES),
    "div": (*_DIV, *_DIV_NAMES),
    "tanh": (torch.tanh, F.tanh, "tanh", "tanh_"),
    "where": _WHERE,
    "masked_fill": _MASKED_FILL,
    "cat": (torch.cat, torch.concat, torch.concatenate),
    "softmax": _SOFTMAX,
    "log_softmax": (F.log_softmax, torch.log_softmax, torch.special.log_softmax, "log_softmax", "_log_softmax"),
    "logsumexp": (torch.logsumexp, torch.special.logsumexp, "logsumexp"),
    "exp": (torch.exp, "exp", "exp_"),
    "sum": (torch.sum, "sum"),
    "transpose": _TRANSPOSE,
    "swap": _SWAPS,
    "turn": _ALL_SWAPS,
    "slice": ("slice",),
    "permute": _PERMUTE,
    "unsqueeze": _UNSQUEEZE,
    "squeeze": (torch.squeeze, "squeeze"),
    "getitem": _GETITEM,
    "expand": _EXPAND,
    "reshape": (*_RESHAPE, *_RESHAPE_NAMES),
    "dropout": _DROPOUT,
    "cast": _CAST,
    "same": _SAME,
    "sdpa": (SDPA,),
    "sdpa_kernel": _FLASH,
    "attention_kernel": _KERNELS,
    "multi_head_attention": (F.multi_head_attention_forward,),
    "flex_attention": (torch.ops.higher_order.flex_attention,),
    "native_attention": (torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd),
}.items():
    _NAMES.update(dict.fromkeys(filter(is_own, _targets), _name))


@functools.cache
def _aten(target: Any) -> Any:
    """What an ATen operation is in the spelling of models: the function of torch, or the name of the method."""
    name = (target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target).__name__
    if name == "scaled_dot_product_attention":
        return SDPA
    for module in (torch, F):
        if not name.startswith("_") and callable(function := getattr(module, name, None)):
            return function
    return name


def called(node: fx.Node) -> Any:
    """What a node calls, as the tables have it: a function, or the name of a method or of a tensor's attribute.

    ``torch.ops.aten.softmax.int`` is ``torch.softmax``: exported programs are written so.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and "aten::" in _schema_name(target):
        return _aten(target)
    return node.args[1] if target is getattr and node.args[1] in (*_SWAPS, *_ALL_SWAPS) else target


def _schema_name(target: Any) -> str:
    name = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
    return str(name)


def called_name(node: fx.Node) -> str:
    """``called`` by its name."""
    target = called(node)
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def value(node: Operand) -> Any:
    """Example value Dynamo recorded for a node (a fake tensor or a SymInt); constants stand for themselves."""
    return node.meta.get("example_value") if isinstance(node, fx.Node | Made) else node


def is_scalar(operand: Operand) -> bool:
    """True for a Python number, or a node that holds one (dynamic=True turns floats into ``item()`` nodes)."""
    held = value(operand)
    return isinstance(held, int | float | torch.SymInt | torch.SymFloat) and not isinstance(held, bool)


METADATA_CHECK = "_assert_tensor_metadata"
"""Reads the type of a tensor that an exported program casts, and none of its values."""

_INPLACE = "add sub mul truediv floordiv mod pow matmul concat lshift rshift and or xor"
_INPLACE_OPERATORS = frozenset({"setitem", "delitem"} | {f"i{name}" for name in _INPLACE.split()})


def mutates(node: fx.Node) -> bool:
    """Whether a Dynamo node writes to one of its operands: ``x.add_(..)``, ``x[i] = ..``, ``x += ..``, ``out=``."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _INPLACE_OPERATORS or node.kwargs.get("out") is not None


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _rank(node: Operand) -> int | None:
    held = value(node)
    return held.dim() if isinstance(held, torch.Tensor) else None


def _axis(axis: Any, rank: int | None) -> Any:
    """Axis counted from the end, which is how attention code means it."""
    return axis - rank if rank is not None and isinstance(axis, int) and axis >= 0 else axis


def _binary(name: str) -> Callable[[fx.Node], Op]:
    def build(node: fx.Node) -> Op:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            return _opaque(node)
        return Op(name, (_argument(node, 0, "input"), _argument(node, 1, "other")))

    return build


def _div(node: fx.Node) -> Op:
    left, right = _argument(node, 0, "input"), _argument(node, 1, "other")
    if node.kwargs.get("rounding_mode") is None and isinstance(right, int | float) and right != 0:
        return Op("mul", (left, 1.0 / right))
    return Op("div", (left, right))


def _baddbmm(node: fx.Node) -> Op:
    operands = tuple(_argument(node, place, name) for place, name in enumerate(("input", "batch1", "batch2")))
    factors = tuple((name, node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    return Op("baddbmm", operands, factors)


def _einsum(node: fx.Node) -> Op:
    """The equation is a parameter, without blanks; operands may come as one list."""
    equation, given = node.args[0], node.args[1:]
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = tuple(given[0])
    if not isinstance(equation, str) or len(given) != 2:
        return _opaque(node)
    return Op("einsum", tuple(given), (("equation", equation.replace(" ", "")),))


def _named(name: str, *arguments: str) -> Callable[[fx.Node], Op]:
    """An operation whose operands are these arguments, all of them given."""

    def build(node: fx.Node) -> Op:
        operands = tuple(_argument(node, place, argument, _MISSING) for place, argument in enumerate(arguments))
        return _opaque(node) if _MISSING in operands else Op(name, operands)

    return build


_MISSING: Any = object()


def _reshape(node: fx.Node) -> Op:
    if any(isinstance(given, torch.dtype) for given in (*node.args, *node.kwargs.values())):
        return _opaque(node)  # other numbers in the same bits
    return Op("reshape", tuple(node.all_input_nodes[:1]))


def _cat(node: fx.Node) -> Op:
    parts = _argument(node, 0, "tensors")
    axis = _argument(node, 1, "dim", 0)
    if not isinstance(parts, list | tuple):
        return _opaque(node)
    return Op("cat", tuple(parts), (("dim", _axis(axis, _rank(node))),))


def _softmax(node: fx.Node) -> Op:
    source = _argument(node, 0, "input")
    return Op("softmax", (source,), (("dim", _axis(_argument(node, 1, "dim"), _rank(source))),))


def _reduced(name: str) -> Callable[[fx.Node], Op]:
    """A reduction over one dimension that stays, with size 1; any other is none that a softmax is written with."""

    def build(node: fx.Node) -> Op:
        source, dim = _argument(node, 0, "input"), _argument(node, 1, "dim", node.kwargs.get("axis"))
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        if not isinstance(dim, int) or _argument(node, 2, "keepdim", False) is not True:
            return _opaque(node)
        return Op(name, (source,), (("dim", _axis(dim, _rank(source))),))

    return build


def _transpose(node: fx.Node) -> Op:
    source = _argument(node, 0, "input")
    axes = [_axis(_argument(node, i, name), _rank(source)) for i, name in ((1, "dim0"), (2, "dim1"))]
    if any(not isinstance(axis, int) for axis in axes):
        return _opaque(node)
    return Op("transpose", (source,), (("dims", tuple(sorted(axes))),))


def _expand(node: fx.Node) -> Op:
    source = node.args[0] if node.args else node.kwargs["input"]
    before, after = value(source), value(node)
    both = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    same = both and list(map(str, before.shape)) == list(map(str, after.shape))
    return Op(IDENTITY if same else "expand", (source,) if same else tuple(node.all_input_nodes))


def _permute(node: fx.Node) -> Op:
    source = node.args[0]
    order: Any = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    dims: Any = node.kwargs.get("dims", order)
    rank = _rank(source)
    if rank is not None and all(isinstance(axis, int) for axis in dims):
        counted = [axis % rank for axis in dims]
        moved = [i for i, axis in enumerate(counted) if i != axis]
        if len(moved) == 2:
            return Op("transpose", (source,), (("dims", tuple(sorted(axis - rank for axis in moved))),))
    return Op("permute", (source,), (("dims", tuple(dims)),))


def _swap(node: fx.Node) -> Op:
    source, rank = node.args[0], _rank(node.args[0])
    held = value(source)
    plain = rank == 2 or ((rank is None or rank > 2) and called(node) in _SWAPS)
    if not plain or (isinstance(held, torch.Tensor) and held.is_complex()):
        return _opaque(node)
    return Op("transpose", (source,), (("dims", (-2, -1)),))


def _slice(node: fx.Node) -> Op:
    """ATen's ``x[.., start:end:step]`` in one dimension; programs are full of those that keep everything."""
    source, before, after = node.args[0], value(node.args[0]), value(node)
    whole = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    dim = _argument(node, 1, "dim", 0)
    if whole and _argument(node, 4, "step", 1) == 1 and str(before.shape[dim]) == str(after.shape[dim]):
        return Op(IDENTITY, (source,))
    bounds = (("start", _argument(node, 2, "start")), ("end", _argument(node, 3, "end")))
    return Op(
        "slice", (source,), (("dim", _axis(dim, _rank(source))), *bounds, ("step", _argument(node, 4, "step", 1)))
    )


def _dropout(node: fx.Node) -> Op:
    p = _argument(node, 1, "p", 0.5)
    training = _argument(node, 2, "training", True)
    name = IDENTITY if p == 0.0 or training is False else "dropout"
    return Op(name, (_argument(node, 0, "input"),), () if name == IDENTITY else (("p", p),))


def _cast(node: fx.Node) -> Op:
    """Casts between floating types are looked through; the matcher compares the types at the region's edges."""
    source, before, after = node.args[0], value(node.args[0]), value(node)
    both = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    if both and before.device == after.device and (before.dtype == after.dtype or _floating(before, after)):
        return Op(IDENTITY, (source,))
    return _opaque(node) if both else Op(IDENTITY, (source,))  # without values: a pattern, written in one type


def _floating(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.is_floating_point() and after.is_floating_point()


def _opaque(node: fx.Node) -> Op:
    return Op(f"{node.op}:{called_name(node)}", tuple(node.all_input_nodes))


_BUILDERS: dict[str, Callable[[fx.Node], Op]] = {
    "swap": _swap,
    "turn": _swap,
    "slice": _slice,
    "matmul": lambda node: Op("matmul", (_argument(node, 0, "input"), _argument(node, 1, "other"))),
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    "add": _binary("add"),
    "sub": _binary("sub"),
    "mul": _binary("mul"),
    "tanh": _named("tanh", "input"),
    "where": _named("where", "condition", "input", "other"),
    "masked_fill": _named("masked_fill", "input", "mask", "value"),
    "cat": _cat,
    "reshape": _reshape,
    "div": _div,
    "softmax": _softmax,
    "log_softmax": lambda node: Op("log_softmax", _softmax(node).operands, _softmax(node).params),
    "logsumexp": _reduced("logsumexp"),
    "exp": _named("exp", "input"),
    "sum": _reduced("sum"),
    "transpose": _transpose,
    "permute": _permute,
    "expand": _expand,
    "dropout": _dropout,
    "cast": _cast,
    "same": lambda node: Op(IDENTITY, (node.args[0],)),
}


def canonical_op(node: fx.Node) -> Op:
    """Canonical form of one node; what has no canonical form keeps its own name and never matches by accident."""
    if node.op == "placeholder":
        return Op("placeholder", ())
    if node.op not in ("call_function", "call_method"):
        return _opaque(node)
    name = _NAMES.get(called(node))
    if name is None:
        return _opaque(node)
    builder = _BUILDERS.get(name)
    return builder(node) if builder else Op(name, tuple(node.all_input_nodes))


_FRESH = frozenset(
    ["matmul", "baddbmm", "einsum", "add", "sub", "mul", "div", "tanh", "where", "masked_fill", "cat", "softmax"]
)
"""Operations whose result is new memory: written to in place, they are the only ones that see it."""
_FACTORIES = frozenset(["zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full"])
_VIEWS = frozenset(["transpose", "permute", "unsqueeze", "squeeze", "getitem", "expand", "reshape"])
_SHAPE_READERS = frozenset(["expand_as", "view_as", "reshape_as", "type_as", "to"])
"""Methods that take only the shape or type of their second operand."""
_SHAPES = frozenset(
    "size dim numel new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like".split()  # noqa: SIM905
)


@dataclass
class CanonicalGraph:
    """View of ``graph``: ``ops`` by node, and a networkx graph of the value flow with identities contracted.

    What is written in place (``scores /= 8``, ``scores.masked_fill_(..)``) is read in its order: operands of later
    operations are the node that wrote last. That is so where the memory is a result of its own that nothing else looks
    at, or at its only view; any other write is in ``writes`` alone, and a region across it is refused.
    """

    graph: fx.Graph
    left_alone: Mapping[fx.Node, str] = field(default_factory=dict)
    """Nodes that match nothing, with the reason (see ``surroundings``)."""
    ops: dict[fx.Node, Op] = field(default_factory=dict)
    flow: Any = field(default_factory=nx.DiGraph)
    order: dict[fx.Node, int] = field(default_factory=dict)
    writes: list[fx.Node] = field(default_factory=list)
    """Nodes that write to memory, in order."""
    read_writes: set[fx.Node] = field(default_factory=set)
    """Those of them that are read as operations of their own."""
    parts: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    """By a node that stands for several (a softmax written out): the others."""

    def __post_init__(self) -> None:
        self._source: dict[fx.Node, fx.Node] = {}
        self._memory: dict[fx.Node, fx.Node] = {}
        """By a node that writes in place: the node whose memory that is."""
        self._latest: dict[fx.Node, fx.Node] = {}
        """By memory: the node that wrote to it last, so far."""
        self.live = _live(self.graph)
        for node in self.graph.nodes:
            self.order[node] = len(self.order)
            op = canonical_op(node) if node not in self.left_alone else _opaque(node)
            if mutates(node):
                self.writes.append(node)
                op = self._write(node, op)
            op = Op(op.name, tuple(self._now(operand) for operand in op.operands), op.params)
            self.ops[node] = self._softmax_written_out(node, op) if op.name in ("exp", "div", "where") else op
            if node in self.read_writes:
                memory = self._memory_of(node.args[0])
                self._memory[node] = memory
                self._latest[memory] = node
            if op.name == IDENTITY and isinstance(op.operands[0], fx.Node):
                self._source[node] = self._source.get(op.operands[0], op.operands[0])
                continue
            self.flow.add_node(node, op=op)
            for used in _values_read(node):
                self.flow.add_edge(self.resolve(self._now(used)), node)

    def _now(self, operand: Operand) -> Operand:
        """``operand`` as it is at this place of the graph: the last write to it."""
        if not isinstance(operand, fx.Node) or not self._latest:
            return operand
        return self._latest.get(self._memory_of(operand), operand)

    def _memory_of(self, node: Any) -> fx.Node:
        root: fx.Node = self._source.get(node, node)
        return self._memory.get(root, root)

    def _write(self, node: fx.Node, op: Op) -> Op:
        """The operation of a node that writes, if it can be read as one; else an opaque one."""
        if op.name not in _FRESH or not node.args or not isinstance(node.args[0], fx.Node):
            return _opaque(node)
        at = node.args[0]
        looks = [user for user in at.users if user in self.ops and (user in self._source or self._is_view(user))]
        while at in self._source or self.ops[at].name in _VIEWS:
            parent = at.all_input_nodes[0]
            looks += [user for user in parent.users if user is not at and user in self.live]
            at = parent
        if looks or not (self.ops[at].name in _FRESH or self.ops[at].name.partition(":")[2] in _FACTORIES):
            return _opaque(node)
        self.read_writes.add(node)
        return op

    def _softmax_written_out(self, node: fx.Node, op: Op) -> Op:
        """``exp(x - logsumexp(x))``, ``exp(log_softmax(x))`` and ``exp(x) / sum(exp(x))``, which are softmax(x).

        The sums keep their dimension. So is a softmax with 0 for the rows that are -inf throughout, as SDPA decomposes.
        Anything else stays what it is.
        """
        if op.name == "where":
            return self._safe_softmax(node, op)
        found = [self.resolve(operand) for operand in op.operands]
        above = [self.ops[one] if isinstance(one, fx.Node) else None for one in found]
        if op.name == "exp" and above[0] is not None:
            if above[0].name == "log_softmax":
                return self._composed(node, above[0], above[0].operands[0], found[0])
            if above[0].name == "sub":
                scores, total = (self.resolve(operand) for operand in above[0].operands)
                if self._reduces(total, "logsumexp", scores):
                    return self._composed(node, self.ops[total], scores, found[0], total)
        weights = op.name == "div" and above[0] is not None and above[0].name == "exp"
        if weights and self._reduces(found[1], "sum", found[0]):
            return self._composed(node, self.ops[found[1]], self.ops[found[0]].operands[0], found[0], found[1])
        return op

    def _safe_softmax(self, node: fx.Node, op: Op) -> Op:
        """``where(~(x != -inf).any(-1), 0, softmax(x))``."""
        weights, parts = self.resolve(op.operands[2]), [self.resolve(op.operands[0])]
        inner = self.ops.get(weights) if isinstance(weights, fx.Node) else None
        if inner is None or inner.name != "softmax":
            return op
        for name in ("logical_not", "any", "logical_not", "eq"):
            if not isinstance(parts[-1], fx.Node) or called_name(parts[-1]) != name:
                return op
            parts.append(self.resolve(parts[-1].args[0]))
        scores, (kept, hidden) = self.resolve(inner.operands[0]), (parts[1], parts[3])
        zeros = op.operands[1]
        zero = (
            isinstance(zeros, fx.Node)
            and called_name(zeros) in ("full_like", "zeros_like")
            and 0 in (zeros.args[1:] or (0,))
        )
        by_row = tuple(kept.args[1:]) in ((-1, True), ((_rank(kept.args[0]) or 0) - 1, True))
        if parts[4] is not scores or hidden.args[1] != -math.inf or not zero or not by_row:
            return op
        self.ops[weights] = Op("softmax_of_rows", inner.operands, inner.params)
        return self._composed(node, inner, scores, weights, *parts[:4])

    def _reduces(self, node: Operand, name: str, source: Operand) -> bool:
        """Whether ``node`` reduces ``source`` by the operation ``name``."""
        op = self.ops.get(node) if isinstance(node, fx.Node) else None
        return op is not None and op.name == name and self.resolve(op.operands[0]) is source

    def _composed(self, node: fx.Node, sums: Op, scores: Operand, *parts: fx.Node) -> Op:
        self.parts[node] = parts
        return Op("softmax", (scores,), sums.params)

    def _is_view(self, node: fx.Node) -> bool:
        return self.ops[node].name in _VIEWS and node in self.live

    def resolve(self, operand: Operand) -> Operand:
        """The node whose value ``operand`` carries, looking through identities; constants stay as they are."""
        return self._source.get(operand, operand) if isinstance(operand, fx.Node) else operand

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Live nodes that read the value of ``node``, directly or through identities, in graph order."""
        return [user for user in self.flow.successors(node) if user in self.live]

    def writes_between(self, first: int, last: int) -> list[fx.Node]:
        """The nodes that write to memory between two places of the graph, in order."""
        at = bisect.bisect_right(self.writes, first, key=self.order.__getitem__)
        until = bisect.bisect_left(self.writes, last, key=self.order.__getitem__)
        return self.writes[at:until]

    def anchors(self, name: str) -> list[fx.Node]:
        return [node for node, op in self.ops.items() if op.name == name]


def _values_read(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node whose values it reads, not only their shapes or types."""
    name = called_name(node)
    if node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim"):
        return []
    if name in _SHAPES or name == METADATA_CHECK:
        return []
    return node.all_input_nodes[:1] if name in _SHAPE_READERS else node.all_input_nodes


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value is read in the end, or that do more than yield one."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        acts = node.op not in ("call_function", "call_method", "get_attr") or mutates(node)
        if acts or not isinstance(value(node), torch.Tensor) or any(user in live for user in node.users):
            live.add(node)
    return live
