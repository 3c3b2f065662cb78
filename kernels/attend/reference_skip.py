"""Eager definition of skip-softmax (BLASST, arXiv 2512.12087): slow, plain, sharing no code with the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

Order = Callable[[int, int, int], Sequence[tuple[int, bool]]]
"""Of (batch item, head, row of tiles): its tiles of keys as they are met, and whether each may be skipped."""


def skipped_reference(
    logits: Tensor, order: Order, *, rows: int, keys: int, skip: float, sinks: Tensor | None = None
) -> tuple[Tensor, float]:
    """Which pairs are skipped, bool [B, H, Sq, Skv], and how near the nearest decision was to the other answer.

    ``logits`` [B, H, Sq, Skv]: scores before the softmax, -inf where nothing is seen. Tiles are ``rows`` queries by
    ``keys`` keys. A tile is skipped if each row's greatest score in it lies more than ``-log(skip)`` under the greatest
    that the row met before, its sink included, or if the row sees nothing of it. NaN is never skipped.
    """
    batch, heads, q_len, kv_len = logits.shape
    skipped = torch.zeros(logits.shape, dtype=torch.bool)
    margin = math.inf
    for item, head, tile in product(range(batch), range(heads), range(-(-q_len // rows))):
        mine = range(tile * rows, min((tile + 1) * rows, q_len))
        first = -math.inf if sinks is None else float(sinks[head])
        met = dict.fromkeys(mine, first)
        for column, optional in order(item, head, tile):
            part = slice(column * keys, min((column + 1) * keys, kv_len))
            asks = []
            for row in mine:
                scores = logits[item, head, row, part].tolist()
                best = math.nan if any(map(math.isnan, scores)) else max(scores, default=-math.inf)
                if best != -math.inf:
                    gap = best - met[row] - math.log(skip)  # NaN and a row that met nothing ask for the tile
                    asks.append(gap if gap == gap else math.inf)
                met[row] = max(met[row], best)
            if not optional:
                continue
            margin = min(margin, abs(max(asks, default=-math.inf)))
            if not asks or max(asks) < 0:
                skipped[item, head, tile * rows : mine.stop, part] = True
    return skipped, margin
