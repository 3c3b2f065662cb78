"""Block-sparse attention called directly: FlexAttention's block masks in and out, packing, errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from sparsepass.errors import KernelInputError
from sparsepass.functional import (
    from_block_mask,
    lists_from_mask,
    segments_from_cu_seqlens,
    sparse_attention,
    to_block_mask,
)
from sparsepass.kernels.types import BlockLists

T = torch.Tensor


def qkv(batch: int = 2, heads: int = 4, kv_heads: int = 2, length: int = 300, dim: int = 32) -> tuple[T, T, T]:
    g = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = (torch.randn(batch, n, length, dim, generator=g) for n in sizes)
    return q, k, v


def dense(q: T, k: T, v: T, mask: T | None = None, causal: bool = False) -> T:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def test_density_one_is_dense_attention() -> None:
    q, k, v = qkv()
    torch.testing.assert_close(sparse_attention(q, k, v, density=1.0, causal=True), dense(q, k, v, causal=True))
    torch.testing.assert_close(sparse_attention(q, k, v, density=1.0), dense(q, k, v))


def test_log_sum_exp_and_rows_without_keys() -> None:
    q, k, v = qkv(batch=1)
    padding = torch.ones(1, 300, dtype=torch.bool)
    padding[:, :100] = False
    out, lse = sparse_attention(q, k, v, density=1.0, causal=True, key_padding=padding, return_lse=True)
    assert torch.equal(out[:, :, :100], torch.zeros_like(out[:, :, :100]))
    assert torch.isneginf(lse[:, :, :100]).all()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 32**0.5
    seen = torch.ones(300, 300).tril().bool() & padding[:, None, :]
    wanted = scores.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse[:, :, 100:], wanted[:, :, 100:])


def test_windows() -> None:
    q, k, v = qkv()
    places = torch.arange(300)
    back = places[:, None] - places[None, :]
    causal = (back >= 0) & (back < 70)
    torch.testing.assert_close(sparse_attention(q, k, v, density=1.0, causal=True, window=70), dense(q, k, v, causal))
    both = back.abs() <= 70
    torch.testing.assert_close(sparse_attention(q, k, v, density=1.0, window=70), dense(q, k, v, both))


def test_packed_sequences_equal_each_alone() -> None:
    q, k, v = qkv(batch=1)
    ends = [0, 90, 91, 250]
    packed = sparse_attention(q, k, v, density=1.0, causal=True, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    assert isinstance(packed, torch.Tensor)
    for start, end in pairwise(ends):
        alone = dense(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], causal=True)
        torch.testing.assert_close(packed[:, :, start:end], alone)
    assert torch.equal(packed[:, :, 250:], torch.zeros_like(packed[:, :, 250:]))


def test_segments_from_cumulative_lengths() -> None:
    numbers = segments_from_cu_seqlens(torch.tensor([0, 2, 2, 5]), 7)
    assert numbers.tolist() == [[0, 0, 2, 2, 2, -1, -1]]
    with pytest.raises(KernelInputError, match="falls from 5 to 2 at entry 2"):
        segments_from_cu_seqlens(torch.tensor([0, 5, 2, 7]), 7)


def test_queries_that_are_a_suffix_of_the_keys() -> None:
    q, k, v = qkv()
    whole = dense(q, k, v, causal=True)
    torch.testing.assert_close(sparse_attention(q[:, :, 250:], k, v, density=1.0, causal=True), whole[:, :, 250:])


def test_block_masks_go_in_and_out() -> None:
    q, k, v = qkv(batch=1, length=512, kv_heads=4)

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    mask = create_block_mask(causal, None, None, 512, 512, device="cpu", BLOCK_SIZE=128)
    ours = sparse_attention(q, k, v, mask, causal=True)
    torch.testing.assert_close(ours, dense(q, k, v, causal=True))
    kept = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = (kept | torch.eye(4, dtype=torch.bool)) & torch.ones(4, 4).tril().bool()
    lists = BlockLists(*lists_from_mask(kept), 128, 128)
    back = to_block_mask(lists, 512, 512, causal)
    assert torch.equal(from_block_mask(back).kv_num_blocks, lists.kv_num_blocks)
    visible = kept.repeat_interleave(128, 2).repeat_interleave(128, 3) & torch.ones(512, 512).tril().bool()
    torch.testing.assert_close(sparse_attention(q, k, v, lists, causal=True), dense(q, k, v, visible))
    torch.testing.assert_close(sparse_attention(q, k, v, back, causal=True), dense(q, k, v, visible))


def test_a_density_per_row() -> None:
    q, k, v = qkv(batch=3, length=900)
    rows = [0.4, 1.0, 0.15]
    together = sparse_attention(q, k, v, density=rows, causal=True)
    for row, density in enumerate(rows):
        one = slice(row, row + 1)
        torch.testing.assert_close(
            together[one], sparse_attention(q[one], k[one], v[one], density=density, causal=True)
        )
    for shares in (torch.tensor(rows), torch.tensor(rows)[:, None].expand(3, 4)):
        torch.testing.assert_close(sparse_attention(q, k, v, density=shares, causal=True), together)
    capped = sparse_attention(q, k, v, density=torch.tensor(rows), max_density=0.4, causal=True)
    torch.testing.assert_close(capped[1:2], sparse_attention(q[1:2], k[1:2], v[1:2], density=0.4, causal=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either blocks"),
        ({"density": 0.0}, "above 0"),
        ({"density": [0.5, 1.5]}, r"density\[1\] is 1.5.*above 0"),
        ({"density": [0.5]}, "1 densities for a batch of 2 rows"),
        ({"density": torch.ones(3)}, r"accepted is \[2\]"),
        ({"density": 0.5, "max_density": 0.5}, "goes with a tensor"),
        ({"density": 0.5, "window": 0}, "1 or more"),
        ({"density": 0.5, "key_padding": torch.ones(2, 7)}, r"\[2, 300\]"),
        ({"density": 0.5, "cu_seqlens": torch.tensor([0, 300])}, "batch 1"),
        ({"density": 0.5, "segments": torch.ones(2, 9)}, "as many queries as keys"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_accepted(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(KernelInputError, match=said):
        sparse_attention(*qkv(), **arguments)


def test_tensors_that_do_not_go_together() -> None:
    q, k, v = qkv()
    for bad in ((q, k.half(), v), (q[:, :3], k, v), (q, k[..., :16], v), (q[0], k, v), (q.double(), k, v)):
        with pytest.raises(KernelInputError):
            sparse_attention(*bad, density=0.5)
