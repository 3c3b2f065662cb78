"""Budgets by layer and head, on made-up models in which some layers must stay dense; and settings as policies."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

import pytest

from sparsepass.measure.calibrate.cell import Goal, Outcome, Status
from sparsepass.measure.calibrate.evaluate import evaluate
from sparsepass.measure.calibrate.hypotheses import hypotheses_of
from sparsepass.measure.calibrate.refine import METHOD, Refinement
from sparsepass.measure.calibrate.result import Calibration
from sparsepass.measure.calibrate.run import Refining, calibrate, ladders
from sparsepass.measure.calibrate.search import HELD_OUT, Search
from sparsepass.measure.calibrate.setting import Layered, Setting, layer_budget, policy_setting, setting_text, simplest
from sparsepass.policies.policy import Policy
from sparsepass.types import Budget, TaskClass
from tests.measure.test_calibrate import SINGLE, Named

CHAINS = Named("chains", TaskClass.MULTI_HOP)
BUDGETS = ladders(["a_shape(sink=64, block=64, last=2)=64,256", "pooled_topk(density=0.1, block=64, last=2)=0.2,0.5"])
LOW = BUDGETS["a_shape, last=2"][0]
LAYERS, HEADS = 6, 4


@dataclass
class Needy:
    """A model whose chains break unless some heads are dense; other tasks lose nothing, whatever is computed."""

    needed: dict[int, set[int]] = field(default_factory=lambda: {2: {0, 3}, 4: {1}})
    layers: int = LAYERS
    heads: int = HEADS
    batches: list[int] = field(default_factory=list)
    runs: int = 0

    def run(self, task: str, length: int, seed: int, setting: Setting | None) -> Outcome:
        self.runs += 1
        shares = [self._shares(setting, layer) for layer in range(LAYERS)]
        broken = any(shares[layer][head] < 0.9 for layer, heads in self.needed.items() for head in heads)
        fails = task == CHAINS.name and broken and seed % 4 != 0
        return Outcome((float(not fails),), sum(map(sum, shares)) / LAYERS / HEADS)

    def prefetch(self, task: str, length: int, seeds: list[int], setting: Setting | None) -> bool:
        self.batches.append(len(seeds))
        return True

    def _shares(self, setting: Setting | None, layer: int) -> list[float]:
        budget = layer_budget(setting, layer)
        if budget is None:
            return [1.0] * HEADS
        heads = budget.params.get("head_densities")
        return [max(0.1, one) for one in heads] if heads else [float(budget.params.get("density", 0.1))] * HEADS


GOAL = Goal(loss=0.05, questions=1, search=64, verify=256)


def found_by(meter: Needy, how: str, lengths: tuple[int, ...] = (1024,)) -> Calibration:
    refine = Refining(how, LAYERS, HEADS)  # type: ignore[arg-type]
    return calibrate(meter, [SINGLE, CHAINS], lengths, BUDGETS, GOAL, refine=refine)


def test_layers_that_matter_stay_dense() -> None:
    found = found_by(Needy(), "layers", (1024, 4096))
    best = found.best("chains", 1024)
    assert best is not None
    assert (best.method, best.status) == (METHOD, Status.SAFE)
    assert best.budget == Layered((LOW, LOW, None, LOW, None, LOW))
    assert best.density == pytest.approx((4 * 0.1 + 2) / 6)
    assert [cell.method for cell in found.cells if cell.task == "single"] == [
        "a_shape, last=2"
    ] * 2  # nothing to gain there
    later = [cell for cell in found.cells if (cell.task, cell.length, cell.method) == ("chains", 4096, METHOD)]
    assert len([trial for trial in later[0].trials if not trial.held_out]) == 1  # what held at 1K was tried first

    policy = found.policy("p")
    again = Policy.from_json(policy.to_json())
    for length in (1024, 2000, 4096):
        assert policy_setting(again, TaskClass.MULTI_HOP, length, LAYERS, HEADS) == best.budget
        assert policy_setting(again, TaskClass.SINGLE_QA, length, LAYERS, HEADS) == LOW
    assert policy_setting(again, TaskClass.MULTI_HOP, 8192, LAYERS, HEADS) is None
    assert found.fixed().budget is None  # no single budget is safe for chains


def test_heads_that_matter_stay_dense() -> None:
    best = found_by(Needy(), "heads").best("chains", 1024)
    assert best is not None
    assert isinstance(best.budget, Layered)
    densities = [layer_budget(best.budget, layer) for layer in (2, 4)]
    wanted = [(1.0, 0.01, 0.01, 1.0), (0.01, 1.0, 0.01, 0.01)]
    assert [None if one is None else one.params["head_densities"] for one in densities] == wanted


def test_what_only_looked_safe_is_taken_back() -> None:
    class Late(Needy):
        """Layer 3 is needed too, but only held-out samples show it."""

        def run(self, task: str, length: int, seed: int, setting: Setting | None) -> Outcome:
            outcome = super().run(task, length, seed, setting)
            if seed >= HELD_OUT and layer_budget(setting, 3) is not None and task == CHAINS.name:
                return Outcome((float(seed % 4 == 0),), outcome.density)
            return outcome

    best = found_by(Late(), "layers").best("chains", 1024)
    assert best is not None
    assert isinstance(best.budget, Layered)
    assert best.budget.budgets[3] is None
    assert sum(budget is not None for budget in best.budget.budgets) >= 2


def test_contexts_are_asked_about_in_batches() -> None:
    meter = Needy()
    found_by(meter, "")
    assert max(meter.batches) >= 64
    assert meter.runs < 60 * len(meter.batches)


def test_without_a_hint_layers_are_the_densest_of_all_classes() -> None:
    others = [Named("top", TaskClass.AGGREGATION), Named("many", TaskClass.MULTI_QA)]
    refine = Refining("layers", LAYERS, HEADS)
    found = calibrate(Needy(), [SINGLE, CHAINS, *others], [1024], BUDGETS, GOAL, refine=refine)
    wanted = Layered((LOW, LOW, None, LOW, None, LOW))
    assert policy_setting(found.policy("p"), TaskClass.UNKNOWN, 1024, LAYERS, HEADS) == wanted


def test_settings_as_text() -> None:
    one = Layered((LOW, None, LOW, Budget("pooled_topk", {"density": 0.5})))
    assert setting_text(one).startswith("layers 0,2: a_shape(window=64, sink=64, block=64")
    assert "1: dense; 3: pooled_topk(density=0.5)" in setting_text(one)
    assert simplest([LOW, LOW]) == LOW
    assert simplest([None, None]) is None
    assert setting_text(None) == "dense"
    assert layer_budget(one, 9) is None  # a layer that was not measured


def test_a_policy_by_layer_is_judged_and_both_hypotheses_tested() -> None:
    meter = Needy()
    policy = found_by(meter, "layers", (1024, 4096)).policy("p")
    judged = evaluate(meter, [SINGLE, CHAINS], [1024, 4096], policy, BUDGETS, contexts=128, mapped=64, tolerated=0.05)
    assert judged.keeps(None)
    assert judged.density(None) == pytest.approx((0.1 + 0.4) / 2)
    assert judged.best_fixed == judged.steps - 1  # dense
    test = hypotheses_of(judged, "a_shape, last=2")
    assert [(one.tolerant.task, one.other.task) for one in test.differs] == [("single", "chains")]
    assert test.differs[0].gap > 0.4
    assert {one.task: one.verdict for one in test.falls} == {"single": "nothing is lost", "chains": "not shown"}


@dataclass
class Unsure:
    """A model that is right nine times in ten, about other questions under every budget: as much is gained as lost."""

    contexts: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    batches: bool = True

    def run(self, task: str, length: int, seed: int, setting: Setting | None) -> Outcome:
        self.contexts.setdefault((setting_text(setting), length), set()).add(seed)
        right = Random(f"{task} {length} {seed} {setting_text(setting)}").random() < 0.9
        return Outcome((float(right),), 1.0 if setting is None else 0.1)

    def prefetch(self, task: str, length: int, seeds: list[int], setting: Setting | None) -> bool:
        return self.batches

    def asked(self) -> int:
        return sum(len(seeds) for (text, _), seeds in self.contexts.items() if text != "dense")


def test_where_dense_is_unsure_no_budget_after_another_is_verified() -> None:
    meter = Unsure()
    goal = Goal(loss=0.01, questions=1, search=64, verify=1024)
    (cell,) = calibrate(meter, [SINGLE], [1024], {"a": BUDGETS["a_shape, last=2"]}, goal).cells
    assert cell.status is Status.UNSHOWN
    held_out = [trial for trial in cell.trials if trial.held_out]
    assert len(held_out) <= 2  # the second where chance made the first lose more than it gained
    assert all(trial.questions <= 512 for trial in held_out)  # it could hardly have passed


def test_a_refinement_found_nearby_is_not_searched_anew_where_nothing_can_be_told() -> None:
    meter = Unsure()
    goal = Goal(loss=0.01, questions=1, search=64, verify=256)
    start = Layered((LOW, LOW, None, LOW, None, LOW))
    cell = Refinement(Search(meter, CHAINS, 1024, METHOD, [LOW], goal), LAYERS, HEADS, None, LOW).run(start, True)
    assert cell is None or cell.status is Status.UNSHOWN
    assert all("pooled_topk" not in text for text, _ in meter.contexts)  # no head by itself
    assert meter.asked() < 1200


def test_contexts_are_asked_ahead_only_in_batches() -> None:
    """A meter that takes them one by one is asked about no more than the verification looks at."""
    goal = Goal(loss=0.05, questions=16, search=8, verify=64)
    found = []
    for batches in (True, False):
        meter = Unsure(batches=batches)
        meter.run = lambda task, length, seed, setting, run=meter.run: replace(  # type: ignore[method-assign, misc]
            run(task, length, seed, setting), scores=(1.0,) * 16
        )
        calibrate(meter, [SINGLE], [1024], {"a": BUDGETS["a_shape, last=2"]}, goal)
        found.append(meter.asked())
    assert found[1] < 25 < 64 < found[0]
