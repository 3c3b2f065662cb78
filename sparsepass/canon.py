"""Canonical form of a captured graph: one name per operation, whatever its spelling, as a networkx view.

Dynamo records the same operation as a function (``torch.matmul``), a method (``"matmul"``) or an operator (``@``), and
threads casts, ``contiguous`` and dropout at p = 0 between the operations that matter. ``CanonicalGraph`` names each
operation once and looks through the nodes that change no value, so that a pattern is written in one spelling only.
Nothing is mutated: the view refers to the nodes of the original graph.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import fx

Operand = Any
"""A ``fx.Node`` or a constant."""


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


IDENTITY = "identity"

_MATMUL = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")
_ADD = (torch.add, operator.add, "add", "__add__", "__radd__")
_MUL = (torch.mul, torch.multiply, operator.mul, "mul", "multiply", "__mul__", "__rmul__")
_DIV = (torch.div, torch.true_divide, operator.truediv, "div", "true_divide", "__truediv__")
_SOFTMAX = (F.softmax, torch.softmax, "softmax")
_TRANSPOSE = (torch.transpose, torch.swapaxes, "transpose", "swapaxes", "swapdims")
_PERMUTE = (torch.permute, "permute")
_UNSQUEEZE = (torch.unsqueeze, "unsqueeze")
_GETITEM = (operator.getitem, "__getitem__")
_EXPAND = ("expand",)
_RESHAPE = (torch.reshape, "reshape", "view")
_DROPOUT = (F.dropout, torch.dropout, "dropout")
_CAST = ("to", "float", "half", "bfloat16", "double", "type", "type_as")
_SAME = ("contiguous", "clone", "detach", torch.clone, torch.detach)
_SDPA = (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)

_NAMES: dict[Any, str] = {}
for _name, _targets in {
    "matmul": _MATMUL,
    "add": _ADD,
    "mul": _MUL,
    "div": _DIV,
    "softmax": _SOFTMAX,
    "transpose": _TRANSPOSE,
    "permute": _PERMUTE,
    "unsqueeze": _UNSQUEEZE,
    "getitem": _GETITEM,
    "expand": _EXPAND,
    "reshape": _RESHAPE,
    "dropout": _DROPOUT,
    "cast": _CAST,
    "same": _SAME,
    "sdpa": _SDPA,
}.items():
    _NAMES.update(dict.fromkeys(_targets, _name))


def value(node: Operand) -> Any:
    """Example value Dynamo recorded for a node (a fake tensor or a SymInt); constants stand for themselves."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def is_scalar(operand: Operand) -> bool:
    """True for a Python number, or a node that holds one (dynamic=True turns floats into ``item()`` nodes)."""
    held = value(operand)
    return isinstance(held, int | float | torch.SymInt | torch.SymFloat) and not isinstance(held, bool)


_INPLACE_OPERATORS = frozenset({"iadd", "isub", "imul", "itruediv", "ifloordiv", "iand", "ior", "ixor", "setitem"})


def mutates(node: fx.Node) -> bool:
    """Whether a Dynamo node writes to one of its operands: ``x.add_(..)``, ``x[i] = ..``, ``x += ..``, ``out=``."""
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.startswith("_")
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


def _softmax(node: fx.Node) -> Op:
    source = _argument(node, 0, "input")
    return Op("softmax", (source,), (("dim", _axis(_argument(node, 1, "dim"), _rank(source))),))


def _transpose(node: fx.Node) -> Op:
    source = _argument(node, 0, "input")
    axes = [_axis(_argument(node, i, name), _rank(source)) for i, name in ((1, "dim0"), (2, "dim1"))]
    if any(not isinstance(axis, int) for axis in axes):
        return _opaque(node)
    return Op("transpose", (source,), (("dims", tuple(sorted(axes))),))


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
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return Op(f"{node.op}:{target}", tuple(node.all_input_nodes))


_BUILDERS: dict[str, Callable[[fx.Node], Op]] = {
    "matmul": lambda node: Op("matmul", (_argument(node, 0, "input"), _argument(node, 1, "other"))),
    "add": _binary("add"),
    "mul": _binary("mul"),
    "div": _div,
    "softmax": _softmax,
    "transpose": _transpose,
    "permute": _permute,
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
    if node.op == "call_function" and node.target is getattr and len(node.args) == 2 and node.args[1] in ("mT", "T"):
        return Op("transpose", (node.args[0],), (("dims", (-2, -1)),)) if node.args[1] == "mT" else _opaque(node)
    name = _NAMES.get(node.target)
    if name is None:
        return _opaque(node)
    builder = _BUILDERS.get(name)
    return builder(node) if builder else Op(name, tuple(node.all_input_nodes))


@dataclass
class CanonicalGraph:
    """View of ``graph``: ``ops`` by node, and a networkx graph of the value flow with identities contracted."""

    graph: fx.Graph
    ops: dict[fx.Node, Op] = field(default_factory=dict)
    flow: Any = field(default_factory=nx.DiGraph)
    order: dict[fx.Node, int] = field(default_factory=dict)
    writes: list[fx.Node] = field(default_factory=list)
    """Nodes that write to memory, in order."""

    def __post_init__(self) -> None:
        source: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            op = canonical_op(node)
            self.ops[node] = op
            self.order[node] = len(self.order)
            if mutates(node):
                self.writes.append(node)
            if op.name == IDENTITY and isinstance(op.operands[0], fx.Node):
                source[node] = source.get(op.operands[0], op.operands[0])
                continue
            self.flow.add_node(node, op=op)
            for used in node.all_input_nodes:
                self.flow.add_edge(source.get(used, used), node)
        self._source = source

    def resolve(self, operand: Operand) -> Operand:
        """The node whose value ``operand`` carries, looking through identities; constants stay as they are."""
        return self._source.get(operand, operand) if isinstance(operand, fx.Node) else operand

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Nodes that read the value of ``node``, directly or through identities, in graph order."""
        return list(self.flow.successors(node))

    def write_inside(self, region: frozenset[fx.Node]) -> fx.Node | None:
        """A node that writes to memory between the first and the last node of ``region``, or None.

        A replacement reads its operands where the last node stands, so it alone would see that write.
        """
        places = [self.order[node] for node in region]
        at = bisect.bisect_right(self.writes, min(places), key=self.order.__getitem__)
        return self.writes[at] if at < len(self.writes) and self.order[self.writes[at]] < max(places) else None

    def anchors(self, name: str) -> list[fx.Node]:
        return [node for node, op in self.ops.items() if op.name == name]
