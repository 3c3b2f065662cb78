"""Fitting and judging: thresholds hold what they promise, areas are of all pairs, held-out tasks are not fitted on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.measure.auto import AutoError, Router
from sparsepass.measure.auto.__main__ import main
from sparsepass.measure.auto.collect import collect
from sparsepass.measure.auto.compare import CANDIDATES, Goal, compare, reference, split
from sparsepass.measure.auto.fit import Rows, logistic, rows_of, safe_threshold, scores, spare_threshold
from sparsepass.measure.auto.fitting import fit_router
from sparsepass.measure.auto.judge import auc, judge
from sparsepass.measure.auto.probe import SIGNALS
from sparsepass.measure.auto.records import THEN, TOLD, Place, Records
from sparsepass.measure.tasks.tokens import TOKEN_TASKS
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.types import Budget, TaskClass
from tests.tiny import model

CHEAP, STRESS = "a_shape", "pooled_topk(density=0.3)"
TASKS = {"one": "single_qa", "four": "multi_qa", "hops": "multi_hop"}


def records(count: int = 60, shy: bool = True) -> Records:
    """Three tasks; only hops fails under the cheap budget, all fail under the other. ``shift`` tells (if not ``shy``,
    nothing does)."""
    generator = torch.Generator().manual_seed(5)
    places = []
    for task, task_class in TASKS.items():
        for template in (0, 1):
            for length in (1024, 4096):
                dense = [place % 20 != 7 for place in range(count)]
                about = (task, task_class, template, length)
                places.append(Place(*about, "dense", 1.0, tuple(dense)))
                for budget in (CHEAP, STRESS):
                    fails = 0.8 if task == "hops" or budget == STRESS else 0.0
                    lost = torch.rand(count, generator=generator) < fails
                    signals = {name: torch.randn(count, generator=generator) for name in SIGNALS}
                    if shy:
                        signals["shift"] += 8.0 * lost
                    columns = {name: tuple(column.tolist()) for name, column in signals.items()}
                    right = tuple(a and not b for a, b in zip(dense, lost.tolist(), strict=True))
                    places.append(Place(*about, budget, 400 / length, right, columns))
    return Records(tuple(places), {"probe": {"rows": 16}, "weights": "x"})


def test_records_read_back_as_they_were(tmp_path: Path) -> None:
    made = records(5)
    made.save(tmp_path / "records.json")
    assert Records.load(tmp_path / "records.json") == made
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(AutoError, match="no records"):
        Records.load(tmp_path / "other.json")


def test_rows_are_requests_that_dense_answers_right() -> None:
    held = records(40)
    rows = rows_of(held, held.of(budget=CHEAP, task="hops"), ("shift", "entropy"))
    assert len(rows.lost) == 4 * 38
    assert rows.values.shape == (4 * 38, 2)
    halves = [len(rows_of(held, held.of(budget=CHEAP, task="hops"), ("shift",), part).lost) for part in (0, 1)]
    assert sum(halves) == 4 * 38
    with pytest.raises(AutoError, match="no signal mood"):
        rows_of(held, held.of(budget=CHEAP), ("mood",))


def test_weights_are_never_negative_and_find_the_signal() -> None:
    held = records()
    rows = rows_of(held, held.of(template=0, budget={CHEAP, STRESS}), SIGNALS)
    terms, bias = logistic(rows)
    assert all(term.weight >= 0 for term in terms.values())
    assert max(terms, key=lambda name: terms[name].weight) == "shift"
    assert auc(scores(rows, terms, bias), rows.lost) > 0.99
    turned = replace(rows, names=("shift",), values=-rows.values[:, 4:5])
    assert logistic(turned)[0]["shift"].weight < 1e-3, "a signal that points the wrong way counts for nothing"
    with pytest.raises(AutoError, match="needs both"):
        logistic(rows.take(~rows.lost))


@st.composite
def scored(draw: st.DrawFn) -> tuple[Rows, torch.Tensor]:
    count = draw(st.integers(2, 40))
    lost = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    cell = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    score = torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))).double()
    places = tuple(Place(f"t{at // 2}", "single_qa", 0, 100 + at, "b", 0.1, ()) for at in range(3))
    return Rows(("shift",), score[:, None], lost, cell, places, torch.zeros_like(lost), (1.0,) * 3), score


@given(scored(), st.floats(0.01, 0.5))
def test_thresholds_hold_what_they_promise(made: tuple[Rows, torch.Tensor], share: float) -> None:
    rows, score = made
    safe = judge(rows, score, safe_threshold(rows, score, share), {}, 0.1)
    for task in ("t0", "t1"):
        cells = [cell for cell in safe.cells if cell.place.task == task]
        assert sum(cell.missed for cell in cells) <= share * sum(cell.questions for cell in cells)
    again = score >= spare_threshold(rows, score, share)
    for cell in range(3):
        kept = (rows.cell == cell) & ~rows.lost
        if 2 * int(kept.sum()) >= int((rows.cell == cell).sum()):
            assert int((again & kept).sum()) <= share * int(kept.sum())


@given(scored())
def test_the_area_is_that_of_all_pairs(made: tuple[Rows, torch.Tensor]) -> None:
    rows, score = made
    bad, good = score[rows.lost], score[~rows.lost]
    if len(bad) == 0 or len(good) == 0:
        assert auc(score, rows.lost) != auc(score, rows.lost)
        return
    pairs = (bad[:, None] > good).double() + 0.5 * (bad[:, None] == good).double()
    assert auc(score, rows.lost) == pytest.approx(float(pairs.mean()))


def test_a_held_out_task_is_not_fitted_on() -> None:
    held = records()
    router = CANDIDATES[-1]
    parts = split(held, CHEAP, "task", router)
    assert len(parts) == 3
    for part in parts:
        tested = {place.task for place in part.test.cells}
        assert len(tested) == 1
        assert not tested & {place.task for place in part.train.cells}
        assert {place.budget for place in part.test.cells} == {CHEAP}
    (part,) = split(held, CHEAP, "template", router)
    assert {place.template for place in part.test.cells} == {1}
    assert {place.template for place in part.train.cells} == {0}


def test_a_signal_that_tells_saves_and_one_that_does_not_saves_nothing() -> None:
    held, goal = records(), Goal(spare=0.05)
    assert reference(held, CHEAP, goal) == pytest.approx((2 * (400 / 1024 + 400 / 4096) / 2 + 1) / 3)
    names = ("length alone", "length and hint", "uncertainty", "recheck", "router")
    found = compare(held, CHEAP, goal, [one for one in CANDIDATES if one.name in names], resamples=5)
    for held_out in ("requests", "template", "task"):
        told = found.of("recheck", held_out)
        assert told.auc[0] > 0.99
        assert told.verdict.kept > 0.98
        assert told.saving > 0.6
        assert found.of("router", held_out).saving > 0.5
        blind = found.of("uncertainty", held_out)
        assert abs(blind.auc[0] - 0.5) < 0.25 if held_out != "task" else True
        assert found.of("length alone", held_out).saving == pytest.approx(0.0) or held_out == "task"
    assert found.of("length and hint", "template").saving == pytest.approx(1.0)
    assert found.of("length and hint", "task").saving == pytest.approx(0.0), "a class that was not seen stays dense"


def test_a_fitted_router_says_what_it_was_held_against(tmp_path: Path) -> None:
    router, verdict = fit_router(records(), CHEAP, Goal(), name="mine")
    assert router.holds_at(1024)
    assert router.holds_at(4096)
    assert not router.holds_at(5000)
    assert router.budgets == (CHEAP,)
    assert router.calibrated == {"weights": "x"}
    tasks = router.shown["tasks"]
    assert tasks["hops"]["missed"] == sum(cell.missed for cell in verdict.cells if cell.place.task == "hops")
    router.save(tmp_path / "router.json")
    assert Router.load(tmp_path / "router.json") == router
    with pytest.raises(AutoError, match="No router reads"):
        fit_router(records(), CHEAP, Goal(), candidate="length alone")


def test_the_commands_write_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records(24).save(tmp_path / "records.json")
    given = ["--records", str(tmp_path / "records.json")]
    assert main(["fit", *given, "--out", str(tmp_path / "router.json"), "--reads", "recheck"]) == 0
    assert set(Router.load(tmp_path / "router.json").terms) == {"shift"}
    picture, file = tmp_path / "auto.png", tmp_path / "auto.json"
    assert (
        main(
            [
                "compare",
                *given,
                "--out",
                str(file),
                "--plot",
                str(picture),
                "--resamples",
                "3",
                "--markdown",
                str(tmp_path / "a.md"),
            ]
        )
        == 0
    )
    assert "| each task in turn | `hops` |" in (tmp_path / "a.md").read_text()
    assert picture.stat().st_size > 10_000
    assert {one["held_out"] for one in json.loads(file.read_text())["found"]} == {"requests", "template", "task"}
    assert "each task in turn" in capsys.readouterr().out
    assert main(["fit"]) == 2
    assert main(["compare", *given, "--cheap", "nothing"]) == 2
    assert "have no budget 'nothing'" in capsys.readouterr().err


def test_a_collected_place_has_answers_density_and_every_signal(fresh_dynamo: None) -> None:
    net = copy.deepcopy(model(vocab_size=4096))
    cheap = Budget("a_shape", {"window": 64, "sink": 64, "block": 64})
    tasks = [task for task in TOKEN_TASKS if task.name == "token_needle"]
    dense, sparse = collect(net, tasks, [512], [cheap, cheap], templates=[0], requests=2)
    assert (dense.budget, dense.density, len(dense.right), dense.signals) == ("dense", 1.0, 2, {})
    assert sparse.budget.startswith("a_shape")
    assert sparse.density < 0.7
    assert set(sparse.signals) == set(SIGNALS)
    assert all(len(column) == 2 for column in sparse.signals.values())


def test_what_runs_again_is_judged_by_what_it_runs_under() -> None:
    """Under ``then`` a third of the cost, and what it loses is missed, too; the reference is the policy's own."""
    held = records()
    places = list(held.places)
    for place in held.places:
        if place.budget == "dense":
            second = tuple(right and at % 10 != 3 for at, right in enumerate(place.right))
            places.append(replace(place, budget=THEN, density=0.3, right=second))
            places.append(replace(place, budget=TOLD, density=0.2))
    both = Records(tuple(places), held.about)
    assert both.tried() == held.tried() == [CHEAP, STRESS]
    rows = rows_of(both, both.of(budget=CHEAP, task="hops"), ("shift",))
    everything = judge(rows, torch.ones(len(rows.lost)), 0.0, {1024: 0.01, 4096: 0.01}, 0.05)
    for cell in everything.cells:
        assert cell.cost == pytest.approx(400 / cell.place.length + 0.01 + 0.3)
        assert cell.missed == sum(at % 10 == 3 and at % 20 != 7 for at in range(60))
    nothing = judge(rows, torch.zeros(len(rows.lost)), 1.0, {}, 0.05)
    assert sum(cell.missed for cell in nothing.cells) == int(rows.lost.sum())
    halves = rows.take(torch.arange(len(rows.lost)) % 2 == 0)
    assert len(halves.missed(torch.ones_like(halves.lost))) == len(halves.lost)
    assert reference(both, CHEAP, Goal()) == pytest.approx(0.2)
    (found,) = (
        one for one in compare(both, CHEAP, Goal(), CANDIDATES[-1:], resamples=2).found if one.held_out == "task"
    )
    assert found.verdict.cost < 1


