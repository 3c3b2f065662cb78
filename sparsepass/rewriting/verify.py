"""Invariants of a rewritten graph, checked before it is handed on. A failure is a bug here, so it stops the compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sparsepass.errors import GraphInvariantError
from sparsepass.graph.canonical import mutates, value
from sparsepass.graph.strides import lies_alike, unaware_readers
from sparsepass.rewriting.ops import SPARSE_ATTENTION


def verify(
    before: fx.Graph,
    after: fx.Graph,
    replaced: dict[str, fx.Node],
    expected: dict[str, torch.Tensor],
    added: Sequence[str] = (),
) -> None:
    """Raise ``GraphInvariantError`` unless inputs, writes, and the replaced values' types and strides are kept.

    Strides may differ where no reader can tell.

    ``expected``: the fake tensor that each replaced node yielded, by the site's name. ``added``: names of the inputs
    that come after the captured graph's own.
    """
    try:
        after.lint()
    except Exception as error:
        raise GraphInvariantError(f"the rewritten graph is not well formed: {error}") from error
    _same("inputs", [*_names(before, "placeholder"), *added], _names(after, "placeholder"))
    _same("writes", [n.name for n in before.nodes if mutates(n)], [n.name for n in after.nodes if mutates(n)])
    captured = {node.name: value(node) for node in before.nodes}
    for name, node in replaced.items():
        held, new = expected[name], value(node)
        if not isinstance(new, torch.Tensor) or tuple(new.shape) != tuple(held.shape) or new.dtype != held.dtype:
            raise GraphInvariantError(
                f"site {name!r} yielded {tuple(held.shape)} {held.dtype}, its replacement yields "
                f"{tuple(new.shape) if isinstance(new, torch.Tensor) else new!r}"
            )
        if not lies_alike(new, held) and unaware_readers(node, new, lambda reader: captured.get(reader.name)) is None:
            raise GraphInvariantError(
                f"site {name!r} yielded strides {tuple(held.stride())}, its replacement yields {tuple(new.stride())}, "
                f"and {[user.name for user in node.users]} can tell"
            )
        if node.target is SPARSE_ATTENTION and node.args[0] is node:
            raise GraphInvariantError(f"site {name!r} was replaced by a node that reads itself")


def _names(graph: fx.Graph, op: str) -> list[str]:
    return [node.name for node in graph.nodes if node.op == op]


def _same(what: str, before: list[str], after: list[str]) -> None:
    if before != after:
        raise GraphInvariantError(f"the rewrite changed the graph's {what}: {before} became {after}")
