"""Which nodes of a captured graph hold a tensor that the graph changes in place.

A Dynamo graph is not functional: after ``mask &= other`` or a cache write, a node no longer means what it was computed
as. Reading a mask from its definition, or reusing its nodes later, is right only for nodes that stay as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from sparsepass.graph.canonical import called, called_name

_IN_PLACE_OPERATORS = (
    operator.iadd,
    operator.iand,
    operator.ifloordiv,
    operator.ilshift,
    operator.imod,
    operator.imul,
    operator.imatmul,
    operator.ior,
    operator.ipow,
    operator.irshift,
    operator.isub,
    operator.itruediv,
    operator.ixor,
    operator.setitem,
    operator.delitem,
)
_FRESH = frozenset(
    """
    arange ones zeros full new_ones new_zeros new_full ones_like zeros_like full_like
    le lt ge gt eq ne add sub mul rsub neg abs floordiv truediv and_ or_ xor invert where masked_fill
    bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not tril triu cumsum diff sum mean
    embedding linear matmul scaled_dot_product_attention softmax cos sin pow rsqrt silu gelu tanh cat stack clone item
    """.split()  # noqa: SIM905  one name a line is harder to read
)
"""Operations whose result shares no memory with their operands. Any other is taken to share."""


def _is_fresh(node: fx.Node) -> bool:
    name = called_name(node)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    return node.op in ("call_function", "call_method") and (name in _FRESH or f"{name}_" in _FRESH)


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    return not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that ``node`` changes."""
    if node.op not in ("call_function", "call_method"):
        return
    name = called_name(node)
    operands = [operand for operand in node.all_input_nodes if _holds_tensor(operand)]
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.is_mutable:
            yield from operands
    elif isinstance(node.target, torch._ops.HigherOrderOperator):
        if "wrap" not in name and "checkpoint" not in name:
            yield from operands
    elif isinstance(node.target, torch._ops.OpOverloadPacket) and called(node) is node.target:
        yield from operands
    elif (
        node.target in _IN_PLACE_OPERATORS
        or (name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_"))
        or (name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__"))
        or name in ("__setitem__", "set_", "copy_")
    ):
        yield from operands[:1]
    if node.kwargs.get("inplace"):
        yield from operands[:1]
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        yield out


def touched_by(writer: fx.Node) -> dict[fx.Node, None]:
    """Every node whose memory ``writer`` may write to: what it changes, views of that, what that is a view of."""
    return _spread(writer, {})


def mutated_nodes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node whose memory may be written after it was made, with the first node that writes it."""
    found: dict[fx.Node, fx.Node] = {}
    for writer in graph.nodes:
        found.update(dict.fromkeys(_spread(writer, found), writer))
    return found


def _spread(writer: fx.Node, known: Mapping[fx.Node, object]) -> dict[fx.Node, None]:
    """The nodes that a write reaches, beyond those known."""
    found: dict[fx.Node, None] = {}
    pending = list(_written(writer))
    while pending:
        node = pending.pop()
        if node in found or node in known or not _holds_tensor(node):
            continue
        found[node] = None
        if not _is_fresh(node):  # what ``x *= y`` yields is x
            pending += list(_written(node)) or node.all_input_nodes
        pending += [user for user in node.users if not _is_fresh(user)]
    return found
