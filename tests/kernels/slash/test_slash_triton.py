"""Vertical-slash and FlexPrefill in Triton against the eager reference: on a GPU, else under the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.testing import Case, cases, poisoned_empty
from tests.kernels.device import DEVICE, EXAMPLES, FEWER, GPU, GROUPED, GROUPS, pytestmark  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.slash.api import triton_steps
from sparsepass.kernels.slash.best import Best
from sparsepass.kernels.slash.cpu import keep_best_cpu
from sparsepass.kernels.slash.reference import best_reference
from sparsepass.kernels.slash.triton.best import keep_best_cuda
from sparsepass.kernels.types import Visible
from sparsepass.methods import FlexPrefill, VerticalSlash
from tests.kernels.slash.slash_checks import (
    Drawn,
    check_estimate,
    check_flex,
    check_lists,
    check_vertical_slash,
    check_windows,
)

STEPS = triton_steps()
DRAWN: dict[str, Any] = {"lists": ("full",), "equal_v_dim": True, "max_len": 130, "head_dims": (16, 24)}
DRAWN["groups"] = GROUPS
if GPU:
    DRAWN |= {
        "dtypes": (torch.bfloat16, torch.float32),
        "head_dims": (64, 80),
        "max_len": 700,
        "layouts": ("bshd", "strided_dim"),
    }


@settings(max_examples=FEWER if GPU else 3)
@example(GROUPED if GPU else replace(GROUPED, kv_len=100, offset=60), 64)
@given(cases(**DRAWN), st.sampled_from([64, 128]))
def test_estimate(case: Case, queries: int) -> None:
    drawn = Drawn.of(case, DEVICE)
    check_windows(drawn, queries)
    check_estimate(drawn, queries, STEPS)


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, float("nan"), float("inf"), float("-inf")]), st.floats(-4, 4, width=32)
)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(VALUES, min_size=1, max_size=40),
    st.integers(0, 45),
    st.integers(0, 38),
    st.integers(0, 4),
    st.sampled_from([None, 0.0, 0.5, 0.9, 1.0]),
    st.integers(0, 5),
)
def test_keep_best(values: list[float], most: int, first: int, forced: int, share: float | None, least: int) -> None:
    given_values = torch.tensor([[values]], dtype=torch.float32, device=DEVICE)
    kept = {first + i for i in range(forced)} & set(range(len(values)))
    exact = given_values[0, 0].tolist()
    expected = best_reference(exact, most, kept, share, least)
    options: dict[str, Any] = {"most": most, "width": 50, "forced": forced}
    options["first"] = torch.tensor([first], dtype=torch.int32, device=DEVICE)
    if share is not None:
        options["share"] = torch.full((1, 1), share, device=DEVICE)
        options["least"] = torch.full((1, 1), least, dtype=torch.int32, device=DEVICE)

    def check(best: Best) -> None:
        num = int(best.num[0, 0])
        got = best.indices[0, 0, :num].tolist()
        assert best.flags[0, 0].nonzero().flatten().tolist() == got == sorted(set(got))
        if share in (None, 0.0):
            assert got == expected
        else:  # sums in another order may take one more or less
            assert len(set(got) ^ set(expected)) <= 1

    with poisoned_empty():
        check(keep_best_cuda(given_values, **options))
    if not GPU:
        check(keep_best_cpu(given_values, **options))


@settings(max_examples=FEWER)
@given(cases(**DRAWN), st.sampled_from([0.3, 0.6, 0.99, 1.0]), st.booleans(), st.sampled_from([None, 40]))
def test_vertical_slash(case: Case, density: float, per_head: bool, limit: int | None) -> None:
    dial: Tensor | None = None
    if per_head:
        dial = torch.rand(case.batch, case.heads, generator=torch.Generator().manual_seed(case.seed)) * 1.1
        dial = dial.to(DEVICE)
    check_vertical_slash(Drawn.of(case, DEVICE), STEPS, density, dial, limit, limit)


@settings(max_examples=FEWER)
@given(cases(**DRAWN), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.3]), st.sampled_from([0, 64]))
def test_flex_prefill(case: Case, gamma: float, tau: float, min_budget: int) -> None:
    check_flex(Drawn.of(case, DEVICE), STEPS, gamma, tau, min_budget)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("method", [VerticalSlash(0.4), FlexPrefill(0.9, 0.3)])
def test_captured_in_a_cuda_graph_and_the_same_every_time(method: VerticalSlash | FlexPrefill) -> None:
    q = torch.randn(2, 4, 3000, 64, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 3000, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    padding = torch.zeros(2, 3000, dtype=torch.int32, device=DEVICE)
    padding[1, :777] = -1
    visible = Visible(right=0, kv_segments=padding)

    def run() -> Tensor:
        lists = method.select(q, k, scale=0.125, visible=visible, counter=None)
        assert lists.columns is not None
        return block_sparse_attention(q, k, v, lists, scale=0.125, visible=visible)[0]

    assert torch.equal(run(), run())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("method", [VerticalSlash(0.1), FlexPrefill(0.9, 0.1)])
def test_long_rows_keep_to_the_mask_and_their_budget(method: VerticalSlash | FlexPrefill) -> None:
    q = torch.randn(1, 4, 65536, 64, device=DEVICE, dtype=torch.bfloat16)
    k = torch.randn(1, 2, 65536, 64, device=DEVICE, dtype=torch.bfloat16)
    counter = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    visible = Visible(right=0)
    lists = method.select(q, k, scale=0.125, visible=visible, counter=counter)
    block_sparse_attention(q, k, k, lists, scale=0.125, visible=visible, counter=counter)
    assert counter[2] == 4 * 512 * 513 // 2
    assert 0 < int(counter[1]) <= (method.max_density + 0.01) * int(counter[2])
    rows = torch.arange(512, device=DEVICE)
    last = lists.kv_indices.gather(3, (lists.kv_num_blocks - 1).clamp(min=0).long()[..., None])[..., 0]
    assert torch.equal(last, rows.int().expand_as(last))


def test_nonfinite_inputs_keep_lists_valid() -> None:
    case = Case(
        batch=1, kv_heads=1, group=2, q_len=130, kv_len=130, head_dim=64 if GPU else 16, v_head_dim=64 if GPU else 16,
        dtype=torch.float32, q_block=64, kv_block=64, left=-1, right=0, offset=0, scale=0.2, layout="bshd",
        segments="left_pad", lists="full", shared_lists="none", bad=3, seed=3,
    )  # fmt: skip
    drawn = Drawn.of(case, DEVICE)
    from sparsepass.kernels.slash.api import select_vertical_slash

    with poisoned_empty():
        lists = select_vertical_slash(
            drawn.q, drawn.k, scale=0.2, visible=drawn.visible, density=0.9, queries=64, block=64, steps=STEPS
        )
    check_lists(drawn, lists)
