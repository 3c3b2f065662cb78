"""Key/value caches before and after a pass: kept, put back, cut short, without copying what is in them.

Layers of a ``DynamicCache`` bind new tensors when they grow, and write into none. So a shallow copy of its layers is
the cache as it was. Every other kind of cache is refused: a static one is written in place, a sliding one forgets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.models import branch


def length_of(cache: Any) -> int:
    """Tokens that a cache holds, 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


def keep(cache: Any) -> list[Any] | None:
    """The layers as they are now; None for no cache. Raises ``AutoError`` for a cache that could not be put back."""
    if cache is None:
        return None
    check(cache)
    return list(branch(cache).layers)


def put_back(cache: Any, kept: Sequence[Any] | None) -> None:
    """Make a cache what it was when ``keep`` was called."""
    if cache is not None and kept is not None:
        cache.layers = [copy.copy(layer) for layer in kept]


def check(cache: Any) -> None:
    """Raises ``AutoError`` naming the kind of cache or layer, if it is not a ``DynamicCache`` of plain layers."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])} - {"DynamicLayer"}
    name = type(cache).__name__
    if name != "DynamicCache" or kinds:
        what = f"{name} with {', '.join(sorted(kinds))}" if kinds else name
        raise AutoError(
            f'task("auto") was given a {what}; accepted is a DynamicCache of full attention layers, whose state before '
            "a pass can be put back. Give that cache, or name the task's class instead of auto."
        )


def merge(cache: Any, other: Any, rows: torch.Tensor) -> None:
    """Put the rows of ``other``, in its order, where ``rows`` [N] says into ``cache``; both hold as many tokens."""
    if cache is None or other is None:
        return
    for layer, its in zip(cache.layers, other.layers, strict=True):
        layer.keys = layer.keys.index_copy(0, rows.to(layer.keys.device), its.keys)
        layer.values = layer.values.index_copy(0, rows.to(layer.values.device), its.values)
