"""What a score is worth: which requests it would run again, what that costs, and what is lost all the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sparsepass.measure.auto.fit import Rows
from sparsepass.measure.auto.records import Place
from sparsepass.measure.calibrate.bounds import upper_bound


@dataclass(frozen=True)
class Cell:
    """One place judged. ``questions``: that dense answers right. ``again``: share of them that ran again. ``missed``:
    lost after all. ``upper``: bound of the missed share. ``cost``: share of dense attention, probe included."""

    place: Place
    questions: int
    again: float
    missed: int
    upper: float
    cost: float

    @property
    def kept(self) -> float:
        return 1.0 - self.missed / self.questions if self.questions else 1.0


@dataclass(frozen=True)
class Verdict:
    """All cells, weighted equally."""

    cells: tuple[Cell, ...]

    @property
    def cost(self) -> float:
        return sum(cell.cost for cell in self.cells) / len(self.cells)

    @property
    def kept(self) -> float:
        return sum(cell.kept for cell in self.cells) / len(self.cells)

    @property
    def worst(self) -> Cell:
        return min(self.cells, key=lambda cell: cell.kept)

    @property
    def tasks(self) -> dict[str, tuple[int, int]]:
        """Missed, and questions, of each task over all its cells."""
        found: dict[str, tuple[int, int]] = {}
        for cell in self.cells:
            missed, count = found.get(cell.place.task, (0, 0))
            found[cell.place.task] = (missed + cell.missed, count + cell.questions)
        return found

    @property
    def least_kept(self) -> float:
        """Of the dense accuracy, by the task that keeps least."""
        return min(1 - missed / count for missed, count in self.tasks.values() if count)


def judge(
    rows: Rows,
    score: torch.Tensor,
    threshold: float,
    probe_cost: Mapping[int, float],
    error: float,
    untried: Collection[int] = (),
) -> Verdict:
    """Rows whose score is ``threshold`` or more run again. ``probe_cost``: share by length. ``untried``: lengths at
    which nothing is tried, and all runs at once under what it would run again under."""
    again = score >= threshold
    direct = torch.tensor([place.length in untried for place in rows.cells])[rows.cell]
    lost = rows.missed(again | direct)
    cells = []
    for number, place in enumerate(rows.cells):
        here = rows.cell == number
        count = int(here.sum())
        missed = int((here & lost).sum())
        if place.length in untried:
            share, cost = 0.0, rows.then[number]
        else:
            share = float(again[here].double().mean()) if count else 0.0
            cost = place.density + probe_cost.get(place.length, 0.0) + share * rows.then[number]
        cells.append(Cell(place, count, share, missed, upper_bound(missed, count, error), cost))
    return Verdict(tuple(cells))


def not_worth_trying(rows: Rows, score: torch.Tensor, threshold: float, probe_cost: Mapping[int, float]) -> set[int]:
    """Lengths at which trying costs as much as running all at once under what would run again; and shorter ones."""
    verdict = judge(rows, score, threshold, probe_cost, 0.5)
    costs: dict[int, list[tuple[float, float]]] = {}
    for number, cell in enumerate(verdict.cells):
        if not cell.questions:
            continue  # of another budget, or nothing that dense answers
        costs.setdefault(cell.place.length, []).append((cell.cost, rows.then[number]))
    dear = [length for length, pairs in costs.items() if sum(one for one, _ in pairs) >= sum(two for _, two in pairs)]
    return {length for length in costs if length <= max(dear, default=0)}


def known_before(rows: Rows, score: torch.Tensor, threshold: float, error: float) -> Verdict:
    """As ``judge``, for a score that is known before anything ran: no cheap pass for what would run again."""
    ran = judge(rows, score, threshold, {}, error)
    cells = [
        replace(cell, cost=cell.again * rows.then[number] + (1 - cell.again) * cell.place.density)
        for number, cell in enumerate(ran.cells)
    ]
    return Verdict(tuple(cells))


def auc(score: torch.Tensor, lost: torch.Tensor) -> float:
    """The chance that a lost row scores above a kept one, ties half; NaN where there are none of either."""
    if not lost.any() or lost.all():
        return float("nan")
    order = score.double().sort()
    _, inverse, counts = torch.unique_consecutive(order.values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    rank = (ends - (counts - 1) / 2.0)[inverse]
    ranks = torch.empty_like(order.values)
    ranks[order.indices] = rank.double()
    bad = int(lost.sum())
    good = len(lost) - bad
    return float((ranks[lost].sum() - bad * (bad + 1) / 2) / (bad * good))


def resampled(rows: Rows, generator: torch.Generator) -> torch.Tensor:
    """Numbers of rows drawn anew, with replacement, within each cell."""
    picked = []
    for cell in range(len(rows.cells)):
        here = (rows.cell == cell).nonzero().squeeze(1)
        if len(here):
            picked.append(here[torch.randint(len(here), (len(here),), generator=generator)])
    return torch.cat(picked)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Percentiles, both NaN for nothing."""
    held = torch.tensor([value for value in values if value == value], dtype=torch.float64)
    if not len(held):
        return float("nan"), float("nan")
    side = (1 - confidence) / 2
    return float(held.quantile(side)), float(held.quantile(1 - side))