def test_a_policy_says_what_runs_again_and_what_is_told(fresh_dynamo: None) -> None:
    net = copy.deepcopy(model(vocab_size=4096))
    cheap = Budget("a_shape", {"window": 64, "sink": 64, "block": 64})
    unknown = Budget("a_shape", {"window": 128, "sink": 64, "block": 64})
    policy = Policy("mine", (Rule(TaskClass.SINGLE_QA, cheap), Rule(TaskClass.UNKNOWN, unknown)))
    tasks = [task for task in TOKEN_TASKS if task.name in ("token_needle", "token_chains")]
    found = collect(net, tasks, [512], [cheap], templates=[0], requests=2, policy=policy)
    assert [place.budget for place in found[:4]] == ["dense", found[1].budget, THEN, TOLD]
    by_name = {(place.task, place.budget): place for place in found}
    needle, chains = (by_name["token_needle", TOLD], by_name["token_chains", TOLD])
    assert needle.density == found[1].density < by_name["token_needle", THEN].density < 1
    assert chains.density == 1  # the policy has no rule for it
    assert not needle.signals
    with pytest.raises(AutoError, match=r"gives single_qa a_shape.*is to be tried first"):
        collect(net, tasks, [512], [unknown], policy=policy)


def test_nothing_is_tried_where_that_costs_as_much_as_running_again() -> None:
    """At 1K the cheap budget costs 0.39, at 4K 0.10; a second pass of 0.35 is worth waiting for at 4K alone."""
    held = records()
    second = [replace(place, budget=THEN, density=0.35) for place in held.places if place.budget == "dense"]
    both = Records((*held.places, *second), held.about)
    router, verdict = fit_router(both, CHEAP, Goal(spare=0.05), candidate="recheck")
    assert not router.holds_at(1024)
    assert router.holds_at(4096)
    for cell in verdict.cells:
        assert (cell.cost == pytest.approx(0.35)) == (cell.place.length == 1024)
        assert cell.again == 0 or cell.place.length == 4096
    dear = Records((*held.places, *(replace(place, density=0.05) for place in second)), held.about)
    with pytest.raises(AutoError, match="without a hint that runs at once"):
        fit_router(dear, CHEAP, Goal(spare=0.05), candidate="recheck")
