"""Contexts of facts, a name and its value side by side, scattered in filler."""

from __future__ import annotations

import torch

from sparsepass.measure.tasks.tokens.drawing import Random, put
from sparsepass.measure.tasks.tokens.vocabulary import NAMES, VALUES


def facts_at(length: int) -> int:
    """Facts in a context: one per 8 tokens, at most 128 (so 127 distract, and a guess among them is right in 1%)."""
    return min(128, length // 8)


def facts(
    context: int, count: int, kept: torch.Tensor, random: Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contexts [len(kept), context] with ``kept`` of ``count`` facts, their names and values [len(kept), count]."""
    rows = len(kept)
    names = NAMES.start + random.subset(count, len(NAMES), rows)
    values = VALUES.start + random.subset(count, len(VALUES), rows)
    tokens = random.filler(rows, context)
    order = random.subset(count, count, rows)
    starts = random.places(rows, context, count, 2).gather(1, order)
    present = torch.arange(count, device=kept.device) < kept[:, None]
    put(tokens, starts, torch.stack([names, values], dim=-1), present)
    return tokens, names, values
