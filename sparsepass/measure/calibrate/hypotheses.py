"""Two findings of The Sparse Frontier as hypotheses: tolerance differs by class, and safe density falls with length.

Exact one-sided binomial bounds of the loss at every task, length and budget of a method, all of them together wrong
with probability 5% at most (Bonferroni). Whatever is read off from bounds that do not overlap then holds at once, and
nothing rests on a fit or on resampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from sparsepass.measure.calibrate.evaluate import Evaluation
from sparsepass.methods import encode_budget

ERROR = 0.05
"""That any of a method's bounds is wrong."""

ALIKE = 1.02
"""Two densities are one if they differ by no more than this factor."""


@dataclass(frozen=True, slots=True)
class Point:
    """A loss with its simultaneous bounds, at a task, a length and a budget."""

    task: str
    length: int
    budget: str
    density: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Differs:
    """Two tasks at one length: ``gap`` is at least so much of the dense accuracy that the second loses more."""

    tolerant: Point
    other: Point
    gap: float


@dataclass(frozen=True, slots=True)
class Falls:
    """A task: the shorter request loses more, though it computes at least as large a share than the longer one."""

    task: str
    verdict: str
    """``falls``, ``rises``, ``not shown``, ``nothing is lost`` (at any length, by any budget) or ``one length``."""
    short: Point | None = None
    long: Point | None = None


@dataclass(frozen=True)
class Tested:
    """Of one method: every pair of tasks with the length and the budget that set them apart most, and every task."""

    method: str
    points: tuple[Point, ...]
    differs: tuple[Differs, ...]
    alike: tuple[tuple[str, str], ...]
    """Pairs that nothing sets apart."""
    falls: tuple[Falls, ...]


def hypotheses_of(found: Evaluation, method: str) -> Tested:
    """Test both hypotheses on what was measured under a method's budgets."""
    points = _points(found, method)
    tasks = list(dict.fromkeys(point.task for point in points))
    differs, alike = [], []
    for pair in combinations(tasks, 2):
        best = max((_apart(one, other) for one in points for other in points if {one.task, other.task} == set(pair)),
                   key=lambda one: one.gap, default=None)  # fmt: skip
        if best is not None and best.gap > 0:
            differs.append(best)
        else:
            alike.append((pair[0], pair[1]))
    falls = tuple(_falls([point for point in points if point.task == task]) for task in tasks)
    return Tested(method, points, tuple(differs), tuple(alike), falls)


def _points(found: Evaluation, method: str) -> tuple[Point, ...]:
    steps = found.steps_of(method)
    error = ERROR / max(1, 2 * len(steps) * len(found.places))
    points = []
    for place in found.places:
        for step in steps:
            held, budget = place.fixed[step], found.fixed_budget(step)
            assert budget is not None  # dense is of no method
            bounds = (held.paired.lower(error), held.paired.upper(error))
            name = encode_budget(budget)
            points.append(Point(place.task, place.length, name, held.density, held.paired.loss, *bounds))
    return tuple(points)


def _apart(one: Point, other: Point) -> Differs:
    """How much more the other one loses, under the same budget at the same length, computing as much or more."""
    same = (one.length, one.budget) == (other.length, other.budget) and one.density <= ALIKE * other.density
    return Differs(one, other, other.low - one.high if same else -1.0)


def _falls(points: list[Point]) -> Falls:
    task = points[0].task
    lengths = sorted({point.length for point in points})
    if len(lengths) < 2:
        return Falls(task, "one length")
    short = [point for point in points if point.length == lengths[0]]
    long = [point for point in points if point.length == lengths[-1]]
    found = {}
    for verdict, better, worse in (("falls", long, short), ("rises", short, long)):
        pairs = [(one, other) for one in better for other in worse
                 if one.density <= ALIKE * other.density and one.high < other.low]  # fmt: skip
        if pairs:
            found[verdict] = max(pairs, key=lambda pair: pair[1].low - pair[0].high)
    if len(found) == 1:
        ((verdict, (one, other)),) = found.items()
        return Falls(task, verdict, *((other, one) if verdict == "falls" else (one, other)))
    if all(point.loss <= 0 for point in points):
        return Falls(task, "nothing is lost")
    return Falls(task, "not shown")
