"""Evaluation of a policy on made-up models, and the fit of safe density against length."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.measure.calibrate.cell import Goal
from sparsepass.measure.calibrate.evaluate import evaluate
from sparsepass.measure.calibrate.evaluate_command import as_json
from sparsepass.measure.calibrate.evaluate_table import tables
from sparsepass.measure.calibrate.fit import Curve, difference, falling, fit
from sparsepass.measure.calibrate.plots import draw
from sparsepass.measure.calibrate.run import calibrate
from sparsepass.policies.policy import Policy
from sparsepass.reports.table import plain_text
from tests.measure.test_calibrate import SINGLE, STEPS, TOP, MadeUp

LENGTHS = (1024, 2048, 4096, 8192)


class Law(MadeUp):
    """Loses answers smoothly: half of what is tolerated where density is ``need``, less the denser it is."""

    def true_loss(self, task: str, length: int, density: float) -> float:
        return min(0.9, 0.025 * (self.need[task, length] / density) ** 3)


def law(single: float = 0.5, top: float = 0.0) -> Law:
    """``single`` needs a density that falls as the square root of the length, ``top`` the same at every length."""
    need = {("single", length): 0.2 * (length / 1024) ** -single for length in LENGTHS}
    need |= {("top", length): 0.5 * (length / 1024) ** -top for length in LENGTHS}
    return Law(need, dense=0.98)


def test_a_policy_computes_less_than_the_best_fixed_budget_that_keeps_as_much() -> None:
    meter = law()
    found = calibrate(meter, [SINGLE, TOP], LENGTHS, STEPS, Goal(loss=0.05, verify=128))
    policy = found.policy("p")
    judged = evaluate(meter, [SINGLE, TOP], LENGTHS, policy, STEPS, contexts=64, tolerated=0.05)
    assert judged.keeps(None)
    assert judged.density(None) < 0.8 * judged.density(judged.best_fixed)
    assert judged.equal_compute is not None
    assert not judged.keeps(judged.equal_compute)
    assert judged.worst(judged.equal_compute) > judged.worst(None)


def test_the_fit_finds_the_law_that_was_put_in() -> None:
    meter = law()
    judged = evaluate(meter, [SINGLE, TOP], LENGTHS, Policy("dense"), STEPS, contexts=48, tolerated=0.05)
    fits = judged.fits("pooled_topk")
    wanted = 0.2 * (0.025 / 0.05) ** (1 / 3)  # where the loss is 0.05, at 1024 tokens
    assert fits["single"].scale.low <= wanted <= fits["single"].scale.high
    assert fits["single"].exponent.low <= 0.5 <= fits["single"].exponent.high
    assert fits["single"].exponent.low > 0.2
    assert fits["single"].falls > 0.99
    assert fits["top"].exponent.low < 0.05
    assert difference(fits["single"], fits["top"]).high < 0.5
    assert judged.density(None) == pytest.approx(1.0)
    assert judged.keeps(None)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=5, max_size=5), min_size=1, max_size=3))
def test_falling_is_isotonic_regression(rows: list[list[float]]) -> None:
    given_curve = torch.tensor(rows, dtype=torch.float64)
    made = falling(given_curve)
    assert (made.diff(dim=-1) <= 1e-9).all()
    for row, wanted in zip(made.tolist(), (pool(row) for row in rows), strict=True):
        assert row == pytest.approx(wanted, abs=1e-9)


def pool(values: list[float]) -> list[float]:
    """Pool adjacent violators, for a curve that must not rise."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            mean, size = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * size) / (blocks[-1][1] + size), blocks[-1][1] + size]
    return [mean for mean, size in blocks for _ in range(int(size))]


def test_safe_densities_at_the_ends() -> None:
    def curve(*losses: float) -> Curve:
        return Curve(1024, torch.ones(4, 3).double(), torch.tensor([losses] * 4).double(), (0.1, 0.2, 0.4))

    assert float(curve(0.0, 0.0, 0.0).safe(0.05)) == pytest.approx(0.1)  # as sparse as was tried
    assert float(curve(0.9, 0.9, 0.9).safe(0.05)) > 0.9  # between the densest and dense, near dense
    assert float(curve(0.1, 0.0, 0.0).safe(0.05)) == pytest.approx(0.1 * math.sqrt(2))
    assert math.isnan(fit([curve(0.1, 0.0, 0.0)], 0.05).exponent.value)


def test_tables_json_and_plots(tmp_path: Path) -> None:
    judged = evaluate(law(), [SINGLE, TOP], LENGTHS[:2], Policy("dense"), STEPS, contexts=8, tolerated=0.05)
    text = plain_text(tables(judged), 140)
    for words in ("single", "safe density = scale", "The policy keeps 95.0%", "tolerance differs by task"):
        assert words in text, words
    content = json.loads(json.dumps(as_json(judged)))
    assert [place["length"] for place in content["places"]] == [1024, 1024, 2048, 2048]
    assert len(content["fits"]["pooled_topk"]["single"]["points"]) == 2
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in draw(judged, tmp_path))
