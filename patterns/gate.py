"""Sinks as a factor behind the attention: ``out * sigmoid(logsumexp(scores) - sink)``, as Granite writes them.

That is the softmax with one more logit in its sum: the weights times ``sum / (sum + exp(sink))``.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, called_name
from sparsepass.graph.sizes import shape
from sparsepass.patterns.axes import Axes, Dims
from sparsepass.patterns.below import Below


def with_gate(view: CanonicalGraph, softmax: fx.Node, below: Below, axes: Axes, dims: Dims) -> Below:
    """``below`` with its sink, if the scores' log-sum-exp gates its output and is used for nothing else."""
    scores = view.resolve(view.ops[softmax].operands[0])
    others = [user for user in view.users(scores) if user is not softmax] if isinstance(scores, fx.Node) else []
    outputs = view.users(below.output)
    if len(others) != 1 or called_name(others[0]) != "logsumexp" or len(outputs) != 1:
        return below
    lse, gated = others[0], outputs[0]
    axis = lse.args[1] if len(lse.args) > 1 else lse.kwargs.get("dim")
    if axis not in (-1, len(dims) - 1, (-1,), [-1]):
        return below
    kept = bool(lse.args[2] if len(lse.args) > 2 else lse.kwargs.get("keepdim", False))
    away = _only(view, lse, "sub")
    gate = away and _only(view, away, "call_function:sigmoid", "call_method:sigmoid")
    if away is None or gate is None or view.resolve(view.ops[away].operands[0]) is not lse:
        return below
    inside, last = {lse, away, gate}, gate
    while (next_one := _only(view, last, "unsqueeze")) is not None:
        inside.add(next_one)
        last = next_one
    if view.ops[gated].name != "mul" or _only(view, last, "mul") is not gated or len(shape(last)) != len(dims):
        return below
    sink = view.ops[away].operands[1]
    rows = (*dims[:-1], ()) if kept else dims[:-1]
    return replace(
        below, output=gated, inside=below.inside | inside | {gated}, sink=(sink, axes.seen(shape(sink), rows))
    )


def _only(view: CanonicalGraph, node: fx.Node, *names: str) -> fx.Node | None:
    """The single user of ``node``, if it is one of these operations."""
    users = view.users(node)
    return users[0] if len(users) == 1 and view.ops[users[0]].name in names else None
