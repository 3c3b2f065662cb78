"""Variable tracking: chains of assignments; which value does a name end at, and which names share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsepass.measure.tasks.base import Metric
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.measure.tasks.tokens.drawing import IGNORED, Drawn, Random, TokenTask, marker, put
from sparsepass.measure.tasks.tokens.vocabulary import ASK_CHAIN, LINK, NAMES, VALUES
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

HOPS = 3


@dataclass(frozen=True)
class Chains(TokenTask):
    """``LINK value a``, ``LINK a b``, ``LINK b c`` in this order among other chains; ``ASK c -> value a b``.

    The first token of the answer is three hops away from the prompt, each later one another hop. At 1K tokens and more
    there are 64 chains, so a guess is right in 1.6%. Training also supervises the second and third links with the value
    that their name ends at.
    """

    name: str = "token_chains"
    task_class: TaskClass = TaskClass.MULTI_HOP
    scope: Level = "low"
    dispersion: Level = "high"
    metric: Metric = exact_match
    prompt_size: int = 2
    answer_size: int = HOPS

    def items(self, length: int) -> int:
        return min(64, length // 16)

    def fill(
        self, context: int, items: int, questions: int, kept: torch.Tensor, template: torch.Tensor, random: Random
    ) -> Drawn:
        rows, links = len(kept), items * HOPS
        values = VALUES.start + random.subset(items, len(VALUES), rows)
        names = (NAMES.start + random.subset(links, len(NAMES), rows)).view(rows, items, HOPS)
        sources = torch.cat([values[..., None], names[..., :-1]], dim=-1)
        link = torch.tensor(LINK, device=kept.device)[template][:, None, None].expand_as(names)
        statements = torch.stack([link, sources, names], dim=-1)

        turns = random.subset(links, links, rows).view(rows, items, HOPS).sort(dim=-1).values.flatten(1)
        starts = random.places(rows, context, links, 3).gather(1, turns)
        present = (torch.arange(items, device=kept.device) < kept[:, None])[..., None].expand_as(names)
        tokens = random.filler(rows, context)
        put(tokens, starts, statements.flatten(1, 2), present.flatten(1))

        asked = random.asked(kept, items, questions)
        chain = names.gather(1, asked[..., None].expand(-1, -1, HOPS))
        prompts = torch.cat([marker(ASK_CHAIN, template, questions), chain[..., -1:]], dim=-1)
        answers = torch.cat([values.gather(1, asked)[..., None], chain[..., :-1]], dim=-1)
        ends = torch.where(present, values[..., None].expand_as(names), IGNORED)
        return Drawn(
            tokens,
            prompts,
            answers,
            link_places=(starts + 2).view_as(names)[..., 1:].flatten(1),
            link_targets=ends[..., 1:].flatten(1),
        )
