"""A whole calibration: every task at every length by every method, in an order in which each search helps the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsepass.errors import OptionError
from sparsepass.measure.calibrate.bounds import questions_needed
from sparsepass.measure.calibrate.cell import Cell, Goal, Meter, Status
from sparsepass.measure.calibrate.ladder import ladder, within
from sparsepass.measure.calibrate.refine import METHOD as LAYERS
from sparsepass.measure.calibrate.refine import Refine, Refinement
from sparsepass.measure.calibrate.result import Calibration
from sparsepass.measure.calibrate.search import ATTEMPTS, LOOKS, Search
from sparsepass.measure.calibrate.setting import setting_text
from sparsepass.measure.tasks.base import Task
from sparsepass.methods import make_method
from sparsepass.types import Budget

CellDone = Callable[[Cell], None]


def check_goal(goal: Goal) -> None:
    """Raise ``OptionError`` where the questions allowed could show nothing, or a share is none."""
    for name, share in (("loss", goal.loss), ("confidence", goal.confidence)):
        if not 0 < share < 1:
            raise OptionError(f"--{name} is {share:g}; accepted is a share above 0 and under 1.")
    for name, count in (("questions", goal.questions), ("search", goal.search), ("verify", goal.verify)):
        if count < 1:
            raise OptionError(f"--{name} is {count}; accepted is 1 or more.")
    needed = questions_needed(goal.loss, (1 - goal.confidence) / 2 / LOOKS, goal.questions)
    if goal.questions * goal.verify < needed:
        contexts = -(-needed // goal.questions)
        raise OptionError(
            f"{goal.verify} contexts of {goal.questions} questions cannot show a loss of {goal.loss:.2%} at "
            f"{goal.confidence:.0%} confidence, even if none is lost: that takes {needed} questions. Give --verify "
            f"{2 * contexts} (at least {contexts}), more --questions, or tolerate more."
        )


def ladders(methods: Sequence[str]) -> dict[str, tuple[Budget, ...]]:
    """The budgets to try, by method; one with other fixed parameters has a name of its own. Raises ``OptionError``."""
    found: dict[str, tuple[Budget, ...]] = {}
    for text in methods:
        steps = ladder(text)
        params = steps[0].params
        name = f"{steps[0].method}, last={params['last']}" if params.get("last") else steps[0].method
        if name in found:
            dial = make_method(steps[0]).dial
            name = f"{steps[0].method}({', '.join(f'{key}={params[key]}' for key in sorted(params) if key != dial)})"
        found[name] = steps
    return found


@dataclass(frozen=True)
class Refining:
    """Whether budgets are refined by layer and by head, in a model of so many; the first method's sparsest budget is
    what a layer gets."""

    how: Refine = ""
    layers: int = 0
    heads: int = 0

    MARGIN = 1.2
    """A cell that computes no more than so many times what the sparsest budget computes has nothing to gain."""


def calibrate(
    meter: Meter,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    budgets: Mapping[str, Sequence[Budget]],
    goal: Goal,
    *,
    weights: Mapping[str, float] | None = None,
    about: Mapping[str, Any] | None = None,
    refine: Refining | None = None,
    time_limit: float = 0.0,
    done: CellDone = lambda cell: None,
    tick: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Find the sparsest safe budget of each task at each length.

    ``budgets``: by method, the sparsest first. ``weights``: of the mix, by task; all alike if absent. ``time_limit``:
    seconds after which no further cell is begun; what was measured before is in the result. Raises ``OptionError``.
    """
    check_goal(goal)
    began = time.monotonic()
    cells: list[Cell] = []
    complete = True
    for length in sorted(lengths):
        for task in tasks:
            of_place: list[Cell] = []
            for method, steps in budgets.items():
                if time_limit and time.monotonic() - began > time_limit:
                    complete = False
                    continue
                if of_place and (of_place[-1].status is Status.UNMEASURED or _questions_ran_out(of_place)):
                    continue  # whatever the method
                tried = _worth_trying(within(steps, length), min((c.density for c in of_place), default=1.0), length)
                if not tried:
                    continue
                cell = Search(meter, task, length, method, tried, goal, tick).run(_start(cells, task, method, tried))
                of_place.append(cell)
                cells.append(cell)
                done(cell)
            if refine is None or not refine.how or not of_place or not complete:
                continue
            low = next(iter(budgets.values()))[0]
            finer = _refined(Search(meter, task, length, LAYERS, [low], goal, tick), of_place, cells, refine, low)
            if finer is not None:
                cells.append(finer)
                done(finer)
    given = dict(weights) if weights is not None else {task.name: 1.0 for task in tasks}
    return Calibration(goal, tuple(cells), given, dict(budgets), dict(about or {}), complete)


def _refined(search: Search, found: Sequence[Cell], before: Sequence[Cell], how: Refining, low: Budget) -> Cell | None:
    """The best of a task's cells at a length, refined; ``None`` where that cannot gain, or did not."""
    if found[-1].status is Status.UNMEASURED:
        return None
    safe = [cell for cell in found if cell.status is Status.SAFE]
    best = min(safe, key=lambda cell: cell.density, default=None)
    if best is None and _questions_ran_out(found):
        return None
    floor = [trial.density for cell in found for trial in cell.trials if trial.budget == low]
    if best is not None and (best.budget == low or (floor and best.density <= how.MARGIN * floor[0])):
        return None
    nearby = [c.budget for c in before if c.task == search.task.name and c.method == LAYERS and c.budget is not None]
    base = best.budget if best is not None and isinstance(best.budget, Budget) else None
    cell = Refinement(search, how.layers, how.heads, base, low).run(nearby[-1] if nearby else None, how.how == "heads")
    return cell if cell is not None and (best is None or cell.density < best.density) else None


def _questions_ran_out(found: Sequence[Cell]) -> bool:
    """Whether a budget was likely safe and none was shown to be: more questions would help, no other budget would."""
    return all(cell.budget is None for cell in found) and any(trial.passed for cell in found for trial in cell.trials)


def _start(cells: Sequence[Cell], task: Task, method: str, steps: Sequence[Budget]) -> int:
    """Where the search begins: where it ended at the length before, else with another task there, else the middle."""
    mine = [cell for cell in cells if cell.method == method and cell.budget in steps]
    same = [cell for cell in mine if cell.task == task.name]
    last = (same or mine)[-1:] if (same or mine) else []
    return (
        [*map(setting_text, steps)].index(setting_text(last[0].budget))
        if last and last[0].budget is not None
        else len(steps) // 2
    )


def _worth_trying(steps: Sequence[Budget], best: float, length: int) -> Sequence[Budget]:
    """A second method is only asked about budgets that would compute less than the best so far."""
    return steps if best >= 1 else [step for step in steps if _expected(step, length) < GAIN * best]


GAIN = 0.95
"""What a second method's budget has to compute of the best so far to be asked about."""


def _expected(budget: Budget, length: int) -> float:
    """The share that a budget is expected to compute: no less than the three blocks that every row keeps."""
    method = make_method(budget)
    count = -(-length // int(budget.params.get("block") or 128))
    last = min(count, int(budget.params.get("last", 0)))
    kept = sum(min(3, row + 1) if row < count - last else row + 1 for row in range(count))
    return max(method.density_at(length), kept / (count * (count + 1) / 2))


__all__ = ["ATTEMPTS", "calibrate", "check_goal", "ladders"]
