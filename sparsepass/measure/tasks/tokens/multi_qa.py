"""Several facts at once: four names are given, their four values are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsepass.measure.tasks.base import Metric
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.measure.tasks.tokens.drawing import IGNORED, Drawn, Random, TokenTask, marker
from sparsepass.measure.tasks.tokens.facts import facts, facts_at
from sparsepass.measure.tasks.tokens.vocabulary import ANSWER, ASK_MANY
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

AT_ONCE = 4


@dataclass(frozen=True)
class FourFacts(TokenTask):
    """``ASK name name name name ANSWER -> value value value value``.

    Training also supervises each name of the prompt with its value, so that the facts are looked up while the prompt
    is read.
    """

    name: str = "token_needles"
    task_class: TaskClass = TaskClass.MULTI_QA
    scope: Level = "low"
    dispersion: Level = "low"
    metric: Metric = exact_match
    prompt_size: int = AT_ONCE + 2
    answer_size: int = AT_ONCE

    def items(self, length: int) -> int:
        return facts_at(length)

    def fill(
        self, context: int, items: int, questions: int, kept: torch.Tensor, template: torch.Tensor, random: Random
    ) -> Drawn:
        tokens, names, values = facts(context, items, kept, random)
        asked = random.asked(kept, items, questions * AT_ONCE)
        shape = (len(kept), questions, AT_ONCE)
        answers = values.gather(1, asked).view(shape)
        ask = marker(ASK_MANY, template, questions)
        prompts = torch.cat([ask, names.gather(1, asked).view(shape), torch.full_like(ask, ANSWER)], dim=-1)
        unknown = torch.full_like(ask, IGNORED)
        return Drawn(tokens, prompts, answers, prompt_targets=torch.cat([unknown, answers, unknown], dim=-1))
