"""Skip-softmax in the C++ kernel against the eager reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.functional import sparse_attention
from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu
from sparsepass.kernels.attend.reference import listed_blocks
from sparsepass.kernels.types import BlockLists
from sparsepass.testing import Case, Inputs, cases, poisoned_empty
from tests.kernels.attend.skip_checks import SKIPS, check_bound, check_skipped, with_levels

pytestmark = pytest.mark.skipif(
    not cpu_native.available(torch.float32), reason="the C++ kernel cannot be built here; the other skips nothing"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TERMS = ("softcap", "slopes", "sinks")


def runner(inputs: Inputs) -> Callable[[float], tuple[Tensor, Tensor | None]]:
    def run(skip: float) -> tuple[Tensor, Tensor | None]:
        given = (inputs.q, inputs.k, inputs.v, inputs.kv_num_blocks, inputs.kv_indices)
        options: dict[str, Any] = {**inputs.mask, "scores": inputs.scores, "return_lse": True, "skip": skip}
        with poisoned_empty():
            return block_sparse_attention_cpu(*given, **options)

    return run


def ascending(inputs: Inputs) -> Callable[[int, int, int], Sequence[tuple[int, bool]]]:
    """The kernel meets a row's blocks as they are listed; each may be skipped."""
    blocks = -(-inputs.k.shape[2] // inputs.mask["kv_block"])
    named = listed_blocks(inputs.kv_num_blocks, inputs.kv_indices, blocks)
    named = named.expand(inputs.q.shape[0], inputs.q.shape[1], -1, -1)
    return lambda item, head, row: [(int(block), True) for block in named[item, head, row].nonzero().flatten()]


@given(cases(dtypes=DTYPES), st.sampled_from(SKIPS))
def test_skips_what_the_reference_skips(case: Case, skip: float) -> None:
    inputs = case.tensors()
    check_skipped(inputs, runner(inputs), ascending(inputs), case.q_block, case.kv_block, skip)


@given(cases(dtypes=(torch.float32,), terms=TERMS), st.sampled_from(SKIPS))
def test_skips_what_the_reference_skips_of_changed_scores(case: Case, skip: float) -> None:
    inputs = case.tensors()
    check_skipped(inputs, runner(inputs), ascending(inputs), case.q_block, case.kv_block, skip)


@given(cases(dtypes=DTYPES), st.sampled_from([1e-6, 1e-3]))
def test_what_is_lost_is_bounded(case: Case, skip: float) -> None:
    inputs = case.tensors()
    check_bound(inputs, runner(inputs), skip)


@given(cases(dtypes=DTYPES, bad=True))
def test_nonfinite_keys_are_not_skipped(case: Case) -> None:
    """A row that meets NaN comes out NaN, skipped blocks or not."""
    inputs = case.tensors()
    out, _ = runner(replace(inputs, v=torch.ones_like(inputs.v)))(0.5)
    whole, _ = runner(replace(inputs, v=torch.ones_like(inputs.v)))(0.0)
    assert torch.equal(out.isnan(), whole.isnan())


PLAIN = Case(
    batch=1, kv_heads=2, group=2, q_len=256, kv_len=256, head_dim=32, v_head_dim=32, dtype=torch.float32,
    q_block=64, kv_block=64, left=-1, right=0, offset=0, scale=0.2, layout="bshd", segments="none",
    lists="full", shared_lists="both", bad=0, seed=3,
)  # fmt: skip


def test_the_edge_is_at_the_logarithm() -> None:
    """log(0.1) is -2.3: of blocks 2.0 and 2.6 under the greatest score, the second is skipped."""
    inputs = with_levels(PLAIN.tensors(), [0.0, -2.0, -2.6, -1.0])
    assert check_skipped(inputs, runner(inputs), ascending(inputs), 64, 64, 0.1)


def test_blocks_far_under_the_greatest_score_are_skipped_and_nothing_else_is() -> None:
    inputs = PLAIN.tensors()
    inputs.q[..., 0] = 20.0
    inputs.k[..., 0] = 0.0
    inputs.k[:, :, :64, 0] = 5.0  # the first block's scores are 20 above all others
    assert check_skipped(inputs, runner(inputs), ascending(inputs), 64, 64, 1e-3)
    out, _ = runner(inputs)(1e-3)
    lists = BlockLists(inputs.kv_num_blocks, inputs.kv_indices, 64, 64, skip=1e-3)
    same = sparse_attention(inputs.q, inputs.k, inputs.v, lists, causal=True, scale=0.2)
    assert isinstance(same, Tensor)
    assert torch.equal(same, out)
    exact, _ = runner(inputs)(0.0)
    assert not torch.equal(out, exact)
    torch.testing.assert_close(out, exact, atol=1e-4, rtol=0)
    with pytest.raises(KernelInputError, match=r"lists.skip is 1.0; accepted is 0"):
        sparse_attention(inputs.q, inputs.k, inputs.v, replace(lists, skip=1.0), causal=True)
