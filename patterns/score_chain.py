"""From the softmax up to the product of queries and keys: what happens to the scores in between, one step at a time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Operand, called_name, is_scalar, value
from sparsepass.graph.sizes import shape
from sparsepass.patterns.pattern import HIDES
from sparsepass.patterns.products import PRODUCTS, is_product

MOST_STEPS = 24
_VIEWS = frozenset({"reshape", "transpose", "permute", "unsqueeze", "squeeze"})
_OWN = re.compile(r"_(parameters|buffers|modules)_")
"""In the name that Dynamo gives to an input that belongs to a module."""
_LAST = {"max", "amax"}


class Unclear(Exception):
    """A step that has no meaning here; the text is for the user."""

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.reason, self.nodes = reason, tuple(node.name for node in nodes)


class NoProduct(Unclear):
    """The chain does not begin with a product of two activations: most such softmaxes are no attention."""


class Kind(StrEnum):
    SCALE = "scale"
    ADD = "add"
    HIDE = "hide"
    """Keys where ``operand`` is true (``sign`` -1: false) get a number that hides them."""
    TANH = "tanh"
    VIEW = "view"
    SINK = "sink"
    NOTHING = "nothing"
    """Changes no weight: a constant or the row's maximum taken off, a floor under hidden scores."""


@dataclass(frozen=True)
class Step:
    """One operation on the scores. ``node`` yields them; ``operand`` is what is added, multiplied, hidden by."""

    kind: Kind
    node: fx.Node
    operand: Operand = None
    sign: float = 1.0
    also: tuple[fx.Node, ...] = ()
    """Further nodes that only this step needs."""


@dataclass(frozen=True)
class Chain:
    """The product, and the steps from it to the softmax."""

    product: fx.Node
    steps: tuple[Step, ...]


def read_chain(view: CanonicalGraph, softmax: fx.Node) -> Chain:
    """The chain above ``softmax``. Raises ``Unclear`` where a step is not understood."""
    steps: list[Step] = []
    node = view.resolve(view.ops[softmax].operands[0])
    for _ in range(MOST_STEPS):
        if not isinstance(node, fx.Node):
            raise NoProduct("the softmax is over a constant")
        if is_product(view, node):
            return Chain(node, tuple(reversed(steps)))
        step, node = _step(view, node)
        steps.append(step)
    raise Unclear(f"more than {MOST_STEPS} operations between the product of queries and keys and the softmax", node)


