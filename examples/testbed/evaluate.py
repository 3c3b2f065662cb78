"""Accuracy on held-out samples: the whole answer right, one question behind each context, at exact lengths.

The answer's tokens are given as input and each is compared with the model's most likely one: all are right exactly
where greedy generation gives the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask

HELD_OUT = 7_000_000_000
"""Seeds from here on; training's are small numbers."""

Predict = Callable[[torch.Tensor, int], torch.Tensor]
"""``predict(tokens [B, S], last)``: the most likely next token [B, last] at positions ``S - last - 1`` to ``S - 2``,
those that give the last tokens."""


@torch.no_grad()
def accuracy(
    predict: Predict, task: TokenTask, length: int, samples: int, device: torch.device, rows: int
) -> tuple[float, float]:
    """Share of answers that are right as a whole, and share whose first token is. ``rows`` samples at a time."""
    generator = torch.Generator(device).manual_seed(HELD_OUT + length)
    whole = first = 0
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        drawn = task.draw_many(count, length, generator)
        tokens = torch.cat([drawn.context, drawn.prompts[:, 0], drawn.answers[:, 0]], dim=-1)
        right = predict(tokens, task.answer_size) == drawn.answers[:, 0]
        whole += int(right.all(-1).sum())
        first += int(right[:, 0].sum())
    return whole / samples, first / samples


def table(
    predict: Predict, lengths: Iterable[int], budget: int, device: torch.device, together: int
) -> dict[str, dict[int, tuple[float, float]]]:
    """Per class and length: ``accuracy`` over ``budget`` tokens (16 to 1024 samples), ``together`` tokens at a time."""
    return {
        str(task.task_class): {
            length: accuracy(
                predict, task, length, max(16, min(1024, budget // length)), device, max(1, together // length)
            )
            for length in lengths
        }
        for task in TOKEN_TASKS
    }
