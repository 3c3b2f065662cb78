"""CPU block selection against its eager reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.reference import block_scores_reference, listed_blocks, select_blocks_reference
from sparsepass.kernels.select.cpu.topk import select_blocks_cpu
from sparsepass.testing import Case, cases


@pytest.fixture(params=["native", "torch"], scope="module", autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each implementation behind the public function; the C++ one where it can be built."""
    if request.param == "native" and not cpu_native.available(torch.float32):
        pytest.skip("the C++ kernels cannot be built here")
    patch = pytest.MonkeyPatch()
    if request.param == "torch":
        patch.setattr(cpu_native, "available", lambda dtype: False)
    yield
    patch.undo()


DENSITIES = (0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0)


def check(case: Case, density: float | Tensor, last: int = 0, **more: Any) -> None:
    """Same counts and width as the reference; blocks may differ only where scores are equal up to rounding."""
    inputs = case.tensors()
    counts, indices = select_blocks_cpu(inputs.q, inputs.k, **inputs.mask, density=density, last=last, **more)
    wanted, wanted_indices = select_blocks_reference(inputs.q, inputs.k, **inputs.mask, density=density, last=last)
    assert counts.dtype == indices.dtype == torch.int32
    assert torch.equal(counts, wanted)
    if not more:
        assert indices.shape == wanted_indices.shape
    columns = -(-case.kv_len // case.kv_block)
    unused = torch.arange(indices.shape[-1]) >= counts[..., None]
    assert not indices[unused].any()
    ours = listed_blocks(counts, indices, columns)
    theirs = listed_blocks(wanted, wanted_indices, columns)
    scores, allowed, kept = block_scores_reference(inputs.q, inputs.k, **inputs.mask)
    assert not (ours & ~allowed).any()
    assert not (kept & ~ours).any()
    different = ours != theirs
    if different.any():
        scores = scores.nan_to_num(nan=-1e30, posinf=1e30, neginf=-1e30)
        worst_kept = torch.where(theirs & ~kept, scores, torch.inf).amin(-1, keepdim=True)
        near = (scores - worst_kept).abs() <= 1e-4 * (1 + worst_kept.abs())
        assert (near | ~different).all()


LAST = st.sampled_from([0, 1, 2, 99])


@given(case=cases(dtypes=(torch.float32, torch.float16, torch.bfloat16)), density=st.sampled_from(DENSITIES), last=LAST)
def test_matches_the_reference(case: Case, density: float, last: int) -> None:
    check(case, density, last)


@given(case=cases(bad=True), density=st.sampled_from(DENSITIES))
def test_non_finite_scores_give_valid_lists(case: Case, density: float) -> None:
    inputs = case.tensors()
    counts, indices = select_blocks_cpu(inputs.q, inputs.k, **inputs.mask, density=density)
    ours = listed_blocks(counts, indices, -(-case.kv_len // case.kv_block))
    _, allowed, kept = block_scores_reference(inputs.q, inputs.k, **inputs.mask)
    assert not (ours & ~allowed).any()
    assert not (kept & ~ours).any()
    wanted, _ = select_blocks_reference(inputs.q, inputs.k, **inputs.mask, density=density)
    assert torch.equal(counts, wanted)


@given(case=cases(dtypes=(torch.float32,)), data=st.data())
def test_a_density_per_head(case: Case, data: st.DataObject) -> None:
    rows = data.draw(st.sampled_from([1, case.batch]))
    shares = data.draw(st.lists(st.sampled_from(DENSITIES), min_size=rows * case.heads, max_size=rows * case.heads))
    density = torch.tensor(shares).view(rows, case.heads)
    check(case, density, data.draw(LAST))
    check(case, density, max_density=1.0)


def test_ties_go_to_the_lower_index(plain: Case) -> None:
    inputs = plain.tensors()
    counts, indices = select_blocks_cpu(torch.zeros_like(inputs.q), inputs.k, **inputs.mask, density=0.5)
    last = counts[0, 0, -1]
    assert indices[0, 0, -1, :last].tolist() == [*range(last - 2), 8, 9]


def test_density_one_lists_every_visible_block(plain: Case) -> None:
    inputs = plain.tensors()
    counter = torch.zeros(3, dtype=torch.int64)
    counts, _ = select_blocks_cpu(inputs.q, inputs.k, **inputs.mask, density=1.0, counter=counter)
    assert counts[0, 0].tolist() == list(range(1, 11))
    assert counter.tolist() == [0, 0, int(counts.sum())]


def test_the_same_twice(plain: Case) -> None:
    inputs = replace(plain, segments="interleaved").tensors()
    first, second = (select_blocks_cpu(inputs.q, inputs.k, **inputs.mask, density=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def plain() -> Case:
    return Case(
        batch=2, kv_heads=1, group=2, q_len=160, kv_len=160, head_dim=16, v_head_dim=16, dtype=torch.float32,
        q_block=16, kv_block=16, left=-1, right=0, offset=0, scale=0.25, layout="bshd", segments="none",
        lists="full", shared_lists="none", bad=0, seed=3,
    )  # fmt: skip


def _ranked(scores: Tensor, **mask: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Queries, keys and mask of two KV heads, 4 heads and blocks of 16 keys whose mean scores are ``scores`` [2, n]."""
    k = torch.zeros(1, 2, scores.shape[1] * 16, 16)
    k[0, :, :, 0] = scores.repeat_interleave(16, dim=1)
    q = torch.zeros(1, 4, k.shape[2], 16)
    q[..., 0] = 1.0
    given = {"scale": 1.0, "left": -1, "right": -1, "offset": 0, "q_block": 16, "kv_block": 16}
    return q, k, {**given, "q_segments": None, "kv_segments": None, **mask}


def _listed(q: Tensor, k: Tensor, mask: dict[str, Any], density: float = 0.5) -> Tensor:
    counts, indices = select_blocks_cpu(q, k, **mask, density=density)
    wanted = select_blocks_reference(q, k, **mask, density=density)
    blocks = k.shape[2] // 16
    assert torch.equal(listed_blocks(counts, indices, blocks), listed_blocks(*wanted, blocks))
    return listed_blocks(counts, indices, blocks)


RANKS = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7], [7.0, 6, 5, 4, 3, 2, 1, 0]])


def test_heads_rank_by_the_keys_of_their_own_group() -> None:
    listed = _listed(*_ranked(RANKS))
    assert listed[0, 0, 1].tolist() == [True, True, False, False, False, False, True, True]
    assert listed[0, 1].equal(listed[0, 0])
    assert listed[0, 2, 6].tolist() == [True, True, False, False, False, True, True, False]


def test_padded_keys_are_in_no_mean() -> None:
    """Half of block 2 is padding with great values; of its own keys it is the least."""
    segments = torch.zeros(1, 128, dtype=torch.int32)
    segments[0, 40:48] = -1
    q, k, mask = _ranked(RANKS, kv_segments=segments)
    k[0, :, 40:48, 0] = 1000.0
    k[0, :, 32:40, 0] = -5.0
    assert not _listed(q, k, mask)[0, :, 7, 2].any()


def test_a_block_whose_score_is_nan_ranks_last() -> None:
    q, k, mask = _ranked(RANKS)
    k[0, :, 50, 0] = float("nan")
    assert not _listed(q, k, mask)[0, :, 7, 3].any()


def test_padded_tokens_are_no_part_of_the_means(plain: Case) -> None:
    """One real token in a block of padding says what the block is like, of keys and of queries."""
    q, k = torch.zeros(1, 1, 160, 16), torch.zeros(1, 1, 160, 16)
    q_segments, kv_segments = torch.zeros(1, 160, dtype=torch.int32), torch.zeros(1, 160, dtype=torch.int32)
    q[..., 0] = 1.0
    for block, real, padded in ((3, 5.0, -9.0), (5, -5.0, 9.0)):
        tokens = slice(16 * block, 16 * block + 16)
        k[0, 0, tokens, 0], kv_segments[0, tokens] = padded, -1
        k[0, 0, tokens.start + 7, 0], kv_segments[0, tokens.start + 7] = real, 0
    k[0, 0, 96:112, 1] = 9.0  # what the padded queries of the last block look for
    q[0, 0, 144:, 1], q_segments[0, 144:] = 9.0, -1
    q[0, 0, 150, 1], q_segments[0, 150] = 0.0, 0
    mask = {**plain.tensors().mask, "right": -1, "q_segments": q_segments, "kv_segments": kv_segments}
    counts, indices = select_blocks_cpu(q, k, **mask, density=0.4)
    assert indices[0, 0, -1, : counts[0, 0, -1]].tolist() == [0, 3, 8, 9]
