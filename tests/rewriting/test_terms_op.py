"""The graph op with changed scores: its schema and fake, every method, dense budgets, and the call for users."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsepass.functional import sparse_attention
from sparsepass.kernels.attend.reference import changed_scores, shown_by_scores
from sparsepass.kernels.scores import Scores
from sparsepass.rewriting import counters
from sparsepass.rewriting.ops import SPARSE_ATTENTION

BATCH, HEADS, KV_HEADS, LENGTH, DIM, V_DIM, CHUNK = 2, 4, 2, 700, 24, 16, 200
EXACT = ("dense", "full", "pooled_topk(density=1.0)", "vertical_slash(density=1.0)", "flex_prefill(gamma=1.0)")
SPARSE = (
    *("pooled_topk(density=0.5, block=64)", "a_shape(sink=64, window=64)", "vertical_slash(density=0.5, block=64)"),
    *("threshold(alpha=0.1, block=64)", "top_p(coverage=0.8)", "flex_prefill(gamma=0.8, block=64)"),
)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, V_DIM))
    q, k, v = (torch.randn(BATCH, heads, LENGTH, size, generator=generator) for heads, size in shapes)
    return q, k, v


def terms() -> dict[str, Any]:
    """Chunks of keys that a mask tensor shows to their own chunk alone, and all else."""
    generator = torch.Generator().manual_seed(6)
    place = torch.arange(LENGTH)
    mask = (place[None] <= place[:, None]) & (place[None] // CHUNK == place[:, None] // CHUNK)
    bias = torch.randn(1, HEADS, 1, LENGTH, generator=generator)
    slopes, sinks = torch.rand(HEADS, generator=generator), torch.randn(HEADS, generator=generator)
    return {"softcap": 5.0, "slopes": slopes, "bias": bias, "mask": mask[None, None], "sinks": sinks}


def eager(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    found = changed_scores(q @ k.mT * 0.2, scores, 0).masked_fill(~shown_by_scores(scores), -torch.inf)
    if scores.sinks is not None:
        found = torch.cat([found, scores.sinks[:, None, None].expand(*found.shape[:3], 1)], -1)
    return found.softmax(-1)[..., :LENGTH] @ v


@pytest.mark.parametrize("budget", [*EXACT, *SPARSE])
def test_every_method_lists_visible_blocks_alone(budget: str) -> None:
    counters.prepare(torch.device("cpu"))
    row = counters.row(torch.device("cpu"), 7)
    assert row is not None
    row.zero_()
    q, k, v = tensors()
    out = SPARSE_ATTENTION(q, k, v, None, None, 0.2, -1, -1, True, budget, 7, **terms())
    launches, computed, visible = row.tolist()
    block = 64 if "block=64" in budget else 128
    mask = torch.nn.functional.pad(terms()["mask"][0, 0], (0, -LENGTH % block, 0, -LENGTH % block))
    shown = mask.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(-1).any(1)
    assert launches == 1
    assert visible == int(shown.sum()) * BATCH * HEADS
    if budget in EXACT:
        assert computed == visible
        torch.testing.assert_close(out, eager(q, k, v, Scores(**terms())), atol=1e-5, rtol=1e-4)
    else:
        assert 0 < computed <= visible
        assert out.isfinite().all()


def test_the_fake_has_the_size_of_the_values() -> None:
    q, k, v = tensors()
    given = (q, k, v, None, None, 0.2, -1, 0, True, "full", 7)
    torch.library.opcheck(SPARSE_ATTENTION, given, terms(), test_utils=("test_schema", "test_faketensor"))
    assert SPARSE_ATTENTION(*given).shape == (BATCH, HEADS, LENGTH, V_DIM)


def test_users_say_terms_by_name() -> None:
    q, k, v = tensors()
    expected = eager(q, k, v, Scores(**terms()))
    out, lse = sparse_attention(q, k, v, density=1.0, scale=0.2, return_lse=True, **terms())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert isinstance(lse, Tensor)
    assert lse.shape == (BATCH, HEADS, LENGTH)
    sparse = sparse_attention(q, k, v, density=0.3, scale=0.2, **terms())
    assert isinstance(sparse, Tensor)
    assert sparse.isfinite().all()