def _step(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    op = view.ops[node]
    if op.name in _VIEWS:
        return Step(Kind.VIEW, node), view.resolve(op.operands[0])
    if op.name == "tanh":
        return Step(Kind.TANH, node), view.resolve(op.operands[0])
    reader = _READERS.get(op.name)
    if reader is None:
        reader = _limit if called_name(node) in ("max", "maximum", "clamp", "clamp_min", "clip") else None
    if reader is not None:
        return reader(view, node)
    raise _not_understood(view, node)


def _not_understood(view: CanonicalGraph, node: fx.Node) -> Unclear:
    if node.op == "placeholder":
        return NoProduct(
            f"the scores {node.name!r} are computed in another graph (a graph break between the product of queries and "
            "keys and the softmax) or given by the caller",
            node,
        )
    why = "is not understood between the product of queries and keys and the softmax"
    if view.ops[node].name in PRODUCTS:
        why = "is no product of two activations of three dimensions or more"
    return NoProduct(f"'{called_name(node)}' (node {node.name!r}) {why}", node)


def _scale(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    left, right = (view.resolve(operand) for operand in view.ops[node].operands)
    sign = -1.0 if view.ops[node].name == "div" else 1.0
    for scores, factor in ((left, right), (right, left)) if sign > 0 else ((left, right),):
        number = number_of(factor)
        if number is not None:
            return Step(Kind.SCALE, node, 1.0 / number if sign < 0 and number else number), scores
        if is_scalar(factor):
            return Step(Kind.SCALE, node, factor, sign), scores
    for scores, factor in ((left, right), (right, left)) if sign > 0 else ((left, right),):
        if isinstance(scores, fx.Node) and isinstance(factor, fx.Node) and leads_to_product(view, scores):
            held = value(factor)
            if isinstance(held, torch.Tensor) and shape(factor)[-2:] == shape(node)[-2:]:
                raise Unclear(
                    f"the scores are multiplied by {factor.name!r}, a tensor of queries and keys; only a mask that is "
                    "added or that fills is exact",
                    node,
                    factor,
                )
            if not of_the_model(view, factor):
                raise Unclear(
                    f"the scores are scaled by {factor.name!r}, which is computed from data; the scale has to be a "
                    "number or a parameter of the model",
                    node,
                    factor,
                )
            return Step(Kind.SCALE, node, factor, sign), scores
    raise _not_understood(view, node)


def _add(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    op = view.ops[node]
    left, right = (view.resolve(operand) for operand in op.operands)
    sign = -1.0 if op.name == "sub" else 1.0
    for scores, other in ((left, right), (right, left)) if sign > 0 else ((left, right),):
        number = number_of(other)
        if number is not None and isinstance(scores, fx.Node):
            return Step(Kind.NOTHING, node, sign * number), scores
        if sign > 0 and is_scalar(other) and isinstance(scores, fx.Node):
            return Step(Kind.NOTHING, node, other), scores
    if sign < 0 and isinstance(right, fx.Node) and (peak := _row_maximum(view, right, left)) is not None:
        return Step(Kind.NOTHING, node, also=peak), left
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        if _same_shape(node, left) and leads_to_product(view, left):
            return Step(Kind.ADD, node, op.operands[1], sign), left
        if sign > 0 and _same_shape(node, right) and leads_to_product(view, right):
            return Step(Kind.ADD, node, op.operands[0]), right
        for scores, other in ((left, 1), (right, 0)):
            if sign > 0 or other == 1:
                deeper = view.ops[scores].name in _READERS or view.ops[scores].name in _VIEWS
                if deeper and _same_shape(node, scores):
                    return Step(Kind.ADD, node, op.operands[other], sign), scores
    raise _not_understood(view, node)


def _row_maximum(view: CanonicalGraph, node: fx.Node, scores: Operand) -> tuple[fx.Node, ...] | None:
    """The nodes of ``scores.max(-1, keepdim=True).values`` or ``amax``, if ``node`` is that."""
    inside = [node]
    if (view.ops[node].name == "getitem" and node.args[1] == 0) or (
        node.target is getattr and node.args[1] == "values"
    ):
        node = view.resolve(node.args[0])
        inside.append(node)
    if called_name(node) not in _LAST or not node.all_input_nodes:
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    rank = len(shape(scores))
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    reads = view.resolve(node.all_input_nodes[0]) is scores
    return tuple(inside) if reads and kept and isinstance(dim, int) and dim % rank == rank - 1 else None


def _where(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    condition, yes, no = view.ops[node].operands
    for scores, other, sign in ((yes, no, -1.0), (no, yes, 1.0)):
        number = number_of(view.resolve(other))
        if number is not None and isinstance(scores, fx.Node):
            _check_hides(node, number)
            return Step(Kind.HIDE, node, condition, sign), view.resolve(scores)
    for scores, other in ((yes, no), (no, yes)):
        _check_known(view, node, scores, other)
    raise _not_understood(view, node)


def _masked_fill(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    scores, mask, fill = view.ops[node].operands
    number = number_of(view.resolve(fill))
    if number is None:
        _check_known(view, node, scores, fill)
        raise _not_understood(view, node)
    _check_hides(node, number)
    return Step(Kind.HIDE, node, mask), view.resolve(scores)


def _check_hides(node: fx.Node, number: float) -> None:
    if not number <= HIDES:
        raise Unclear(
            f"{node.name!r} puts {number:g} in the place of scores; only {HIDES:g} and less hides a key exactly", node
        )


def _check_known(view: CanonicalGraph, node: fx.Node, scores: Operand, fill: Operand) -> None:
    """A buffer of the model as the fill: its value may change without the graph's."""
    scores, fill = view.resolve(scores), view.resolve(fill)
    if is_scalar(fill) and isinstance(scores, fx.Node) and leads_to_product(view, scores):
        raise Unclear(
            f"{node.name!r} puts {fill.name!r} in the place of scores, a number that is not known when the graph is "
            f"compiled; a constant of {HIDES:g} or less hides a key",
            node,
            fill,
        )
    single = isinstance(fill, fx.Node) and isinstance(value(fill), torch.Tensor) and not shape(fill)
    if single and isinstance(scores, fx.Node) and leads_to_product(view, scores):
        raise Unclear(
            f"{node.name!r} puts {fill.name!r} in the place of scores, a tensor whose value is not known when the "
            f"graph is compiled; a number of {HIDES:g} or less hides a key",
            node,
            fill,
        )


def _limit(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    """A floor that only hidden scores can reach."""
    name = called_name(node)
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("other"))
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    number = number_of(low)
    wide = high is None or (number_of(high) or 0.0) >= -HIDES
    if number is not None and number <= HIDES and wide and isinstance(value(node), torch.Tensor):
        return Step(Kind.NOTHING, node), view.resolve(view.ops[node].operands[0])
    raise Unclear(f"{name!r} (node {node.name!r}) limits the scores", node)


def _sink(view: CanonicalGraph, node: fx.Node) -> tuple[Step, Operand]:
    op = view.ops[node]
    if len(op.operands) == 2 and op.params == (("dim", -1),):
        scores, sink = op.operands
        if shape(sink)[-1:] == (1,):
            return Step(Kind.SINK, node, sink), view.resolve(scores)
    raise _not_understood(view, node)


_READERS: dict[str, Any] = {
    "mul": _scale,
    "div": _scale,
    "add": _add,
    "sub": _add,
    "where": _where,
    "masked_fill": _masked_fill,
    "cat": _sink,
}


def leads_to_product(view: CanonicalGraph, node: fx.Node) -> bool:
    """Whether ``node`` is scores: following steps that keep them leads to a product of two activations."""
    pending, seen = [node], set[fx.Node]()
    while pending and len(seen) < 2 * MOST_STEPS:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_product(view, node):
            return True
        name = view.ops[node].name
        if name in _VIEWS or name == "tanh":
            operands = view.ops[node].operands[:1]
        elif name in _READERS or called_name(node) in ("max", "maximum", "clamp", "clamp_min"):
            operands = view.ops[node].operands
        else:
            continue
        found = [view.resolve(one) for one in operands]
        pending += [one for one in found if isinstance(one, fx.Node) and (name in _VIEWS or _same_shape(node, one))]
    return False


def _same_shape(node: fx.Node, operand: fx.Node) -> bool:
    """Whether ``operand`` has the shape of ``node``: scores are never broadcast to what is added to them."""
    mine, theirs = shape(node), shape(operand)
    return len(mine) == len(theirs) and all(a is b or str(a) == str(b) for a, b in zip(mine, theirs, strict=True))


def number_of(operand: Operand) -> float | None:
    """A Python number, or a tensor of no dimensions made from one; None for anything else."""
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return float(operand)
    if not isinstance(operand, fx.Node) or shape(operand) or not isinstance(value(operand), torch.Tensor):
        return None
    name = called_name(operand)
    if name in ("zeros", "ones", "new_zeros", "new_ones"):
        return float(name.endswith("ones"))
    place = {"full": 1, "new_full": 2, "tensor": 0, "scalar_tensor": 0, "as_tensor": 0, "new_tensor": 1}.get(name)
    if place is None:
        return None
    given = operand.args[place] if len(operand.args) > place else operand.kwargs.get("fill_value")
    return float(given) if isinstance(given, int | float) and not math.isnan(given) else None


def of_the_model(view: CanonicalGraph, node: fx.Node) -> bool:
    """Whether ``node`` is computed from parameters and buffers alone, in a few steps."""
    pending = [node]
    for _ in range(12):
        if not pending:
            return True
        one = pending.pop()
        if one.op == "placeholder":
            if not _OWN.search(one.name):
                return False
        elif one.op != "get_attr":
            pending += one.all_input_nodes
    return False
