"""The meter of a real model: it draws samples, runs them under a budget, and remembers what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsepass import counters
from sparsepass.calibrate.cell import Outcome
from sparsepass.calibrate.log import Log
from sparsepass.calibrate.switch import BudgetSwitch
from sparsepass.errors import SparsepassError
from sparsepass.methods import encode_budget
from sparsepass.tasks.base import Sample, Task
from sparsepass.types import Budget, TaskClass

Scorer = Callable[..., Sequence[float]]
"""``scorer(model, sample, task_hint=...)``: one score per question of the sample, 0 to 1."""


Questions = int | Callable[[int], int]
"""How many to ask about a context: a number, or one for a length in tokens."""


class MeasureError(SparsepassError, RuntimeError):
    """A model whose attention cannot be calibrated; the message says why."""


def distinct(sample: Sample) -> Sample:
    """The sample with each question once: a context may have fewer than were asked for, and one asked again tells
    nothing new."""
    return replace(sample, questions=tuple(dict.fromkeys(sample.questions)))


class ModelMeter:
    """Runs one model, which it compiles in place with a ``BudgetSwitch``. Nothing is run twice.

    ``lookups`` counts what was asked, ``runs`` what had to be run.
    """

    def __init__(
        self, model: Any, tasks: Sequence[Task], switch: BudgetSwitch, log: Log, score: Scorer, questions: Questions
    ) -> None:
        self.model = model
        self.switch = switch
        self.lookups = self.runs = 0
        self._tasks = {task.name: task for task in tasks}
        self._log = log
        self._score = score
        self._questions = questions
        self._sample: tuple[tuple[str, int, int], Sample] | None = None
        model.compile(backend=switch, dynamic=True)  # lengths differ by a few tokens between tasks

    def run(self, task: str, length: int, seed: int, budget: Budget | None) -> Outcome:
        """The outcome of one context: its questions' scores under the budget, and what share was computed."""
        self.lookups += 1
        key = (task, length, seed, "dense" if budget is None else encode_budget(budget))
        found = self._log.get(key)
        if found is None:
            found = self._measure(task, length, seed, budget)
            self._log.put(key, found)
        return found

    def _measure(self, task: str, length: int, seed: int, budget: Budget | None) -> Outcome:
        self.runs += 1
        self.switch.active = budget
        before = counters.total()
        with torch.no_grad():
            scores = self.score(self._tasks[task], length, seed, TaskClass.UNKNOWN)
        ran = counters.total() - before
        if budget is not None and not ran.launches:
            raise MeasureError(
                f"{type(self.model).__name__} ran no sparse attention under {budget}: none of its attention was "
                "rewritten. sparsepass explain says why."
            )
        density = 1.0 if budget is None or ran.density is None else min(1.0, ran.density)
        return Outcome(tuple(float(score) for score in scores), density)

    def score(self, task: Task, length: int, seed: int, hint: TaskClass) -> Sequence[float]:
        """The scores of a sample under whatever the model is compiled with and a hint; not remembered."""
        return self._score(self.model, self._drawn(task.name, length, seed), task_hint=hint)

    def _drawn(self, task: str, length: int, seed: int) -> Sample:
        """The sample; the last one is kept, as several budgets answer it one after the other."""
        key = (task, length, seed)
        if self._sample is None or self._sample[0] != key:
            count = self._questions if isinstance(self._questions, int) else self._questions(length)
            self._sample = (key, distinct(self._tasks[task].draw(length, seed, count)))
        return self._sample[1]
