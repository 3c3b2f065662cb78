"""What a calibration found, as a whole: cells by class and length, the policy they make, the one budget for the mix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsepass.calibrate.cell import Cell, Goal, Status
from sparsepass.calibrate.ladder import with_density
from sparsepass.policy import Policy
from sparsepass.policy_rules import Ranges, Rule
from sparsepass.types import Budget, TaskClass

Floors = Mapping[tuple[TaskClass, int], Mapping[int, float]]
"""By class and measured length: the least share of the attention mass that each layer has to keep."""

CLASSES = tuple(task for task in TaskClass if task not in (TaskClass.DENSE, TaskClass.UNKNOWN))


@dataclass(frozen=True, slots=True)
class Safe:
    """What a class, or a mix of classes, may run under at some length: a budget, and the share that it computes."""

    budget: Budget | None
    density: float


DENSE = Safe(None, 1.0)


@dataclass(frozen=True)
class Calibration:
    """All cells of one calibration. ``weights``: of the mix, by task; ``ladders``: the budgets tried, by method."""

    goal: Goal
    cells: tuple[Cell, ...]
    weights: Mapping[str, float]
    ladders: Mapping[str, Sequence[Budget]]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Model, dtype, versions: the fingerprint of what was measured."""
    complete: bool = True
    """False where the time limit ended it."""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(sorted({cell.length for cell in self.cells}))

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def classes(self) -> tuple[TaskClass, ...]:
        return tuple(task for task in TaskClass if any(cell.task_class is task for cell in self.cells))

    def best(self, task: str, length: int) -> Cell | None:
        """Of a task's cells at a length, over the methods, the verified one that computes least; else any of them."""
        cells = [cell for cell in self.cells if (cell.task, cell.length) == (task, length)]
        safe = [cell for cell in cells if cell.status is Status.SAFE]
        return min(safe, key=lambda cell: cell.density, default=cells[0] if cells else None)

    def safe(self, tasks: Sequence[TaskClass], length: int) -> Safe:
        """The budget at which every task of these classes was verified at a length: of one method, the least dense."""
        cells = [cell for cell in self.cells if cell.task_class in tasks and cell.length == length]
        names = {cell.task for cell in cells}
        if {cell.task_class for cell in cells} != set(tasks):
            return DENSE
        return self._shared(cells, [(name, length) for name in names])

    def fixed(self) -> Safe:
        """The one number: the sparsest single budget that was verified, or a sparser one was, in every cell of the mix.

        Its density is the mean over the mix of what that budget, or the sparser one verified, computes.
        """
        cells = [cell for cell in self.cells if self.weights.get(cell.task, 0.0) > 0]
        return self._shared(cells, list({(cell.task, cell.length) for cell in cells}))

    def mean_density(self) -> float:
        """Share computed by the policy, mean over the mix's tasks by weight and the lengths; dense cells count 1."""
        total = weight = 0.0
        for name, share in self.weights.items():
            for length in self.lengths:
                cell = self.best(name, length)
                if cell is not None:
                    total += share * self.safe([cell.task_class], length).density
                    weight += share
        return total / weight if weight else 1.0

    def policy(self, name: str, floors: Floors | None = None) -> Policy:
        """Rules per class and length. A class without a hint gets what is safe for every class that was measured.

        At a measured length its own budget holds; between two of them the denser of both, if both have one. Other
        lengths, and what was not shown to be safe, stay dense. ``floors``: what each layer has to keep under a monitor;
        of a stretch the lowest of its measured lengths holds.
        """
        rules: list[Rule] = []
        for task in (*self.classes, TaskClass.UNKNOWN):
            if task is TaskClass.UNKNOWN and not set(CLASSES) <= set(self.classes):
                continue  # a class that was not measured may be the request's
            of = [one for one in self.classes if one is not TaskClass.UNKNOWN] if task is TaskClass.UNKNOWN else [task]
            found = [(length, self.safe(of, length)) for length in self.lengths]
            for low, high, safe in _spans(found):
                if safe.budget is None:
                    continue
                budget = with_density(safe.budget, safe.density)
                rules.append(Rule(task, budget, above=low - 1, up_to=high))
                inside = [length for length in self.lengths if low <= length <= high + 1]
                for layers, floor in _by_floor([(floors or {}).get((task, length), {}) for length in inside]):
                    rules.append(Rule(task, budget, low - 1, high, layers=layers, floor=floor))
        return Policy(name, tuple(rules), description=self._description(), calibrated=dict(self.about) or None)

    def _description(self) -> str:
        goal = self.goal
        return (
            f"Calibrated on {', '.join(self.tasks)}: at most {goal.loss:.1%} of the dense accuracy lost, "
            f"{goal.confidence:.0%} sure for each task and length, verified on held-out samples."
        )

    def _shared(self, cells: Sequence[Cell], wanted: Sequence[tuple[str, int]]) -> Safe:
        """Of each method that is safe in all wanted (task, length): the densest of its budgets there. The cheapest."""
        offers = []
        for method in dict.fromkeys(cell.method for cell in cells):
            mine = {(c.task, c.length): c for c in cells if c.method == method and c.status is Status.SAFE}
            if not set(wanted) <= set(mine):
                continue
            chosen = [mine[place] for place in wanted]
            steps = list(self.ladders[method])
            budget = max((cell.budget for cell in chosen if cell.budget is not None), key=steps.index)
            shared = [max(cell.density, _density_at(cell, budget)) for cell in chosen]
            offers.append(Safe(budget, sum(shared) / len(shared)))
        return min(offers, key=lambda safe: safe.density, default=DENSE)


def _density_at(cell: Cell, budget: Budget) -> float:
    """What a budget computed at a cell, if it was tried there; the least that any denser budget can else."""
    return next((trial.density for trial in cell.trials if trial.budget == budget), _dial_density(budget))


def _dial_density(budget: Budget) -> float:
    return float(budget.params.get("density", 0.0))


def _spans(found: Sequence[tuple[int, Safe]]) -> list[tuple[int, int, Safe]]:
    """(first length, last length, budget) of each stretch that has a budget."""
    spans: list[tuple[int, int, Safe]] = []
    for (length, safe), after in zip(found, [*found[1:], None], strict=True):
        spans.append((length, length, safe))
        if after is not None and after[0] > length + 1:
            between = DENSE if None in (safe.budget, after[1].budget) else max(safe, after[1], key=lambda s: s.density)
            spans.append((length + 1, after[0] - 1, between))
    merged: list[tuple[int, int, Safe]] = []
    for low, high, safe in spans:
        if safe.budget is None:
            continue
        if merged and merged[-1][2].budget == safe.budget and merged[-1][1] + 1 == low:
            merged[-1] = (merged[-1][0], high, max(merged[-1][2], safe, key=lambda s: s.density))
        else:
            merged.append((low, high, safe))
    return merged


def _by_floor(found: Sequence[Mapping[int, float]]) -> list[tuple[Ranges, float]]:
    """Layers that share a floor, rounded down to hundredths; of several lengths the lowest floor of a layer holds."""
    layers: dict[float, list[int]] = {}
    for layer in sorted(set().union(*found)):
        least = min(floors[layer] for floors in found if layer in floors)
        if (floor := math.floor(least * 100) / 100) > 0:
            layers.setdefault(floor, []).append(layer)
    return [(Ranges(tuple((layer, layer) for layer in held)), floor) for floor, held in sorted(layers.items())]
