"""Training batches: every task in each batch, many questions behind each context, drawn thousands at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsepass.measure.tasks.tokens import TOKEN_TASKS, Drawn, TokenTask
from sparsepass.measure.tasks.tokens.drawing import IGNORED
from sparsepass.measure.tasks.tokens.multi_hop import HOPS
from sparsepass.measure.tasks.tokens.vocabulary import PAD

PARTS = (
    "single_qa",
    "multi_qa",
    "multi_qa prompt",
    "multi_hop end",
    "multi_hop names",
    "multi_hop links 2",
    "multi_hop links 3",
    "aggregation",
)
"""What is supervised, each with a weight in the loss: answers, and for two tasks what leads to them."""


def rows_of(rows: int, shares: Sequence[float]) -> list[int]:
    """How many of ``rows`` sequences each task has: one at least, the others by ``shares``, earlier tasks first."""
    counts = [1] * len(shares)
    while sum(counts) < rows:
        lacking = [share / (count + 1) for share, count in zip(shares, counts, strict=True)]
        counts[lacking.index(max(lacking))] += 1
    return counts


@dataclass(frozen=True)
class Batches:
    """``steps`` batches: tokens [steps, B, S], and of the scored positions their place in the flattened batch, target
    (both int64 [steps, N]) and part (int64 [N])."""

    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    parts: torch.Tensor


def question_room(length: int) -> int:
    """Tokens at the end of a training sequence that hold questions with their answers."""
    return max(48, min(256, length // 4))


def draw_batches(
    steps: int, rows: int, length: int, generator: torch.Generator, shares: Sequence[float] = (1.0,) * len(TOKEN_TASKS)
) -> Batches:
    """``rows`` sequences per step, at least one per task and the others by ``shares``."""
    counts = rows_of(rows, shares)
    drawn = [_packed(task, steps * each, length, generator) for task, each in zip(TOKEN_TASKS, counts, strict=True)]
    tokens = torch.cat([one[0].view(steps, -1, length) for one in drawn], dim=1)
    places, targets, parts = [], [], []
    for number, (each, (_, where, target, part)) in enumerate(zip(counts, drawn, strict=True)):
        start = (sum(counts[:number]) + torch.arange(each, device=where.device)) * length
        places.append((where.view(steps, each, -1) + start[:, None]).flatten(1))
        targets.append(target.view(steps, -1))
        parts.append(part.repeat(each))
    return Batches(tokens, torch.cat(places, dim=1), torch.cat(targets, dim=1), torch.cat(parts))


def _packed(
    task: TokenTask, count: int, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences [count, length], places and targets [count, N] of what is scored in them, and parts [N]."""
    room, each = question_room(length), task.prompt_size + task.answer_size
    questions = min(room // each, task.items(length)) if task.name == "token_frequent" else room // each
    drawn = task.draw_many(
        count,
        length,
        generator,
        questions=questions,
        context=length - room,
        easier=True,
        mixed_templates=True,
    )
    asked = torch.cat([drawn.prompts, drawn.answers], dim=-1).flatten(1)
    rest = torch.full((count, room - asked.shape[1]), PAD, device=asked.device)
    start = length - room + each * torch.arange(questions, device=asked.device)
    scored = _scored(task, drawn, start)
    places = torch.cat([place.expand(count, -1) for place, _, _ in scored], dim=-1)
    targets = torch.cat([target for _, target, _ in scored], dim=-1)
    parts = torch.cat([part for _, _, part in scored])
    return torch.cat([drawn.context, asked, rest], dim=-1), places, targets, parts


def _scored(
    task: TokenTask, drawn: Drawn, start: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(places [1 or count, N], targets [count, N], parts [N]) of the answers and of what else is supervised."""
    device = start.device
    answer = torch.arange(task.answer_size, device=device)
    where = (start[:, None] + task.prompt_size - 1 + answer).flatten()[None]
    names = {"multi_hop": ["multi_hop end", *["multi_hop names"] * (HOPS - 1)]}
    own = names.get(task.task_class, [str(task.task_class)] * task.answer_size)
    part = torch.tensor([PARTS.index(name) for name in own], device=device).repeat(len(start))
    answers = drawn.answers.masked_fill(asked_before(drawn.prompts)[..., None], IGNORED)
    scored = [(where, answers.flatten(1), part)]
    if drawn.prompt_targets is not None:
        known = range(1, task.prompt_size - 1)  # between the marker and ANSWER
        inside = torch.tensor(list(known), device=device)
        where = (start[:, None] + inside).flatten()[None]
        target = drawn.prompt_targets[..., 1:-1].flatten(1)
        scored.append((where, target, torch.full_like(where[0], PARTS.index("multi_qa prompt"))))
    if drawn.link_places is not None and drawn.link_targets is not None:
        hops = torch.arange(drawn.link_places.shape[1], device=device) % (HOPS - 1)
        scored.append((drawn.link_places, drawn.link_targets, PARTS.index("multi_hop links 2") + hops))
    return scored


def asked_before(prompts: torch.Tensor) -> torch.Tensor:
    """Which of the prompts [B, Q, P] stands earlier in its row, bool [B, Q]: its answer could be copied from there."""
    same = (prompts[:, :, None] == prompts[:, None]).all(-1)
    return same.tril(-1).any(-1)


def scored_share(batches: Batches) -> float:
    """Mean scored targets per sequence."""
    return float((batches.targets != IGNORED).sum()) / (batches.tokens.shape[0] * batches.tokens.shape[1])
