"""What methods that follow the data are taken to compute and to cost: the shipped table, and how it is read."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.types import Visible
from sparsepass.methods import AShape, FlexPrefill, Method, PooledTopK, Threshold, TopP, VerticalSlash, XAttention, rows
from sparsepass.testing import structured_inputs
from sparsepass.types import Budget, TaskClass

K = 1024
SCRIPT = Path(__file__).parents[2] / "docs" / "measurements" / "densities.py"
METHODS: dict[str, Method] = {
    "threshold": Threshold(),
    "top_p, pooled": TopP(),
    "top_p, mass": TopP(score="mass"),
    "xattention": XAttention(),
    "vertical_slash": VerticalSlash(0.1),
    "flex_prefill": FlexPrefill(),
}
MEASURED: list[dict[str, Any]] = json.loads(
    resources.files("sparsepass.methods").joinpath("densities.json").read_text()
)["measured"]


def at(method: Method, dial: float) -> Method:
    return replace(method, **{str(method.dial): dial})  # type: ignore[type-var]


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: f"{one['curve']} {one['length']}")
def test_measured_points_are_read_as_they_are(one: dict[str, Any]) -> None:
    for dial, share, *timed in one["points"]:
        method = at(METHODS[one["curve"]], dial)
        if not isinstance(method, VerticalSlash):  # its density is what it is asked to compute
            assert method.density_at(one["length"]) == pytest.approx(share)
        assert not timed or method.cost_at(one["length"]) == pytest.approx(max(timed[0], share + timed[1]))


@given(st.sampled_from(sorted(METHODS)), st.floats(0.001, 1), st.floats(0.001, 1), st.integers(1, 1 << 21))
def test_a_dearer_dial_and_a_shorter_text_compute_no_less(curve: str, one: float, other: float, length: int) -> None:
    kind = METHODS[curve]
    cheap, dear = sorted((one, other), key=lambda dial: -abs(kind.dial_at_all - dial))
    low, high = at(kind, cheap), at(kind, dear)
    slack = 0.002  # of what was measured
    assert 0 < low.density_at(length) <= high.density_at(length) + slack
    assert high.density_at(2 * length) <= high.density_at(length) + slack
    assert high.density_at(length) <= high.max_density
    assert at(kind, kind.dial_at_all).density_at(length) == 1.0


def test_what_was_given_holds_over_what_was_measured() -> None:
    assert Threshold(expected_density=0.3).density_at(8 * K) == 0.3
    assert FlexPrefill(expected_density=0.3, most=0.2).density_at(8 * K) == 0.2
    assert Threshold(0.05, expected_density=0.3).mean_density == 0.3
    cap = TopP.cap([TopP(0.5), TopP(0.9, expected_density=0.2)])
    assert cap == TopP(0.9, expected_density=max(0.2, TopP(0.5).mean_density))
    assert TopP.cap([TopP(0.5), TopP(0.9)]) == TopP(0.9)


def test_selection_costs_what_it_takes() -> None:
    """Sampling queries takes time that grows with the length alone: dear on short texts. Means cost next to nothing."""
    assert PooledTopK(0.1).cost_at(8 * K) == 0.1
    assert AShape().cost_at(8 * K) == AShape().density_at(8 * K)
    slashed = [VerticalSlash(0.1).cost_at(length) for length in (8 * K, 32 * K, 128 * K)]
    assert slashed == sorted(slashed, reverse=True)
    assert slashed[0] > 0.5 > slashed[1] > 0.25
    assert XAttention(stride=4).cost_at(32 * K) > XAttention().cost_at(32 * K) > XAttention().density_at(32 * K)
    assert TopP(score="antidiagonal").cost_at(32 * K) == pytest.approx(XAttention(0.9).cost_at(32 * K))
    shared = rows.share_batch({TaskClass.SINGLE_QA: Budget("vertical_slash", {"density": 0.1})}, 8 * K)
    assert shared is not None
    assert shared.cost(TaskClass.SINGLE_QA, 8 * K) == shared.cost(None, 8 * K) == slashed[0]


@pytest.mark.parametrize("curve", ["top_p, mass", "vertical_slash"])
def test_the_table_is_what_the_methods_compute(curve: str) -> None:
    """As the script measured it; it counts blocks as the kernels do, columns included."""
    inputs = structured_inputs(heads=16, kv_heads=4, length=4 * K, dtype=torch.float32)
    (points,) = (one["points"] for one in MEASURED if one["curve"] == curve and one["length"] == 4 * K)
    dial, share = points[-2]
    method = replace(at(METHODS[curve], dial), block=128)  # type: ignore[call-arg,type-var]
    visible = Visible(right=0)
    counter = torch.zeros(3, dtype=torch.int64)
    lists = method.select(inputs.query, inputs.key, scale=inputs.scale, visible=visible, counter=counter)
    computed = runpy.run_path(str(SCRIPT))["computed_blocks"](lists, 4 * K)
    assert computed / int(counter[2]) == pytest.approx(share, abs=1e-3)
    if curve == "vertical_slash":
        block_sparse_attention(
            inputs.query, inputs.key, inputs.value, lists, scale=inputs.scale, visible=visible, counter=counter
        )
        assert computed == int(counter[1])
