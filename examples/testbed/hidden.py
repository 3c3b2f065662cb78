"""How sparse the last layer's state is where an answer begins, against how hard the question is.

The state is what the final norm is given at a question's last token: the answer's first token is read from it. Three
measures of a vector x of d entries: Hoyer's (0 for equal sizes, 1 for a single entry; Hoyer 2004), the participation
ratio ``(sum x^2)^2 / (d sum x^4)`` (the share of entries that carry it), and the share of entries under a tenth of the
root mean square. Dense attention throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from examples.testbed.evaluate import HELD_OUT
from sparsepass.measure.auto.probe import hoyer
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from sparsepass.measure.tasks.tokens.drawing import Random
from sparsepass.measure.tasks.tokens.multi_hop import HOPS

MEASURES = ("hoyer", "participation", "small")
AT = 4096
"""Tokens where the length is not what varies."""


@dataclass(frozen=True)
class Point:
    """Questions of one difficulty: ``axis`` is ``length``, ``items`` (facts, chains or kinds) or ``hops``."""

    task: TokenTask
    axis: str
    value: int
    length: int
    items: int
    hops: int = HOPS


def points(lengths: Sequence[int]) -> Iterator[Point]:
    at = AT if AT in lengths else lengths[-1]
    for task in TOKEN_TASKS:
        for length in lengths:
            yield Point(task, "length", length, length, task.items(length))
        most = task.items(at)
        for items in sorted({max(1, most >> step) for step in range(5)}):
            yield Point(task, "items", items, at, items)
        if task.name == "token_chains":
            for hops in range(1, HOPS + 1):
                yield Point(task, "hops", hops, at, most, hops)


def drawn(point: Point, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [count, S] up to the question's last one, and the answer's first token [count]."""
    task, device = point.task, generator.device
    context = point.length - task.prompt_size - task.answer_size
    template = torch.full((count,), task.template, device=device)
    kept = torch.full((count,), point.items, device=device)
    made = task.fill(context, point.items, 1, kept, template, Random(generator))
    prompt, answer = made.prompts[:, 0], made.answers[:, 0]
    if point.axis == "hops" and point.hops < HOPS:  # the answer names the chain's value, then its names in order
        prompt = torch.cat([prompt[:, :-1], answer[:, point.hops : point.hops + 1]], -1)
    return torch.cat([made.context, prompt], -1), answer[:, 0]


def sparsity(state: torch.Tensor) -> dict[str, torch.Tensor]:
    """The measures of vectors [N, d], each float64 [N]."""
    x = state.double()
    size, square = x.shape[-1], x.square()
    participation = square.sum(-1).square() / (size * square.square().sum(-1))
    small = (x.abs() < 0.1 * square.mean(-1, keepdim=True).sqrt()).double().mean(-1)
    return {"hoyer": hoyer(x), "participation": participation, "small": small}


@torch.no_grad()
def measure(model: Any, samples: int, together: int, lengths: Sequence[int]) -> dict[str, Any]:
    """The points, and per class and axis the slope of each measure per doubling (per hop) with a 95% interval."""
    device, caught = next(model.parameters()).device, []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: caught.append(given[0][:, -1].float()))
    found: list[dict[str, Any]] = []
    every: dict[tuple[str, str], list[tuple[float, dict[str, torch.Tensor]]]] = {}
    try:
        for point in points(lengths):
            count = max(2, min(samples, 4 * together // point.length))
            rows, right = max(1, together // point.length), 0
            generator = torch.Generator(device).manual_seed(HELD_OUT + 77 + point.length)
            caught.clear()
            for start in range(0, count, rows):
                tokens, answer = drawn(point, min(rows, count - start), generator)
                best = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
                right += int((best == answer).sum())
            values = {name: one.cpu() for name, one in sparsity(torch.cat(caught)).items()}
            kind = str(point.task.task_class)
            entry = {"class": kind, "axis": point.axis, "value": point.value, "questions": count}
            means = {name: [float(one.mean()), float(one.std() / math.sqrt(count))] for name, one in values.items()}
            found.append({**entry, "first_token_right": right / count, **means})
            hard = float(point.value) if point.axis == "hops" else math.log2(point.value)
            every.setdefault((kind, point.axis), []).append((hard, values))
    finally:
        hook.remove()
    slopes = [
        {"class": kind, "axis": axis} | {name: slope(parts, name) for name in MEASURES}
        for (kind, axis), parts in every.items()
        if len(parts) > 1
    ]
    return {"points": found, "slopes": slopes}


def slope(parts: Sequence[tuple[float, dict[str, torch.Tensor]]], name: str) -> list[float]:
    """Of the least-squares line through all samples, with the bounds of a bootstrap within each point (500 draws)."""
    generator = torch.Generator().manual_seed(0)

    def line(drawn: Sequence[torch.Tensor]) -> torch.Tensor:
        """Slopes of the means [..., points], each point weighted alike."""
        means = torch.stack(list(drawn), -1)
        x = torch.tensor([hard for hard, _ in parts], dtype=torch.float64)
        x = x - x.mean()
        return (means * x).sum(-1) / x.square().sum()

    values = [one[name] for _, one in parts]
    picks = [one[torch.randint(len(one), (500, len(one)), generator=generator)].mean(-1) for one in values]
    spread = line(picks).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [float(line([one.mean() for one in values])), *spread.tolist()]


def table(states: dict[str, Any]) -> Table:
    found = Table(
        title="State where the answer begins: change per doubling (per hop); Hoyer at both ends; least right",
        title_justify="left",
    )
    for name in ("class", "harder by", *MEASURES, "from", "to", "right"):
        found.add_column(name, no_wrap=True)
    for one in states["slopes"]:
        mine = [p for p in states["points"] if (p["class"], p["axis"]) == (one["class"], one["axis"])]
        cells = [f"{mean:+.4f} ({low:+.4f} {high:+.4f})" for mean, low, high in (one[name] for name in MEASURES)]
        ends = [f"{p['hoyer'][0]:.3f}" for p in (mine[0], mine[-1])]
        found.add_row(one["class"], one["axis"], *cells, *ends, f"{min(p['first_token_right'] for p in mine):.2f}")
    return found
