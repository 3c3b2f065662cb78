"""A policy on samples that no calibration has seen, against dense and against fixed budgets that compute as much."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from sparsepass.measure.calibrate.bounds import Paired
from sparsepass.measure.calibrate.cell import LEAST, Meter, Outcome, prefetch
from sparsepass.measure.calibrate.fit import Curve, Fit, fit
from sparsepass.measure.calibrate.setting import Setting, policy_setting, setting_text
from sparsepass.measure.tasks.base import Task
from sparsepass.policies.policy import Policy
from sparsepass.types import Budget, TaskClass

FRESH = 1 << 33
"""Seeds of an evaluation begin here: after those of every search and verification."""


@dataclass(frozen=True)
class Measured:
    """A setting on the contexts of one task and length; ``None`` is dense."""

    budget: Setting | None
    paired: Paired
    density: float


@dataclass(frozen=True)
class Place:
    """One task at one length: dense, what the policy gives it, and every fixed budget, on the same samples."""

    task: str
    task_class: TaskClass
    length: int
    dense: Measured
    policy: Measured
    fixed: tuple[Measured, ...]
    """Every budget of every method, in the order of ``Evaluation.methods``; dense is the last."""
    curves: Mapping[str, Curve]
    """Loss by density, by method; empty where the fixed budgets were not asked."""

    @property
    def fails(self) -> bool:
        """Whether the dense model answers too little for a loss to mean anything."""
        return self.dense.paired.accuracy < LEAST


@dataclass(frozen=True)
class Evaluation:
    """All places, by task and length. ``tolerated`` and ``confidence``: what a loss is held against.

    Places where the dense model fails count nowhere.
    """

    tolerated: float
    confidence: float
    weights: Mapping[str, float]
    methods: Mapping[str, Sequence[Budget]]
    every: tuple[Place, ...]

    complete: bool = True
    """False where the time limit came before all fixed budgets were asked everywhere."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Those where the dense model can do the task, and the fixed budgets were asked."""
        return tuple(place for place in self.every if not place.fails and place.curves)

    def density(self, step: int | None) -> float:
        """Share computed by a fixed budget, or by the policy (None): mean over the mix and the lengths."""
        rows = [(self.weights[place.task], _of(place, step).density) for place in self.places]
        return sum(weight * density for weight, density in rows) / (sum(weight for weight, _ in rows) or 1.0)

    def keeps(self, step: int | None) -> bool:
        """Whether a fixed budget, or the policy, is shown to lose no more than tolerated in every place."""
        places = self.places if step is not None else [place for place in self.every if not place.fails]
        return all(self.kept(_of(place, step)) for place in places)

    def kept(self, held: Measured) -> bool:
        """Whether a setting is shown to lose no more than tolerated; dense loses nothing."""
        return held.budget is None or held.paired.upper(1 - self.confidence) <= self.tolerated

    def worst(self, step: int | None) -> float:
        """The largest loss in any place."""
        losses = [_of(place, step) for place in self.places]
        return max((0.0 if held.budget is None else held.paired.loss for held in losses), default=0.0)

    @property
    def steps(self) -> int:
        """Fixed budgets of all methods, and dense."""
        return sum(map(len, self.methods.values())) + 1

    def fixed_budget(self, step: int) -> Budget | None:
        """The budget that a step stands for; ``None`` is dense, the last."""
        return [*(budget for steps in self.methods.values() for budget in steps), None][step]

    @property
    def best_fixed(self) -> int:
        """The fixed budget that computes least of those that keep it everywhere; dense does."""
        return min((step for step in range(self.steps) if self.keeps(step)), key=self.density)

    @property
    def equal_compute(self) -> int | None:
        """The fixed budget that computes most nearly as much as the policy; None where the policy is dense."""
        mine = math.log(self.density(None)) if self.places else 0.0
        if mine > -1e-9 or self.steps < 2:
            return None
        return min(range(self.steps - 1), key=lambda step: abs(math.log(self.density(step)) - mine))

    def fits(self, method: str) -> dict[str, Fit]:
        """Safe density against length under a method, by task."""
        found = {}
        for task in dict.fromkeys(place.task for place in self.places):
            curves = [place.curves[method] for place in self.places if place.task == task]
            found[task] = fit(curves, self.tolerated)
        return found

    def steps_of(self, method: str) -> range:
        """The steps of a method."""
        start = 0
        for name, steps in self.methods.items():
            if name == method:
                return range(start, start + len(steps))
            start += len(steps)
        raise KeyError(method)


def _of(place: Place, step: int | None) -> Measured:
    return place.policy if step is None else place.fixed[step]


