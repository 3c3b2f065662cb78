"""A policy on samples that no calibration has seen, against dense and against fixed budgets that compute as much."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsepass.calibrate.bounds import Paired
from sparsepass.calibrate.cell import Meter
from sparsepass.calibrate.fit import Curve, Fit, fit
from sparsepass.methods import encode_budget
from sparsepass.policy import Policy
from sparsepass.tasks.base import Task
from sparsepass.types import Budget, TaskClass

FRESH = 1 << 33
"""Seeds of an evaluation begin here: after those of every search and verification."""


@dataclass(frozen=True)
class Measured:
    """A budget on the contexts of one task and length."""

    budget: Budget | None
    paired: Paired
    density: float


@dataclass(frozen=True)
class Place:
    """One task at one length: what the policy gives it, and every fixed budget, on the same samples."""

    task: str
    task_class: TaskClass
    length: int
    policy: Measured
    fixed: tuple[Measured, ...]
    curve: Curve


@dataclass(frozen=True)
class Evaluation:
    """All places, by task and length. ``tolerated`` and ``confidence``: what a loss is held against."""

    tolerated: float
    confidence: float
    weights: Mapping[str, float]
    places: tuple[Place, ...]

    def density(self, step: int | None) -> float:
        """Share computed by a fixed budget, or by the policy (None): mean over the mix and the lengths."""
        rows = [(self.weights[place.task], _of(place, step).density) for place in self.places]
        return sum(weight * density for weight, density in rows) / (sum(weight for weight, _ in rows) or 1.0)

    def keeps(self, step: int | None) -> bool:
        """Whether a fixed budget, or the policy, is shown to lose no more than tolerated in every place."""
        return all(
            (held := _of(place, step)).budget is None or held.paired.upper(1 - self.confidence) <= self.tolerated
            for place in self.places
        )

    def worst(self, step: int | None) -> float:
        """The largest loss in any place."""
        return max(0.0 if _of(p, step).budget is None else _of(p, step).paired.loss for p in self.places)

    @property
    def steps(self) -> int:
        return len(self.places[0].fixed) if self.places else 0

    @property
    def best_fixed(self) -> int | None:
        """The sparsest fixed budget that keeps it everywhere; None where none does."""
        return next((step for step in range(self.steps) if self.keeps(step)), None)

    @property
    def equal_compute(self) -> int | None:
        """The fixed budget that computes most nearly as much as the policy; None where the policy is dense."""
        mine = math.log(self.density(None))
        if mine > -1e-9:
            return None
        return min(range(self.steps), key=lambda step: abs(math.log(self.density(step)) - mine), default=None)

    def fits(self) -> dict[str, Fit]:
        """Safe density against length, by task."""
        found = {}
        for task in dict.fromkeys(place.task for place in self.places):
            found[task] = fit([place.curve for place in self.places if place.task == task], self.tolerated)
        return found


def _of(place: Place, step: int | None) -> Measured:
    return place.policy if step is None else place.fixed[step]


def policy_budget(policy: Policy, task: TaskClass, length: int) -> Budget | None:
    """What a policy gives a class at a length, the most cautious of all layers and heads; None is dense."""
    budget = policy.budget(task, policy.bucket(length))
    return None if budget.dense else budget


def evaluate(
    meter: Meter,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    policy: Policy,
    fixed: Sequence[Budget],
    *,
    contexts: int,
    tolerated: float,
    confidence: float = 0.95,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Run ``contexts`` fresh samples per task and length: dense, under the policy, under every fixed budget.

    ``fixed``: of one method, the sparsest first.
    """
    places = []
    for length in sorted(lengths):
        for task in tasks:
            given = policy_budget(policy, task.task_class, length)
            paired = {budget: Paired() for budget in (given, *fixed)}
            densities = dict.fromkeys(paired, 0.0)
            right, net = [], []
            for place in range(contexts):
                at = (task.name, length, seed + FRESH + place)
                dense = meter.run(*at, None).scores
                lost = {}
                for budget in paired:
                    outcome = meter.run(*at, budget)
                    tick(f"{task.name} {length} {'dense' if budget is None else encode_budget(budget)}")
                    paired[budget].add(dense, outcome.scores)
                    densities[budget] += outcome.density / contexts
                    lost[budget] = sum(dense) - sum(outcome.scores)
                right.append([sum(dense)] * len(fixed))
                net.append([lost[budget] for budget in fixed])
            measured = {budget: Measured(budget, paired[budget], densities[budget]) for budget in paired}
            rising = torch.tensor([densities[budget] for budget in fixed]).cummax(0).values.tolist()
            curve = Curve(length, torch.tensor(right).double(), torch.tensor(net).double(), tuple(rising))
            held = tuple(measured[budget] for budget in fixed)
            places.append(Place(task.name, task.task_class, length, measured[given], held, curve))
    shares = dict(weights) if weights is not None else {task.name: 1.0 for task in tasks}
    return Evaluation(tolerated, confidence, shares, tuple(places))
