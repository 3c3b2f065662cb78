"""How the output of a site lies in memory, and whether a reader can tell when its replacement lies otherwise.

Shapes do not say it all: a kernel of the user's own reads memory in its order, the caller of the graph may ask for
strides, and what a model asked while it was traced (``is_contiguous()``) was answered from the captured strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import IDENTITY, LINEAR, canonical_op, mutates, value
from sparsepass.graph.made import unguarded
from sparsepass.graph.sizes import same_size

Steps = tuple[tuple[Any, ...], ...]
"""Calls in order, each (method or function, arguments...)."""

_UNAWARE = frozenset({IDENTITY, "transpose", "permute", "reshape", "unsqueeze", "squeeze", "matmul", "einsum"})
"""Operations that give the same numbers whatever the strides of what they read; those of their result are asked."""
_SIZES = frozenset({"size", "dim", "numel"})
_MOST_READERS = 8


def lies_alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of the same sizes have the same strides.

    In a dimension of size 1 a stride means nothing, and where a size is 0 none does: there is nothing to read.
    """
    if any(same_size(size, 0) for size in left.shape):
        return True
    pairs = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(same_size(size, 1) or same_size(one, other) for size, one, other in pairs)


def unaware_readers(
    node: fx.Node, held: torch.Tensor, captured: Callable[[fx.Node], Any] = value
) -> dict[fx.Node, torch.Tensor] | None:
    """None if a reader of ``node`` could tell that it yields ``held``, of other strides than the captured ones.

    Else what the readers yield now, in so far as strides change. Only a single line of readers is followed, up to one
    whose result has the strides that were ``captured``: where two read the same memory, one could write to it.
    """
    changed: dict[fx.Node, torch.Tensor] = {}
    for _ in range(_MOST_READERS):
        readers = [user for user in node.users if user.target not in _SIZES]
        if not readers:
            return changed
        if len(readers) > 1 or not _unaware(readers[0]):
            return None
        reader, before = readers[0], captured(readers[0])
        after = _yielded(reader, node, held)
        if not isinstance(before, torch.Tensor) or after is None:
            return None
        if lies_alike(after, before):
            return changed
        changed[reader] = after
        node, held = reader, after
    return None


def _unaware(reader: fx.Node) -> bool:
    return not mutates(reader) and (canonical_op(reader).name in _UNAWARE or reader.target is LINEAR)


def _yielded(reader: fx.Node, node: fx.Node, held: torch.Tensor) -> torch.Tensor | None:
    """What ``reader`` yields if ``node`` yields ``held``; None where it cannot be run so (``view``, for instance)."""
    args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda one: held if one is node else value(one))
    try:
        with unguarded((node, reader)), torch.no_grad():
            target = getattr(args[0], reader.target) if isinstance(reader.target, str) else reader.target
            result = target(*(args[1:] if isinstance(reader.target, str) else args), **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return None
    return result if isinstance(result, torch.Tensor) else None


def restoring(captured: torch.Tensor) -> Steps | None:
    """Calls from a tensor of any strides to one with those of ``captured``; None where they cannot be had so.

    They can where a tensor is dense in some order of its dimensions, but for a last one that is cut, as SDPA cuts a
    head size that it had padded.
    """
    order = _memory_order(captured)
    sizes, strides = [captured.shape[dim] for dim in order], [captured.stride(dim) for dim in order]
    if not order or not (same_size(sizes[-1], 1) or same_size(strides[-1], 1)):
        return (("contiguous",),) if not order else None
    width = sizes[-1] if len(order) == 1 or same_size(sizes[-2], 1) else strides[-2]
    dense: Any = width
    for size, stride in reversed([*zip(sizes[:-1], strides[:-1], strict=True)]):
        if not (same_size(size, 1) or same_size(stride, dense)):
            return None
        dense = dense * (size if torch_private.hint_value(size) is not None else torch.sym_max(1, size))
    cut: Steps = ()
    if not same_size(width, sizes[-1]):
        if not (isinstance(width, int) and isinstance(sizes[-1], int) and width > sizes[-1]):
            return None
        cut = (("narrow", len(order) - 1, 0, sizes[-1]),)
    inverse = tuple(order.index(dim) for dim in range(len(order)))
    filled: Steps = ((torch.constant_pad_nd, (0, width - sizes[-1])),) if cut else (("contiguous",),)
    if order == sorted(order):
        return (*filled, *cut)
    return (("permute", tuple(order)), *filled, *cut, ("permute", inverse))


def _memory_order(held: torch.Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest; those of size 1 first, where they do no harm.

    Symbolic strides are compared by their current values, unbacked ones by typical values, without a guard.
    """
    strides = [torch_private.typical_value(stride) for stride in held.stride()]
    return sorted(range(held.dim()), key=lambda dim: (not same_size(held.shape[dim], 1), -strides[dim]))
