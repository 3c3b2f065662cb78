"""Drawing many samples of a token-level task at once, on any device.

Training draws thousands at a time on the GPU, evaluation one at a time on the CPU: by the same code, so from the same
distribution.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from sparsepass.measure.tasks.base import Metric, Question, Sample, TaskError, stable_seed
from sparsepass.measure.tasks.tokens.vocabulary import BOS, FILLER, TEMPLATES
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

SHORTEST = 96
"""Tokens; below that the contexts have no room for their statements."""

GAP = 256
"""Tokens of filler that a sample brings along for between its questions."""

IGNORED = -100
"""A target that is not scored (``ignore_index`` of PyTorch's cross entropy)."""


@dataclass(frozen=True)
class Drawn:
    """``count`` samples, all int64 on the generator's device.

    context [count, C]; prompts [count, Q, P]; answers [count, Q, A]. Training can supervise more than answers:
    ``prompt_targets`` [count, Q, P] says what could be known at a prompt's token, ``link_targets`` [count, K] what
    could be known at position ``link_places`` [count, K] of the context (``IGNORED``: nothing).
    """

    context: torch.Tensor
    prompts: torch.Tensor
    answers: torch.Tensor
    prompt_targets: torch.Tensor | None = None
    link_places: torch.Tensor | None = None
    link_targets: torch.Tensor | None = None


@dataclass(frozen=True)
class TokenTask(ABC):
    """A task on the vocabulary of ``measure/tasks/tokens/vocabulary.py``: prompts of ``prompt_size`` tokens, answers of
    ``answer_size``."""

    name: str
    task_class: TaskClass
    scope: Level
    dispersion: Level
    metric: Metric
    prompt_size: int
    answer_size: int
    template: int = 0
    """Which marker tokens ``draw`` uses, 0 or 1: to test on a form of question that a calibration has not seen."""

    @abstractmethod
    def items(self, length: int) -> int:
        """How many facts, chains or groups a context of this length has."""

    @abstractmethod
    def fill(
        self, context: int, items: int, questions: int, kept: torch.Tensor, template: torch.Tensor, random: Random
    ) -> Drawn:
        """The samples: ``kept`` [count] of the ``items`` in each, by ``template`` [count]."""

    def draw_many(
        self,
        count: int,
        length: int,
        generator: torch.Generator,
        *,
        questions: int = 1,
        context: int | None = None,
        easier: bool = False,
        mixed_templates: bool = False,
    ) -> Drawn:
        """``count`` samples as difficult as one of ``length`` tokens.

        ``context`` is the size of the context if not what one question leaves. ``easier``: each sample has between a
        quarter and all of the items. ``mixed_templates``: each sample has a template at random. Raises ``TaskError``.
        """
        if length < SHORTEST or questions < 1:
            raise TaskError(
                f"{self.name}: {questions} questions at {length} tokens; accepted are 1 or more questions and "
                f"{SHORTEST} tokens or more."
            )
        dice = Random(generator)
        items = self.items(length)
        context = length - self.prompt_size - self.answer_size if context is None else context
        kept = torch.full((count,), items, device=generator.device)
        if easier:
            fewest = min(items, max(4, items // 4))
            kept = fewest + dice.integers(items - fewest + 1, count)
        template = torch.full((count,), self.template, device=generator.device)
        if mixed_templates:
            template = dice.integers(TEMPLATES, count)
        return self.fill(context, items, questions, kept, template, dice)

    def draw(self, length: int, seed: int, questions: int = 1) -> Sample:
        """The sample of this length and seed; each question's context, prompt and answer have ``length`` tokens."""
        generator = torch.Generator().manual_seed(stable_seed(self.name, self.template, length, seed))
        drawn = self.draw_many(1, length, generator, questions=questions)
        asked = zip(drawn.prompts[0].tolist(), drawn.answers[0].tolist(), strict=True)
        return Sample(
            context=tuple(drawn.context[0].tolist()),
            questions=tuple(Question(tuple(prompt), tuple(answer)) for prompt, answer in asked),
            task=self.name,
            length=length,
            seed=seed,
            metric=self.metric,
            gap=tuple(random.Random(seed).choices(FILLER, k=GAP)),
        )


@dataclass(frozen=True)
class Random:
    """Random integers, subsets and orders, vectorized, from one generator on its device."""

    generator: torch.Generator

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.generator.device)

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        """int64 from 0 to ``below - 1``."""
        return torch.randint(below, shape, generator=self.generator, device=self.generator.device)

    def subset(self, size: int, of: int, *shape: int) -> torch.Tensor:
        """[*shape, size] different integers below ``of``, in random order."""
        return self.uniform(*shape, of).argsort(dim=-1)[..., :size]

    def filler(self, count: int, size: int) -> torch.Tensor:
        """[count, size] tokens that say nothing, after a BOS."""
        tokens = FILLER.start + self.integers(len(FILLER), count, size)
        tokens[:, 0] = BOS
        return tokens

    def places(self, count: int, context: int, statements: int, width: int) -> torch.Tensor:
        """[count, statements] ascending starts of statements of ``width`` tokens, evenly random, none overlapping."""
        units = context - 1 - statements * (width - 1)
        if units < statements:
            raise TaskError(f"{statements} statements of {width} tokens do not fit {context} tokens.")
        chosen = self.subset(statements, units, count).sort(dim=-1).values
        return 1 + chosen + torch.arange(statements, device=chosen.device) * (width - 1)

    def asked(self, kept: torch.Tensor, items: int, questions: int) -> torch.Tensor:
        """[count, questions] numbers of kept items in random order; they repeat only after all kept were asked."""
        numbers = torch.arange(items, device=kept.device)
        order = (self.uniform(len(kept), items) + (numbers >= kept[:, None])).argsort(dim=-1)
        turn = torch.arange(questions, device=kept.device) % kept[:, None]
        return order.gather(1, turn)


def put(context: torch.Tensor, starts: torch.Tensor, statements: torch.Tensor, kept: torch.Tensor) -> None:
    """Write statements [count, n, width] at ``starts`` [count, n] into the context, if ``kept`` [count, n]."""
    where = starts[..., None] + torch.arange(statements.shape[-1], device=starts.device)
    where = where.flatten(1)
    old = context.gather(1, where).view_as(statements)
    context.scatter_(1, where, torch.where(kept[..., None], statements, old).flatten(1))


def marker(ids: tuple[int, ...], template: torch.Tensor, questions: int) -> torch.Tensor:
    """[count, questions, 1]: the marker of each sample's template."""
    table = torch.tensor(ids, device=template.device)
    return table[template][:, None, None].expand(-1, questions, 1)
