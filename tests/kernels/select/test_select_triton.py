"""Pooled top-k selection against the eager reference: on a GPU where there is one, else under the interpreter."""

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

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.reference import block_scores_reference, listed_blocks, select_blocks_reference
from sparsepass.kernels.blocks import blocks_per_row, list_width
from sparsepass.kernels.select.triton.topk import select_blocks_cuda

DRAWN: dict[str, Any] = {"lists": ("full",), "equal_v_dim": True, "max_len": 72, "groups": GROUPS}
if GPU:
    DRAWN |= {
        "dtypes": (torch.bfloat16, torch.float32),
        "blocks": (64, 128),
        "head_dims": (64, 80),
        "max_len": 1500,
        "layouts": ("bshd", "strided_dim"),
    }


def select(q: Tensor, k: Tensor, mask: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    with poisoned_empty():
        return select_blocks_cuda(q, k, **mask, **options)


def differing_scores(case: Case, q: Tensor, k: Tensor, mask: dict[str, Any], got: Any, want: Any) -> float:
    """How far apart the scores are of the blocks that only one of two selections has; 0 for equal selections."""
    scores, allowed, _ = block_scores_reference(q, k, **mask)
    ours, theirs = (listed_blocks(num, at, allowed.shape[-1]).to(scores.device) for num, at in (got, want))
    assert torch.equal(ours & ~allowed, torch.zeros_like(ours)), "a block without a visible pair was selected"
    low = torch.where(ours & ~theirs, scores, 0.0)
    high = torch.where(theirs & ~ours, scores, 0.0)
    return float((low.sum(-1) - high.sum(-1)).abs().max())


@settings(max_examples=EXAMPLES)
@example(GROUPED, 0.7, False, 1)
@given(cases(**DRAWN), st.floats(0, 1.1), st.booleans(), st.sampled_from([0, 1, 2, 99]))
def test_selects_what_the_reference_selects(case: Case, density: float, per_head: bool, last: int) -> None:
    inputs = case.tensors(DEVICE)
    wanted: float | Tensor = density
    if per_head:
        wanted = torch.rand(case.batch, case.heads, generator=torch.Generator().manual_seed(case.seed)).to(DEVICE)
    counter = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    got = select(inputs.q, inputs.k, inputs.mask, density=wanted, last=last, counter=counter)
    want = select_blocks_reference(inputs.q, inputs.k, **inputs.mask, density=wanted, last=last)
    assert torch.equal(got[0], want[0])
    assert differing_scores(case, inputs.q, inputs.k, inputs.mask, got, want) < 1e-4
    _, allowed, _ = block_scores_reference(inputs.q, inputs.k, **inputs.mask)
    assert counter.tolist() == [0, 0, int(allowed.sum())]


@settings(max_examples=EXAMPLES)
@given(cases(**DRAWN, segments=("none",)), st.floats(0, 1))
def test_ties_go_to_the_lower_index(case: Case, density: float) -> None:
    # Whole blocks of one of three values: averages and scores are exact, and most of them tie.
    case = replace(case, q_len=-(-case.q_len // case.q_block) * case.q_block, scale=1.0, layout="bhsd", offset=0)
    case = replace(case, kv_len=-(-case.kv_len // case.kv_block) * case.kv_block)
    generator = torch.Generator().manual_seed(case.seed)
    values = []
    for heads, length, block in (
        (case.heads, case.q_len, case.q_block),
        (case.kv_heads, case.kv_len, case.kv_block),
    ):
        coarse = torch.randint(-1, 2, (case.batch, heads, length // block, 1), generator=generator)
        values.append(coarse.repeat_interleave(block, 2).expand(-1, -1, -1, case.head_dim).to(case.dtype).to(DEVICE))
    mask = {**case.tensors(DEVICE).mask, "q_segments": None, "kv_segments": None}
    count, lists = select(values[0], values[1], mask, density=density)
    expected_count, expected = select_blocks_reference(values[0], values[1], **mask, density=density)
    assert torch.equal(count, expected_count)
    assert torch.equal(lists, expected)


@settings(max_examples=FEWER)
@given(cases(**DRAWN, bad=True), st.floats(0, 1))
def test_nonfinite_scores_keep_lists_valid_and_forced_blocks(case: Case, density: float) -> None:
    inputs = case.tensors(DEVICE)
    count, lists = select(inputs.q, inputs.k, inputs.mask, density=density)
    _, allowed, forced = block_scores_reference(inputs.q, inputs.k, **inputs.mask)
    named = listed_blocks(count, lists, allowed.shape[-1])
    assert not (named & ~allowed).any()
    assert not (forced & ~named).any()
    expected, _ = select_blocks_reference(inputs.q, inputs.k, **inputs.mask, density=density)
    assert torch.equal(count, expected)


def test_a_greater_density_than_declared_is_cut_to_it() -> None:
    q = torch.randn(1, 2, 640, 32, device=DEVICE)
    mask = {"scale": 1.0, "left": -1, "right": 0, "offset": 0, "q_segments": None, "kv_segments": None}
    mask |= {"q_block": 64, "kv_block": 64}
    density = torch.tensor([[0.9, 0.2]], device=DEVICE)
    count, lists = select(q, q, mask, density=density, max_density=0.5)
    budget = blocks_per_row(640, 640, -1, 0, 0, 64, 64, 0.5)
    assert lists.shape[-1] == list_width(640, 64, budget)
    assert count[0, 0].max() == budget
    assert count[0, 1].max() == max(3, blocks_per_row(640, 640, -1, 0, 0, 64, 64, float(density[0, 1])))


@pytest.mark.parametrize("blocks", [1024, 4096, 8192] if GPU else [300])
def test_long_rows_reach_the_density(blocks: int) -> None:
    block = 64 if GPU else 16
    q = torch.randn(1, 2, blocks * block, 64 if GPU else 16, device=DEVICE)[:, :, -4 * block :]
    k = torch.randn(1, 1, blocks * block, q.shape[3], device=DEVICE)
    mask: dict[str, Any] = {"scale": 1.0, "left": -1, "right": 0, "offset": (blocks - 4) * block}
    mask |= {"q_segments": None, "kv_segments": None, "q_block": block, "kv_block": block}
    count, lists = select(q, k, mask, density=0.05)
    scores = (q.double().unflatten(2, (4, block)).mean(3) @ k.double().unflatten(2, (blocks, block)).mean(3).mT)[0]
    budget = blocks_per_row(4 * block, blocks * block, -1, 0, (blocks - 4) * block, block, block, 0.05)
    assert (count == budget).all()
    for head in range(2):
        for row in range(4):
            named = lists[0, head, row].tolist()
            diagonal = blocks - 4 + row
            assert named == sorted(set(named))
            assert {0, diagonal - 1, diagonal} <= set(named)
            rest = scores[head, row].clone()
            chosen = [x for x in named if x not in (0, diagonal - 1, diagonal)]
            worst = rest[chosen].min()
            rest[named] = float("-inf")
            rest[diagonal + 1 :] = float("-inf")
            assert worst >= rest.max() - 1e-5


def test_refusals() -> None:
    q = torch.randn(1, 2, 64, 16, device=DEVICE)
    mask: dict[str, Any] = {"scale": 1.0, "left": -1, "right": 0, "offset": 0, "q_block": 16, "kv_block": 16}
    with pytest.raises(KernelInputError, match=r"expected a float, or float32 \[1 or 1, 2\]"):
        select_blocks_cuda(q, q, **mask, density=torch.rand(3, device=DEVICE))
    with pytest.raises(KernelInputError, match=r"expected int64 \[3\]"):
        select_blocks_cuda(q, q, **mask, density=0.5, counter=torch.zeros(2, device=DEVICE))
    segments = torch.zeros(1, 64, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelInputError, match="without kv_segments"):
        select_blocks_cuda(q, q, **mask, density=0.5, q_segments=segments)
