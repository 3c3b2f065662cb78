"""Sinks of each query, on the device that is there: against float64, with every other term, and what was kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.errors import KernelInputError
from sparsepass.functional import sparse_attention
from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu
from sparsepass.kernels.mass.api import kept_mass, sampled_rows
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing import Case, Inputs, assert_as_accurate_as_dense, assert_lse, cases, poisoned_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHERS = ("softcap", "slopes", "bias", "mask")


def with_sinks(inputs: Inputs, shared: tuple[bool, bool, bool]) -> Inputs:
    """The same problem with a sink per query; batch, heads and queries may share theirs. The first have none."""
    sizes = [1 if alone else size for alone, size in zip(shared, inputs.q.shape[:3], strict=True)]
    sinks = torch.randn(sizes, generator=torch.Generator().manual_seed(sizes[2])) * 2
    sinks[..., 0] = -torch.inf
    return replace(inputs, scores=replace(inputs.scores or Scores(), sinks=sinks.to(inputs.q.device)))


def attend(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    mask = inputs.mask
    visible = Visible(**{name: mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")})
    lists = BlockLists(inputs.kv_num_blocks, inputs.kv_indices, mask["q_block"], mask["kv_block"])
    with poisoned_empty():
        return block_sparse_attention(
            inputs.q, inputs.k, inputs.v, lists, scale=mask["scale"], visible=visible, scores=inputs.scores,
            return_lse=True,
        )  # fmt: skip


@given(
    case=cases(dtypes=(torch.float32, torch.bfloat16), head_dims=(16, 32), terms=OTHERS),
    shared=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_they_match_the_reference(case: Case, shared: tuple[bool, bool, bool]) -> None:
    inputs = with_sinks(case.tensors(DEVICE), shared)
    out, lse = attend(inputs)
    assert lse is not None
    assert_as_accurate_as_dense(out, inputs)
    assert_lse(lse, inputs)


def test_the_same_sink_for_each_query_is_one_per_head() -> None:
    q, k, v = (torch.randn(2, 4, 300, 16, device=DEVICE) for _ in range(3))
    sinks = torch.randn(4, device=DEVICE)
    both = [
        sparse_attention(q, k, v, density=0.5, causal=True, sinks=one)
        for one in (sinks, sinks[None, :, None].expand(1, 4, 300))
    ]
    torch.testing.assert_close(both[1], both[0], atol=1e-5, rtol=1e-5)


def test_columns_join_before_the_sinks() -> None:
    from sparsepass.kernels.types import Columns

    q, k, v = (torch.randn(1, 2, 256, 16, device=DEVICE) for _ in range(3))
    num = torch.ones(1, 1, 2, dtype=torch.int32, device=DEVICE)
    first = torch.zeros(1, 1, 2, 1, dtype=torch.int32, device=DEVICE)
    lists = BlockLists(num, first, 128, 128, Columns(num, first + 200))
    sinks = torch.randn(1, 2, 256, device=DEVICE)
    out, _ = block_sparse_attention(
        q, k, v, lists, scale=0.25, visible=Visible(), scores=Scores(sinks=sinks), return_lse=True
    )
    seen = [*range(128), 200]
    found = torch.cat([q @ k[:, :, seen].mT * 0.25, sinks[..., None]], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, found @ v[:, :, seen], atol=1e-5, rtol=1e-4)


def test_what_was_kept_counts_them() -> None:
    q, k = (torch.randn(1, 2, 256, 16, device=DEVICE) for _ in range(2))
    sinks = torch.randn(1, 2, 256, device=DEVICE)
    lse = torch.logaddexp((q @ k[:, :, :128].mT * 0.25).logsumexp(-1), sinks)
    found = kept_mass(q, k, lse, count=8, scale=0.25, visible=Visible(), scores=Scores(sinks=sinks))
    whole = torch.logaddexp((q @ k.mT * 0.25).logsumexp(-1), sinks)
    rows = sampled_rows(256, 8, q.device)
    torch.testing.assert_close(found, (lse - whole).exp().index_select(2, rows), atol=1e-5, rtol=1e-4)


def test_other_shapes_are_refused() -> None:
    q = torch.randn(2, 4, 64, 16, device=DEVICE)
    for wrong in ((3, 4, 64), (2, 4, 63), (2, 3, 1), (4, 64)):
        with pytest.raises(KernelInputError, match=r"\[4\] or \[2 or 1, 4 or 1, 64 or 1\]"):
            sparse_attention(q, q, q, density=1.0, sinks=torch.zeros(wrong, device=DEVICE))
    num = torch.ones(1, 1, 1, dtype=torch.int32)
    with pytest.raises(KernelInputError, match=r"a float type \[4\] on"):  # a kernel itself takes one per head
        block_sparse_attention_cpu(
            q.cpu(), q.cpu(), q.cpu(), num, num[..., None] - 1, scale=1.0, left=-1, right=-1, offset=0,
            q_segments=None, kv_segments=None, q_block=64, kv_block=64, scores=Scores(sinks=torch.zeros(2, 4, 64)),
        )  # fmt: skip
