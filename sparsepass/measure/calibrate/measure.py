"""The meter of a real model: it draws samples, runs them under a budget, and remembers what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsepass.errors import SparsepassError
from sparsepass.measure.calibrate.cell import Outcome
from sparsepass.measure.calibrate.log import Key, Log
from sparsepass.measure.calibrate.rows import TokenRows
from sparsepass.measure.calibrate.setting import Setting, setting_text
from sparsepass.measure.calibrate.switch import BudgetSwitch, counted
from sparsepass.measure.tasks.base import Sample, Task
from sparsepass.measure.tasks.tokens import TokenTask
from sparsepass.types import TaskClass

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

    ``lookups`` counts what was asked, ``runs`` what had to be run. ``rows``: asks the tasks that it takes about many
    contexts at once, one question each.
    """

    def __init__(
        self,
        model: Any,
        tasks: Sequence[Task],
        switch: BudgetSwitch,
        log: Log,
        score: Scorer,
        questions: Questions,
        rows: TokenRows | None = None,
    ) -> None:
        self.model = model
        self.switch = switch
        config = getattr(model, "config", None)
        self.layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        self.heads = int(getattr(config, "num_attention_heads", 0) or 0)
        self.lookups = self.runs = 0
        self._tasks = {task.name: task for task in tasks}
        self._log = log
        self._score = score
        self._questions = questions
        self._rows = rows
        self._sample: tuple[tuple[str, int, int], Sample] | None = None
        model.compile(backend=switch, dynamic=True)  # lengths differ by a few tokens between tasks

    def run(self, task: str, length: int, seed: int, setting: Setting | None) -> Outcome:
        """The outcome of one context: its questions' scores under the setting, and what share was computed."""
        self.lookups += 1
        key = (task, length, seed, setting_text(setting))
        found = self._log.get(key)
        if found is None and self.prefetch(task, length, [seed], setting):
            found = self._log.get(key)
        if found is None:
            with self._running(setting) as ran:
                scores = self.score(self._tasks[task], length, seed, TaskClass.UNKNOWN)
            found = self._keep(key, scores, ran.density)
        return found

    def prefetch(self, task: str, length: int, seeds: Sequence[int], setting: Setting | None) -> bool:
        """Run the contexts that will be asked about soon in batches. False where they have to be asked one by one."""
        if not self._batched(task):
            return False
        keys = [(task, length, seed, setting_text(setting)) for seed in seeds]
        missing = [key for key in keys if self._log.get(key) is None]
        if not missing:
            return True
        assert self._rows is not None  # as _batched found
        drawn = self._tasks[task]
        assert isinstance(drawn, TokenTask)
        with self._running(setting) as ran:
            scores = self._rows.scores(drawn, length, [key[2] for key in missing]).tolist()
        for key, score in zip(missing, scores, strict=True):
            self._keep(key, [score], ran.density)
        return True

    def score(self, task: Task, length: int, seed: int, hint: TaskClass) -> Sequence[float]:
        """The scores of a sample under whatever the model is compiled with and a hint; not remembered."""
        return self._score(self.model, self._drawn(task.name, length, seed), task_hint=hint)

    def _batched(self, task: str) -> bool:
        return self._rows is not None and self._rows.takes(self._tasks[task])

    def _running(self, setting: Setting | None) -> _Running:
        self.switch.active = setting
        return _Running(type(self.model).__name__, setting)

    def _keep(self, key: Key, scores: Sequence[float], density: float) -> Outcome:
        self.runs += 1
        found = Outcome(tuple(float(score) for score in scores), density)
        self._log.put(key, found)
        return found

    def _drawn(self, task: str, length: int, seed: int) -> Sample:
        """The sample; the last one is kept, as several budgets answer it one after the other."""
        key = (task, length, seed)
        if self._sample is None or self._sample[0] != key:
            count = self._questions if isinstance(self._questions, int) else self._questions(length)
            self._sample = (key, distinct(self._tasks[task].draw(length, seed, count)))
        return self._sample[1]


class _Running:
    """What is computed while something runs: the share of the visible blocks. Raises ``MeasureError`` if nothing is."""

    def __init__(self, model: str, setting: Setting | None) -> None:
        self._model, self._setting = model, setting
        self.density = 1.0

    def __enter__(self) -> _Running:
        self._before = counted()
        self._gradients = torch.no_grad()
        self._gradients.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._gradients.__exit__(kind, error, trace)
        if error is not None or self._setting is None:
            return
        ran = counted() - self._before
        if not ran.launches:
            raise MeasureError(
                f"{self._model} ran no sparse attention under {setting_text(self._setting)}: none of its attention was "
                "rewritten. sparsepass explain says why."
            )
        self.density = 1.0 if ran.density is None else min(1.0, ran.density)
