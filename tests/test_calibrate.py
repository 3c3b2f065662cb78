"""Calibration on made-up models whose tolerance is known: what is called safe is safe, and little is asked."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from sparsepass.calibrate.cell import Goal, Outcome, Status
from sparsepass.calibrate.run import calibrate, ladders
from sparsepass.hints import Level
from sparsepass.tasks.base import Sample
from sparsepass.tasks.metrics import exact_match
from sparsepass.types import Budget, TaskClass

STEPS = ladders(["pooled_topk"])
DENSITIES = [step.params["density"] for step in STEPS["pooled_topk"]]


@dataclass(frozen=True)
class Named:
    """A task of which nothing is drawn."""

    name: str
    task_class: TaskClass
    scope: Level = "low"
    dispersion: Level = "low"
    metric: Any = exact_match

    def draw(self, length: int, seed: int, questions: int = 1) -> Sample:
        raise NotImplementedError


SINGLE, TOP = Named("single", TaskClass.SINGLE_QA), Named("top", TaskClass.AGGREGATION)


@dataclass
class MadeUp:
    """A model that is right with probability ``dense``, and loses an answer under a density with ``loss``."""

    need: dict[tuple[str, int], float]
    """By task and length, the density from which on nothing but ``rest`` is lost; under it the loss is ``under``."""
    dense: float = 0.97
    rest: float = 0.0
    under: float = 0.3
    together: float = 0.0
    """Share of the contexts in which all questions fare alike."""
    world: int = 0
    questions: int = 16
    asked: dict[tuple[str, int], set[tuple[int, str]]] = field(default_factory=dict)

    def true_loss(self, task: str, length: int, density: float) -> float:
        return self.rest if density >= self.need[task, length] else self.under

    def run(self, task: str, length: int, seed: int, budget: Budget | None) -> Outcome:
        text = "dense" if budget is None else str(budget)
        self.asked.setdefault((task, length), set()).add((seed, text))
        draw = random.Random(f"{self.world} {task} {length} {seed}")
        right = [draw.random() < self.dense for _ in range(self.questions)]
        if budget is None:
            return Outcome(tuple(map(float, right)), 1.0)
        density = float(budget.params["density"])
        loss = self.true_loss(task, length, density)
        falls = [draw.random() for _ in right]
        if draw.random() < self.together:
            falls = [falls[0]] * len(falls)
        return Outcome(tuple(float(ok and fall >= loss) for ok, fall in zip(right, falls, strict=True)), density)


def test_finds_the_sparsest_safe_budget_with_few_questions() -> None:
    need = {("single", 1024): 0.12, ("single", 4096): 0.05, ("top", 1024): 0.5, ("top", 4096): 0.35}
    meter = MadeUp(need)
    goal = Goal(loss=0.05)
    found = calibrate(meter, [SINGLE, TOP], [4096, 1024], STEPS, goal)
    safe = {(cell.task, cell.length): cell.budget.params["density"] for cell in found.cells if cell.budget}
    assert safe == need
    assert all(cell.status is Status.SAFE and cell.high <= 0.05 for cell in found.cells)
    runs = sum(len(asked) for asked in meter.asked.values())
    grid = len(need) * len(DENSITIES) * goal.search
    assert runs < grid / 2
    assert found.fixed().budget == Budget("pooled_topk", {"density": 0.5})
    assert 0.2 < found.mean_density() < 0.3


@pytest.mark.parametrize("together", [0.0, 0.3])
def test_what_is_called_safe_is_safe(together: float) -> None:
    """A loss just over what is tolerated, at every density: it may be called safe in 5% of all calibrations."""
    wrong = 0
    worlds = 60
    for world in range(worlds):
        meter = MadeUp({("single", 1024): 0.0}, rest=0.055, together=together, world=world)
        (cell,) = calibrate(meter, [SINGLE], [1024], STEPS, Goal(loss=0.05, verify=16)).cells
        wrong += cell.status is Status.SAFE
    assert wrong <= 0.1 * worlds  # 5% expected at most


def test_not_safe_at_any_density() -> None:
    found = calibrate(MadeUp({("top", 1024): 2.0}), [TOP], [1024], STEPS, Goal(loss=0.05))
    (cell,) = found.cells
    assert (cell.status, cell.budget) == (Status.UNSAFE, None)
    assert "not safe at any density tried" in cell.status.words
    assert found.fixed().budget is None
    assert found.policy("p").rules == ()


def test_a_model_that_cannot_do_the_task() -> None:
    (cell,) = calibrate(MadeUp({("top", 1024): 0.1}, dense=0.05), [TOP], [1024], STEPS, Goal(loss=0.05)).cells
    assert cell.status is Status.UNMEASURED
