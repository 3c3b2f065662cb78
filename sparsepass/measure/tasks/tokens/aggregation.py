"""Most frequent values: of one kind among four, the three that stand most often in the context."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsepass.measure.tasks.base import Metric
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.measure.tasks.tokens.drawing import Drawn, Random, TokenTask
from sparsepass.measure.tasks.tokens.vocabulary import ASK_TOP, FILLER, GROUPS
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

SHARES = (0.24, 0.12, 0.06)
"""Of the values of a kind, the most frequent first; the rest is spread evenly over the kind's 125 other values.

Each stands twice as often as the next, the third 13 times as often as the rest (RULER's common words: 10 times). So the
answer is clear to who reads all of the context, and unclear to who reads a small part of it.
"""
KIND = len(GROUPS[0])


@dataclass(frozen=True)
class MostFrequent(TokenTask):
    """``ASK_kind -> first second third``: every token of the context is a value that counts for one of the kinds."""

    name: str = "token_frequent"
    task_class: TaskClass = TaskClass.AGGREGATION
    scope: Level = "high"
    dispersion: Level = "low"
    metric: Metric = exact_match
    prompt_size: int = 1
    answer_size: int = len(SHARES)

    def items(self, length: int) -> int:
        return max(1, min(len(GROUPS), length // 80))

    def fill(
        self, context: int, items: int, questions: int, kept: torch.Tensor, template: torch.Tensor, random: Random
    ) -> Drawn:
        rows, device = len(kept), kept.device
        each = (context - 1) // items
        often = [max(3 - place, round(share * each)) for place, share in enumerate(SHARES)]
        repeats = torch.tensor([*often, *[0] * (KIND - len(often))], device=device)
        repeats[len(often) :] = (each - sum(often)) // (KIND - len(often))
        repeats[len(often) : len(often) + (each - sum(often)) % (KIND - len(often))] += 1
        ranks = torch.repeat_interleave(torch.arange(KIND, device=device), repeats, output_size=each)

        kinds = random.subset(items, len(GROUPS), rows)
        starts = torch.tensor([group.start for group in GROUPS], device=device)[kinds]
        ranked = starts[..., None] + random.subset(KIND, KIND, rows, items)
        values = ranked[..., ranks].flatten(1)
        rest = FILLER.start + random.integers(len(FILLER), rows, context - 1 - items * each)
        tokens = random.filler(rows, context)
        mixed = random.subset(context - 1, context - 1, rows)
        tokens[:, 1:] = torch.cat([values, rest], dim=-1).gather(1, mixed)

        asked = random.asked(torch.full_like(kept, items), items, questions)
        prompts = torch.tensor(ASK_TOP, device=device)[template[:, None], kinds.gather(1, asked)][..., None]
        answers = ranked[..., : len(SHARES)].gather(1, asked[..., None].expand(-1, -1, len(SHARES)))
        return Drawn(tokens, prompts, answers)
