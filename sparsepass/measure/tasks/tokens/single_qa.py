"""One fact among many: its name is given, its value is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsepass.measure.tasks.base import Metric
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.measure.tasks.tokens.drawing import Drawn, Random, TokenTask, marker
from sparsepass.measure.tasks.tokens.facts import facts, facts_at
from sparsepass.measure.tasks.tokens.vocabulary import ASK_ONE
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass


@dataclass(frozen=True)
class OneFact(TokenTask):
    """``ASK name -> value``: the needle among 127 others from 1K tokens on."""

    name: str = "token_needle"
    task_class: TaskClass = TaskClass.SINGLE_QA
    scope: Level = "low"
    dispersion: Level = "low"
    metric: Metric = exact_match
    prompt_size: int = 2
    answer_size: int = 1

    def items(self, length: int) -> int:
        return facts_at(length)

    def fill(
        self, context: int, items: int, questions: int, kept: torch.Tensor, template: torch.Tensor, random: Random
    ) -> Drawn:
        tokens, names, values = facts(context, items, kept, random)
        asked = random.asked(kept, items, questions)
        prompts = torch.cat([marker(ASK_ONE, template, questions), names.gather(1, asked)[..., None]], dim=-1)
        return Drawn(tokens, prompts, values.gather(1, asked)[..., None])
