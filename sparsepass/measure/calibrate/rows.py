"""Many contexts in one batch: samples of the tasks on token ids, drawn on the model's own device, a question each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsepass.measure.tasks.base import Task, stable_seed
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.measure.tasks.score import best_tokens
from sparsepass.measure.tasks.tokens import TokenTask
from sparsepass.request.hints import task as hinted
from sparsepass.types import TaskClass

TOGETHER = {"cpu": 2**11, "cuda": 2**17}
"""Tokens of a batch, by kind of device."""

DRAWN = 64
"""Samples that are drawn at once: a sample is its place in such a draw, so this number is part of what a seed means."""


class TokenRows:
    """Scores by forced answers, many contexts at a time. What a seed draws depends on the kind of device."""

    def __init__(self, model: Any, together: int = 0) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._together = together or TOGETHER.get(self._device.type, 2**17)
        self._drawn: dict[tuple[str, int, int], tuple[torch.Tensor, int]] = {}

    @staticmethod
    def takes(task: Task) -> bool:
        """Whether a task's samples can be drawn so: rows of one length, an answer that is right or wrong."""
        return isinstance(task, TokenTask) and task.metric is exact_match

    def scores(self, task: TokenTask, length: int, seeds: Sequence[int]) -> torch.Tensor:
        """Right (1.0) or wrong (0.0), float32 [len(seeds)] on the device; nothing waits for it."""
        found = []
        rows = max(2, self._together // length)
        for start in range(0, len(seeds), rows):
            some = list(seeds[start : start + rows])
            filled = some if len(some) > 1 else some * 2  # a single row would be captured as a graph of its own
            tokens, answer = self._tokens(task, length, filled)
            places = [length - answer - 1 + place for place in range(answer)]
            with torch.no_grad(), hinted(TaskClass.UNKNOWN):
                best = best_tokens(self._model, tokens, places)
            found.append((best == tokens[:, -answer:]).all(-1)[: len(some)])
        return torch.cat(found).float()

    def _tokens(self, task: TokenTask, length: int, seeds: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Rows of context, prompt and answer, int64 [len(seeds), length], and the answer's tokens."""
        draws = {number: self._draw(task, length, number) for number in dict.fromkeys(seed // DRAWN for seed in seeds)}
        rows = torch.stack([draws[seed // DRAWN][0][seed % DRAWN] for seed in seeds])
        return rows, next(iter(draws.values()))[1]

    def _draw(self, task: TokenTask, length: int, number: int) -> tuple[torch.Tensor, int]:
        key = (f"{task.name} {task.template}", length, number)
        if key not in self._drawn:
            if self._drawn and next(iter(self._drawn))[:2] != key[:2]:
                self._drawn.clear()  # another cell: its samples are done with
            seed = stable_seed(task.name, task.template, length, DRAWN, number)
            generator = torch.Generator(self._device).manual_seed(seed)
            drawn = task.draw_many(DRAWN, length, generator)
            tokens = torch.cat([drawn.context, drawn.prompts[:, 0], drawn.answers[:, 0]], dim=-1)
            self._drawn[key] = (tokens, drawn.answers.shape[-1])
        return self._drawn[key]
