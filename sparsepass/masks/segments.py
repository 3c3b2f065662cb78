"""Proof that packed documents are the runs in which user-given position ids rise by exactly one."""

from __future__ import annotations

import operator
from typing import TypeGuard

import torch
from torch import fx

from sparsepass.graph.canonical import called
from sparsepass.masks.ir import Int, Opaque
from sparsepass.masks.reader import MaskReader, argument, scalar, tensor_of

_SUM = ("cumsum", torch.cumsum, torch.Tensor.cumsum)
_DIFF = ("diff", torch.diff, torch.Tensor.diff)
_DIFFERS = ("ne", "__ne__", "not_equal", operator.ne, torch.ne, torch.not_equal, torch.Tensor.__ne__)


def numbers_runs_of(ids: Opaque, positions: Opaque, reader: MaskReader) -> bool:
    """Whether ``ids`` is ``cumsum(diff(positions, prepend=one column) != 1)`` along the row.

    ``ids`` and ``positions`` are both read at (batch, query). Such ids are equal only where every step in between is
    one, so for two elements of one document the distance of their positions is that of their indices.
    """
    scan, rank = ids.node, len(ids.index)
    if not _calls(scan, _SUM) or not _last(argument(scan, 1, "dim"), rank) or not _wide(scan):
        return False
    breaks = argument(scan, 0, "input")
    if not _calls(breaks, _DIFFERS) or scalar(argument(breaks, 1, "other")) != 1:
        return False
    steps = argument(breaks, 0, "input")
    if not _calls(steps, _DIFF) or argument(steps, 1, "n", 1) != 1 or argument(steps, 4, "append") is not None:
        return False
    source, prepended = argument(steps, 0, "input"), tensor_of(argument(steps, 3, "prepend"))
    if not _last(argument(steps, 2, "dim", -1), rank) or prepended is None or prepended.dim() != rank:
        return False
    if not _is_one(prepended.shape[-1]) or not _wide(source):
        return False
    return bool(reader.read(source, ids.index) == Int(positions.symbol))


def _calls(node: object, targets: tuple[object, ...]) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and called(node) in targets


def _wide(node: object) -> TypeGuard[fx.Node]:
    """Whether ``node`` holds integers that do not wrap around at any length."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.dtype in (torch.int64, torch.int32)


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _last(dim: object, rank: int) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool) and dim in (-1, rank - 1)
