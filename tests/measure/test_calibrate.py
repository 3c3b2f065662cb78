"""Calibration on made-up models whose tolerance is known: what is called safe is safe, and little is asked."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sparsepass.errors import OptionError, PolicyError
from sparsepass.measure.calibrate.bounds import Paired, lower_bound, upper_bound
from sparsepass.measure.calibrate.cell import Goal, Outcome, Status
from sparsepass.measure.calibrate.ladder import ladder
from sparsepass.measure.calibrate.log import Log
from sparsepass.measure.calibrate.report import html, table
from sparsepass.measure.calibrate.run import calibrate, check_goal, ladders
from sparsepass.measure.calibrate.search import HELD_OUT
from sparsepass.measure.calibrate.setting import Setting
from sparsepass.measure.tasks.base import Sample
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.policies.policy import Policy
from sparsepass.reports.table import plain_text
from sparsepass.request.hints import Level
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

    def run(self, task: str, length: int, seed: int, budget: Setting | None) -> Outcome:
        text = "dense" if budget is None else str(budget)
        self.asked.setdefault((task, length), set()).add((seed, text))
        draw = random.Random(f"{self.world} {task} {length} {seed}")
        right = [draw.random() < self.dense for _ in range(self.questions)]
        if budget is None:
            return Outcome(tuple(map(float, right)), 1.0)
        assert isinstance(budget, Budget)
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
    safe = {(c.task, c.length): c.budget.params["density"] for c in found.cells if isinstance(c.budget, Budget)}
    assert safe == need
    assert all(cell.status is Status.SAFE and cell.high <= 0.05 for cell in found.cells)
    runs = sum(len(asked) for asked in meter.asked.values())
    grid = len(need) * len(DENSITIES) * goal.search
    assert runs < grid / 2
    assert found.fixed().budget == Budget("pooled_topk", {"density": 0.5})
    assert 0.2 < found.mean_density() < 0.3


def test_dense_is_only_asked_where_something_was_wrong() -> None:
    meter = MadeUp({("single", 1024): 0.12}, dense=0.99)
    (cell,) = calibrate(meter, [SINGLE], [1024], STEPS, Goal(loss=0.05)).cells
    held_out = [run for run in meter.asked["single", 1024] if run[0] >= HELD_OUT]
    dense = [seed for seed, budget in held_out if budget == "dense"]
    assert cell.status is Status.SAFE
    assert 0 < len(dense) < len(held_out) / 3
    assert all(min(meter.run("single", 1024, seed, cell.budget).scores) < 1 for seed in dense)


def test_a_task_with_few_questions_gets_more_contexts() -> None:
    meter = MadeUp({("single", 1024): 0.12}, questions=4)
    (cell,) = calibrate(meter, [SINGLE], [1024], STEPS, Goal(loss=0.05, verify=12)).cells
    assert cell.status is Status.SAFE
    assert cell.trials[-1].questions > 4 * 12


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


def test_tasks_that_no_question_can_decide_are_refused() -> None:
    with pytest.raises(OptionError, match=r"cannot show a loss of 1.00%.*at least 41"):
        check_goal(Goal(loss=0.01, verify=10))
    with pytest.raises(OptionError, match="--loss is 0"):
        check_goal(Goal(loss=0.0))


def test_with_too_few_questions_nothing_is_claimed() -> None:
    """A true loss of 4% where 5% is tolerated takes more questions than are allowed."""
    (cell,) = calibrate(
        MadeUp({("single", 1024): 0.0}, rest=0.045), [SINGLE], [1024], STEPS, Goal(loss=0.05, verify=9)
    ).cells
    assert cell.status is Status.UNSHOWN


def test_a_second_method_is_only_asked_what_it_could_better() -> None:
    both = ladders(["pooled_topk", "vertical_slash"])
    found = calibrate(MadeUp({("single", 65536): 0.18}), [SINGLE], [65536], both, Goal(loss=0.05))
    second = [trial.budget.params["density"] for trial in found.cells[1].trials if isinstance(trial.budget, Budget)]
    assert found.cells[1].status is not Status.SAFE
    assert max(second) < 0.18


@pytest.mark.parametrize(("events", "trials"), [(0, 59), (3, 100), (0.5, 40.3), (17, 18), (30, 30)])
def test_bounds_are_those_of_the_beta_distribution(events: float, trials: float) -> None:
    mpmath = pytest.importorskip("mpmath")

    def cdf(x: float, a: float, b: float) -> float:
        return float(mpmath.betainc(a, b, 0, x, regularized=True))

    for error in (0.05, 0.003):
        high, low = upper_bound(events, trials, error), lower_bound(events, trials, error)
        assert low <= events / trials <= high
        if events < trials:
            assert cdf(high, events + 1, trials - events) == pytest.approx(1 - error, abs=1e-9)
        if events:
            assert cdf(low, events, trials - events + 1) == pytest.approx(error, abs=1e-9)


def test_questions_that_fare_alike_count_for_less() -> None:
    apart, alike = Paired(), Paired()
    for context in range(20):
        apart.add([1.0] * 10, [0.0] + [1.0] * 9)
        alike.add([1.0] * 10, [0.0] * 10 if context < 2 else [1.0] * 10)
    assert apart.loss == alike.loss == pytest.approx(0.1)
    assert alike.upper(0.05) > apart.upper(0.05) + 0.1
    assert alike.design_effect > 8


def test_a_gain_makes_up_for_a_loss_but_not_for_certainty() -> None:
    both, none = Paired(), Paired()
    both.add([1.0] * 90 + [0.0] * 10, [0.0] * 5 + [1.0] * 90 + [0.0] * 5)
    none.add([1.0] * 90 + [0.0] * 10, [1.0] * 90 + [0.0] * 10)
    assert both.loss == none.loss == 0
    assert both.upper(0.05) > none.upper(0.05)


def test_steps_run_from_sparse_to_dense() -> None:
    assert [budget.params["alpha"] for budget in ladder("threshold=0.03,0.3")] == [0.3, 0.03]
    assert [budget.params["coverage"] for budget in ladder("top_p=0.98,0.6")] == [0.6, 0.98]
    kept = ladder("pooled_topk(density=0.1, block=64)")
    assert {budget.params["block"] for budget in kept} == {64}
    assert len(kept) == len(DENSITIES)
    both = ladder("pooled_topk(density=0.1, block=64)=0.2,0.1")
    assert [(budget.params["density"], budget.params["block"]) for budget in both] == [(0.1, 64), (0.2, 64)]
    for bad in ("dense", "pooled_top", "pooled_topk=a", "pooled_topk=0"):
        with pytest.raises((OptionError, PolicyError)):
            ladder(bad)


def test_the_policy_covers_what_was_measured_and_nothing_else() -> None:
    need = {("single", 1024): 0.12, ("single", 4096): 0.05, ("single", 8192): 2.0}
    policy = calibrate(MadeUp(need), [SINGLE], [1024, 4096, 8192], STEPS, Goal(loss=0.05)).policy("p")

    def density(length: int, task: TaskClass = TaskClass.SINGLE_QA) -> float | None:
        return policy.budget(task, policy.bucket(length)).params.get("density")

    assert [density(length) for length in (1023, 1024, 1025, 4095, 4096)] == [None, 0.12, 0.12, 0.12, 0.05]
    assert [density(length) for length in (4097, 8192, 9000)] == [None, None, None]  # the next one is not safe
    assert density(1024, TaskClass.UNKNOWN) is None  # classes that were not measured may be meant
    assert Policy.from_json(policy.to_json()) == policy


def test_without_a_hint_the_hardest_class_holds() -> None:
    tasks = [SINGLE, TOP, Named("many", TaskClass.MULTI_QA), Named("hops", TaskClass.MULTI_HOP)]
    need = {("single", 1024): 0.05, ("top", 1024): 0.5, ("many", 1024): 0.12, ("hops", 1024): 0.25}
    policy = calibrate(MadeUp(need), tasks, [1024], STEPS, Goal(loss=0.05)).policy("p")
    assert policy.budget(TaskClass.UNKNOWN, policy.bucket(1024)).params["density"] == 0.5


class Kept:
    """A meter whose outcomes are logged, and how often the model itself was asked."""

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.log = Log(path, conditions)
        self.model = MadeUp({("single", 1024): 0.12})
        self.runs = 0

    def run(self, task: str, length: int, seed: int, budget: Setting | None) -> Outcome:
        key = (task, length, seed, str(budget))
        found = self.log.get(key)
        if found is None:
            self.runs += 1
            found = self.model.run(task, length, seed, budget)
            self.log.put(key, found)
        return found


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first = Kept(path, {"weights": "a"})
    whole = calibrate(first, [SINGLE], [1024], STEPS, Goal(loss=0.05))
    first.log.close()
    again = Kept(path, {"weights": "a"})
    assert calibrate(again, [SINGLE], [1024], STEPS, Goal(loss=0.05)).cells == whole.cells
    assert again.runs == 0
    again.log.close()

    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:20]) + lines[20][:15])  # ended in the middle of a line
    cut = Kept(path, {"weights": "a"})
    assert cut.log.found == 19
    assert calibrate(cut, [SINGLE], [1024], STEPS, Goal(loss=0.05)).cells == whole.cells
    cut.log.close()
    assert sorted(path.read_bytes().splitlines()) == sorted(line.strip() for line in lines)
    with pytest.raises(OptionError, match="other conditions: weights differ"):
        Log(path, {"weights": "b"})
    (tmp_path / "other").write_text("{}\n")
    with pytest.raises(OptionError, match="no log of a calibration"):
        Log(tmp_path / "other", {})


def test_the_report_says_what_was_found() -> None:
    need = {("single", 1024): 0.12, ("top", 1024): 2.0}
    found = calibrate(MadeUp(need), [SINGLE, TOP], [1024], STEPS, Goal(loss=0.05), about={"dtype": "<b>"})
    page = html(found, "mine & yours")
    for text in ("mine &amp; yours", "not safe at any density tried", "0.120", "95% sure", "&lt;b&gt;"):
        assert text in page, text
    plain = plain_text(table(found), 120)
    assert "No single budget of those tried is safe" in plain
    assert "held out" in plain
