"""Vertical-slash and FlexPrefill selection on the CPU against the eager reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.slash.api import select_vertical_slash, steps_of
from sparsepass.kernels.types import Visible
from sparsepass.methods import FlexPrefill, VerticalSlash
from sparsepass.testing import Case, cases
from tests.kernels.slash.slash_checks import (
    Drawn,
    check_estimate,
    check_flex,
    check_lists,
    check_vertical_slash,
    check_windows,
)

CPU = steps_of(torch.device("cpu"))
DRAWN: dict[str, Any] = {"max_len": 300, "lists": ("full",), "equal_v_dim": True, "head_dims": (16, 24)}
DRAWN |= {"dtypes": (torch.float32, torch.bfloat16)}
DENSITIES = st.sampled_from([0.05, 0.3, 0.6, 0.99, 1.0])


@given(cases(**DRAWN), st.sampled_from([64, 128, 512]))
def test_windows(case: Case, queries: int) -> None:
    check_windows(Drawn.of(case, "cpu"), queries)


@given(cases(**DRAWN), st.sampled_from([64, 128]))
def test_estimate(case: Case, queries: int) -> None:
    check_estimate(Drawn.of(case, "cpu"), queries, CPU)


@given(cases(**DRAWN), DENSITIES, st.booleans(), st.sampled_from([None, 1, 70]), st.sampled_from([None, 1, 40]))
def test_vertical_slash(case: Case, density: float, per_head: bool, columns: int | None, slashes: int | None) -> None:
    dial = None
    if per_head:
        dial = torch.rand(case.batch, case.heads, generator=torch.Generator().manual_seed(case.seed)) * 1.1
    check_vertical_slash(Drawn.of(case, "cpu"), CPU, density, dial, columns, slashes)


AWARE_AND_UNALIGNED = Case(
    batch=1, kv_heads=2, group=3, q_len=390, kv_len=700, head_dim=64, v_head_dim=64, dtype=torch.bfloat16, q_block=16,
    kv_block=16, left=199, right=0, offset=-195, scale=0.1, layout="bshd", segments="packed_pad", lists="full",
    shared_lists="both", bad=0, seed=10121,
)  # fmt: skip
"""Every head is query-aware and has no least sets; near diagonals touch three diagonals of blocks."""


@example(AWARE_AND_UNALIGNED, 0.3, 0.3, 0)
@given(
    cases(**DRAWN),
    st.sampled_from([0.3, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    st.sampled_from([0, 64, 200]),
)
def test_flex_prefill(case: Case, gamma: float, tau: float, min_budget: int) -> None:
    check_flex(Drawn.of(case, "cpu"), CPU, gamma, tau, min_budget)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flex_prefill_computes_no_more_than_most(tau: float) -> None:
    """In query-aware heads the map takes all that the least sets leave of it."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 4096, 32, generator=generator)
    k = torch.randn(1, 2, 4096, 32, generator=generator)
    method = FlexPrefill(0.95, tau, most=0.3, block=64)
    counter = torch.zeros(3, dtype=torch.int64)
    lists = method.select(q, k, scale=0.1, visible=Visible(right=0), counter=counter)
    block_sparse_attention(q, k, k, lists, scale=0.1, visible=Visible(right=0), counter=counter)
    assert counter[2] == 4 * 64 * 65 // 2
    whole_blocks = 64 / (64 * 65 / 2)  # a budget is in whole blocks per row
    assert 0.15 < int(counter[1]) / int(counter[2]) <= method.max_density + whole_blocks


@given(cases(**DRAWN, bad=True), st.booleans())
def test_nonfinite_inputs_keep_lists_valid(case: Case, flexible: bool) -> None:
    drawn = Drawn.of(case, "cpu")
    method = FlexPrefill(0.9, 0.3, 64, block=64) if flexible else VerticalSlash(0.5, block=64, queries=64)
    lists = method.select(drawn.q, drawn.k, scale=drawn.scale, visible=drawn.visible, counter=None)
    check_lists(drawn, lists)
    block_sparse_attention(drawn.q, drawn.k, drawn.k, lists, scale=drawn.scale, visible=drawn.visible)


@pytest.mark.parametrize("method", [VerticalSlash(0.9, block=64), FlexPrefill(0.95, 0.1, 64, most=0.9, block=64)])
def test_finds_planted_keys_and_distances(method: VerticalSlash | FlexPrefill) -> None:
    """One key that all queries read, and one distance at which all do: kept, and the output is that of dense."""
    generator = torch.Generator().manual_seed(0)
    length, dim, far = 1024, 64, 700
    q = torch.randn(1, 2, length, dim, generator=generator)
    k = torch.randn(1, 1, length, dim, generator=generator)
    q[..., 0] = 12.0
    k[..., 0] = 0.0
    k[:, :, 333, 0] = 12.0  # the planted key
    shared = torch.randn(length, dim - 1, generator=generator) * 2
    k[0, 0, :, 1:] = shared
    q[0, 0, far:, 1:] = shared[: length - far]  # the planted distance, in head 0
    v = torch.randn(1, 1, length, dim, generator=generator)
    visible = Visible(right=0)
    lists = method.select(q, k, scale=0.125, visible=visible, counter=None)
    assert lists.columns is not None
    assert 333 in lists.columns.indices[0, 0, 0, : int(lists.columns.num[0, 0, 0])].tolist()
    last = lists.kv_indices[0, 0, -1, : int(lists.kv_num_blocks[0, 0, -1])].tolist()
    assert (length - 1 - far) // 64 in last
    out, _ = block_sparse_attention(q, k, v, lists, scale=0.125, visible=visible)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125, enable_gqa=True)
    assert float((out - dense)[:, :, 400:].abs().mean()) < 0.05


def test_refusals() -> None:
    q = torch.randn(1, 2, 64, 16)
    options: dict[str, Any] = {"scale": 1.0, "visible": Visible(), "density": 0.5}
    with pytest.raises(KernelInputError, match="queries is 100; accepted are multiples of 64"):
        select_vertical_slash(q, q, **options, queries=100)
    with pytest.raises(KernelInputError, match=r"dial is torch.float32 \(3, 2\)"):
        select_vertical_slash(q, q, **options, dial=torch.rand(3, 2))
    with pytest.raises(KernelInputError, match="block is 32"):
        select_vertical_slash(q, q, **options, block=32)
