"""A whole calibration: every task at every length by every method, in an order in which each search helps the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsepass.calibrate.bounds import questions_needed
from sparsepass.calibrate.cell import Cell, Goal, Meter, Status
from sparsepass.calibrate.ladder import ladder
from sparsepass.calibrate.result import Calibration
from sparsepass.calibrate.search import ATTEMPTS, LOOKS, Search
from sparsepass.errors import OptionError
from sparsepass.tasks.base import Task
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
    """The budgets to try, by method. Raises ``OptionError``."""
    found = {}
    for text in methods:
        steps = ladder(text)
        found[steps[0].method] = steps
    return found


def calibrate(
    meter: Meter,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    budgets: Mapping[str, Sequence[Budget]],
    goal: Goal,
    *,
    weights: Mapping[str, float] | None = None,
    about: Mapping[str, Any] | None = None,
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
            best: float | None = None
            for method, steps in budgets.items():
                if time_limit and time.monotonic() - began > time_limit:
                    complete = False
                    continue
                if cells and cells[-1].status is Status.UNMEASURED and _same(cells[-1], task, length):
                    continue  # dense fails whatever the method
                start = _start(cells, task, method, steps)
                search = Search(meter, task, length, method, _worth_trying(steps, best), goal, tick)
                cell = search.run(start)
                cells.append(cell)
                done(cell)
                if cell.status is Status.SAFE:
                    best = cell.density if best is None else min(best, cell.density)
    given = dict(weights) if weights is not None else {task.name: 1.0 for task in tasks}
    return Calibration(goal, tuple(cells), given, dict(budgets), dict(about or {}), complete)


def _same(cell: Cell, task: Task, length: int) -> bool:
    return (cell.task, cell.length) == (task.name, length)


def _start(cells: Sequence[Cell], task: Task, method: str, steps: Sequence[Budget]) -> int:
    """Where the search begins: where it ended at the length before, else with another task there, else the middle."""
    mine = [cell for cell in cells if cell.method == method and cell.budget in steps]
    same = [cell for cell in mine if cell.task == task.name]
    last = (same or mine)[-1:] if (same or mine) else []
    return list(steps).index(last[0].budget) if last and last[0].budget is not None else len(steps) // 2


def _worth_trying(steps: Sequence[Budget], best: float | None) -> Sequence[Budget]:
    """A second method is only asked about budgets that would compute less than the best so far; two at least."""
    if best is None:
        return steps
    cheaper = [step for step in steps if float(step.params.get("density", 0.0)) < best]
    return cheaper if len(cheaper) >= 2 else steps[:2]


__all__ = ["ATTEMPTS", "calibrate", "check_goal", "ladders"]
