"""What a calibration found, as a whole: cells by class and length, the policy they make, the one budget for the mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsepass.measure.calibrate.cell import Cell, Goal, Status
from sparsepass.measure.calibrate.ladder import with_density
from sparsepass.measure.calibrate.setting import Layered, Setting, layer_budget, simplest
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.types import Budget, TaskClass

Floors = Mapping[tuple[TaskClass, int], Mapping[int, float]]
"""By class and measured length: the least share of the attention mass that each layer has to keep."""

CLASSES = tuple(task for task in TaskClass if task not in (TaskClass.DENSE, TaskClass.UNKNOWN))


@dataclass(frozen=True, slots=True)
class Safe:
    """What a class, or a mix of classes, may run under at some length: a budget, and the share that it computes."""

    budget: Setting | None
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
        wanted = [place for place in dict.fromkeys((cell.task, cell.length) for cell in cells) if self._counts(*place)]
        return self._shared([cell for cell in cells if not isinstance(cell.budget, Layered)], wanted)

    def mean_density(self) -> float:
        """Share computed by the policy, mean over the mix's tasks by weight and the lengths; dense cells count 1.

        Where the dense model fails there is nothing to keep, and the cell does not count.
        """
        total = weight = 0.0
        for name, share in self.weights.items():
            for length in self.lengths:
                cell = self.best(name, length)
                if cell is not None and cell.status is not Status.UNMEASURED:
                    total += share * self.safe([cell.task_class], length).density
                    weight += share
        return total / weight if weight else 1.0

    def _counts(self, task: str, length: int) -> bool:
        best = self.best(task, length)
        return best is not None and best.status is not Status.UNMEASURED

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
            for low, high, safe in _spans(found, self._denser):
                rules += _rules(task, safe, low - 1, high)
                inside = [length for length in self.lengths if low <= length <= high + 1]
                for layer, floor in _by_floor([(floors or {}).get((task, length), {}) for length in inside]):
                    rules += _floored(task, safe, low - 1, high, layer, floor)
        return Policy(name, tuple(rules), description=self._description(), calibrated=dict(self.about) or None)

    def _description(self) -> str:
        goal = self.goal
        return (
            f"Calibrated on {', '.join(self.tasks)}: at most {goal.loss:.1%} of the dense accuracy lost, "
            f"{goal.confidence:.0%} sure for each task and length, verified on held-out samples."
        )

    def _shared(self, cells: Sequence[Cell], wanted: Sequence[tuple[str, int]]) -> Safe:
        """Of each method that is safe in all wanted (task, length), and of the best cells whatever their method: the
        densest of the budgets there, layer by layer. The cheapest."""
        safe = [cell for cell in cells if cell.status is Status.SAFE]
        choices = [[cell for cell in safe if cell.method == method] for method in dict.fromkeys(c.method for c in safe)]
        choices.append(sorted(safe, key=lambda cell: -cell.density))  # the last one counts: the best of a place
        offers = []
        for mine in choices:
            chosen = {(cell.task, cell.length): cell for cell in mine}
            if not wanted or not set(wanted) <= set(chosen):
                continue
            held = [chosen[place] for place in wanted]
            budget = self._densest([cell.budget for cell in held])
            shared = [max(cell.density, _density_at(cell, budget)) for cell in held]
            offers.append(Safe(budget, sum(shared) / len(shared)))
        return min(offers, key=lambda one: one.density, default=DENSE)

    def _denser(self, one: Safe, other: Safe) -> Safe:
        """What computes at least as much as both, layer by layer."""
        budget = self._densest([one.budget, other.budget])
        return DENSE if budget is None else Safe(budget, max(one.density, other.density))

    def _densest(self, settings: Sequence[Setting | None]) -> Setting | None:
        """Per layer the budget that computes most; dense where budgets of several methods meet, which do not rank."""
        layers = max((len(one.budgets) for one in settings if isinstance(one, Layered)), default=1)
        found: list[Budget | None] = []
        for layer in range(layers):
            budgets = list(dict.fromkeys(layer_budget(one, layer) for one in settings))
            ranked = [steps for steps in self.ladders.values() if all(budget in steps for budget in budgets)]
            if len(budgets) == 1:
                found.append(budgets[0])
            else:
                found.append(max(budgets, key=list(ranked[0]).index) if ranked else None)  # type: ignore[arg-type]
        return simplest(found)


def _density_at(cell: Cell, setting: Setting | None) -> float:
    """What a setting computed at a cell, if it was tried there; the least that any denser one can else."""
    if setting is None:
        return 1.0
    known = {trial.budget: trial.density for trial in cell.trials}
    if setting in known:
        return known[setting]
    if isinstance(setting, Layered):
        return sum(_density_at(cell, budget) for budget in setting.budgets) / len(setting.budgets)
    return _dial_density(setting)


def _dial_density(budget: Budget) -> float:
    return float(budget.params.get("density", 0.0))


def _rules(task: TaskClass, safe: Safe, above: int, up_to: int) -> list[Rule]:
    """A rule for all layers, or one for each budget that some layers have; dense ones need none."""
    if isinstance(safe.budget, Layered):
        groups = safe.budget.groups()
        return [Rule(task, budget, above, up_to, layers=layers) for budget, layers in groups if budget is not None]
    return [] if safe.budget is None else [Rule(task, with_density(safe.budget, safe.density), above, up_to)]


def _floored(task: TaskClass, safe: Safe, above: int, up_to: int, layer: int, floor: float) -> list[Rule]:
    budget = layer_budget(safe.budget, layer)
    if budget is None:
        return []
    given = budget if isinstance(safe.budget, Layered) else with_density(budget, safe.density)
    return [Rule(task, given, above, up_to, layers=Ranges(((layer, layer),)), floor=floor)]


def _spans(found: Sequence[tuple[int, Safe]], denser: Callable[[Safe, Safe], Safe]) -> list[tuple[int, int, Safe]]:
    """(first length, last length, budget) of each stretch that has a budget."""
    spans: list[tuple[int, int, Safe]] = []
    for (length, safe), after in zip(found, [*found[1:], None], strict=True):
        spans.append((length, length, safe))
        if after is not None and after[0] > length + 1:
            spans.append((length + 1, after[0] - 1, denser(safe, after[1])))
    merged: list[tuple[int, int, Safe]] = []
    for low, high, safe in spans:
        if safe.budget is None:
            continue
        if merged and merged[-1][2].budget == safe.budget and merged[-1][1] + 1 == low:
            merged[-1] = (merged[-1][0], high, max(merged[-1][2], safe, key=lambda s: s.density))
        else:
            merged.append((low, high, safe))
    return merged


def _by_floor(found: Sequence[Mapping[int, float]]) -> list[tuple[int, float]]:
    """Layers and their floors, rounded down to hundredths; of several lengths the lowest floor of a layer holds."""
    floors = []
    for layer in sorted(set().union(*found)):
        least = min(one[layer] for one in found if layer in one)
        if (floor := math.floor(least * 100) / 100) > 0:
            floors.append((layer, floor))
    return floors