@dataclass(eq=False)
class _Asked:
    """What was measured at one task and length, by setting."""

    meter: Meter
    task: Task
    length: int
    seed: int
    tick: Callable[[str], None]
    outcomes: dict[Setting | None, list[Outcome]] = field(default_factory=dict)

    def ask(self, setting: Setting | None, contexts: int) -> None:
        """See that so many contexts were asked about under a setting."""
        held = self.outcomes.setdefault(setting, [])
        seeds = [self.seed + FRESH + place for place in range(len(held), contexts)]
        prefetch(self.meter, self.task.name, self.length, seeds, setting)
        for seed in seeds:
            held.append(self.meter.run(self.task.name, self.length, seed, setting))
            self.tick(f"{self.task.name} {self.length} {setting_text(setting)}")

    @property
    def able(self) -> bool:
        """Whether the dense model can do the task."""
        return self.measured(None).paired.accuracy >= LEAST

    def ask_all(self, settings: Sequence[Setting], contexts: int) -> None:
        """See that so many contexts were asked about under each."""
        for setting in settings:
            self.ask(setting, contexts)

    def measured(self, setting: Setting | None) -> Measured:
        paired, held = Paired(), self.outcomes[setting]
        for place, mine in enumerate(held):
            paired.add(self._dense(place, mine), mine.scores)
        return Measured(setting, paired, sum(one.density for one in held) / (len(held) or 1))

    def _dense(self, place: int, mine: Outcome) -> tuple[float, ...]:
        """The dense scores of a context; where it was not asked and nothing was wrong, right."""
        if place < len(self.outcomes[None]):
            return self.outcomes[None][place].scores
        if min(mine.scores) >= 1:
            return mine.scores
        return self.meter.run(self.task.name, self.length, self.seed + FRESH + place, None).scores

    def curve(self, steps: Sequence[Budget], contexts: int) -> Curve:
        """Of a method's budgets, on the contexts that all were asked about."""
        dense = self.outcomes[None][:contexts]
        sums = [[sum(one.scores) for one in self.outcomes[step][:contexts]] for step in steps]
        right = torch.tensor([[sum(one.scores)] * len(steps) for one in dense]).double()
        net = right - torch.tensor(sums).double().T
        densities = torch.tensor([self.measured(step).density for step in steps]).cummax(0).values.tolist()
        return Curve(self.length, right, net, tuple(densities))


def evaluate(
    meter: Meter,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    policy: Policy,
    methods: Mapping[str, Sequence[Budget]],
    *,
    contexts: int,
    mapped: int | None = None,
    dense: int | None = None,
    tolerated: float,
    confidence: float = 0.95,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    time_limit: float = 0.0,
    tick: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Run fresh samples per task and length: dense, under the policy, under every fixed budget.

    ``methods``: fixed budgets by method, the sparsest first. ``contexts``: asked about under the policy. ``dense``:
    asked about densely (all if absent); of the others only those where something was wrong, elsewhere dense is taken to
    be right, which can only raise the loss.
    ``mapped``: asked about under every fixed budget (all if absent); one that is not shown to lose too much anywhere is
    then asked about the others, too, as it may be the best fixed one. ``time_limit``: seconds after which the fixed
    budgets are asked at no further place.
    """
    began = time.monotonic()

    def late() -> bool:
        return bool(time_limit) and time.monotonic() - began > time_limit

    first = min(contexts, mapped or contexts, dense or contexts)
    budgets = [budget for steps in methods.values() for budget in steps]
    layers, heads = int(getattr(meter, "layers", 1)), int(getattr(meter, "heads", 1))
    given: dict[tuple[str, int], Setting | None] = {}
    asked: list[_Asked] = []
    mapped_at: list[_Asked] = []
    for length in sorted(lengths):
        for task in tasks:
            at = _Asked(meter, task, length, seed, tick)
            at.ask(None, dense or contexts)
            given[task.name, length] = policy_setting(policy, task.task_class, length, layers, max(1, heads))
            asked.append(at)
            if at.able and at.measured(None).paired.accuracy < 1 - tolerated:
                at.ask(None, contexts)  # what sparse gets right besides has to be counted
            if at.able:
                at.ask(given[task.name, length], contexts)
                if not late():
                    at.ask_all(budgets, first)
                    mapped_at.append(at)
    able = [at for at in asked if at.able]
    for budget in budgets:
        if late() or any(at.measured(budget).paired.lower(1 - confidence) > tolerated for at in mapped_at):
            continue
        for at in mapped_at:
            at.ask(budget, contexts)
    places = []
    for at in asked:
        alone, setting = at.measured(None), given[at.task.name, at.length]
        head = (at.task.name, at.task.task_class, at.length, alone)
        if at not in mapped_at:
            policy_held = at.measured(setting) if at in able else alone
            places.append(Place(*head, policy_held, (alone,) * (len(budgets) + 1), {}))
            continue
        fixed = tuple(at.measured(budget) for budget in budgets)
        curves = {name: at.curve(steps, first) for name, steps in methods.items()}
        places.append(Place(*head, at.measured(setting), (*fixed, alone), curves))
    shares = dict(weights) if weights is not None else {task.name: 1.0 for task in tasks}
    complete = len(mapped_at) == len(able) and not late()
    return Evaluation(tolerated, confidence, shares, dict(methods), tuple(places), complete)
