"""Block scores from every query, in Triton: the softmax mass that pooled keys get (FlashPrefill's estimate).

The score of a block is ``log(sum over its queries of exp(scale * query . mean key))``. Only shares within a row matter
to the rules, so no query is normalized by itself and one pass over Q does. Products are of the inputs' own dtype,
transposed: a thread holds all queries of its few blocks, and both reductions stay in its registers. Conventions of
shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.attend.triton.visible import program_place
from sparsepass.kernels.blocks import ceil_div, dim_steps, tile_side
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.spec import capability_of


@triton.jit
def _store_scores(
    q, q_base, q_stride_s, q_stride_d, q_segment, token, k_ptr, kv_ranges_ptr, scores_ptr, tile, log2_scale, q_len,
    kv_len, least, most, row, blocks, kv_planes,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DIM_STEP: tl.constexpr, NEGATIVE: tl.constexpr, MASKED: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one query block against TILE key blocks; ``scores_ptr`` is the row's, ``k_ptr`` the KV head's.

    ``q`` holds the first DIM_STEP dimensions; where those are not all, the others are loaded here. The first query
    counts for the blocks whose last key is in ``least`` .. ``most``, the next one for those a key later.
    ``log2_scale`` is not negative: NEGATIVE has the sign.
    """
    column = tile * TILE + tl.arange(0, TILE)
    at = k_ptr + column[:, None] * BLOCK_D
    if DIM_STEP == BLOCK_D:
        dim = tl.arange(0, BLOCK_D)[None, :]
        k = tl.load(at + dim, mask=(column < blocks)[:, None], other=0.0) if MASKED else tl.load(at + dim)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    else:
        score = tl.zeros([TILE, Q_BLOCK], tl.float32)
        for begin in range(0, BLOCK_D, DIM_STEP):
            dim = begin + tl.arange(0, DIM_STEP)
            part = tl.load(
                q_base + token.to(tl.int64)[:, None] * q_stride_s + dim.to(tl.int64)[None, :] * q_stride_d,
                mask=(token < q_len)[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            k = tl.load(at + dim[None, :], mask=(column < blocks)[:, None], other=0.0)
            score = tl.dot(k, tl.trans(part), score, input_precision=PRECISION)
    if NEGATIVE:
        score = -score
    if MASKED:
        last_key = tl.minimum(column * KV_BLOCK + KV_BLOCK, kv_len) - 1
        # By the number within the program: few values to hold.
        own = tl.arange(0, Q_BLOCK)[None, :]
        counts = ((last_key - most)[:, None] <= own) & ((last_key - least)[:, None] >= own)
        counts = counts & (own < q_len - row * Q_BLOCK)
        if HAS_SEGMENTS:
            kv_low = tl.load(kv_ranges_ptr + column, mask=column < blocks, other=0)
            kv_high = tl.load(kv_ranges_ptr + kv_planes + column, mask=column < blocks, other=-1)
            counts = counts & (q_segment[None, :] >= kv_low[:, None]) & (q_segment[None, :] <= kv_high[:, None])
            counts = counts & (q_segment != -1)[None, :]
        score = tl.where(counts, score, float("-inf"))
    # Scaled after the maximum: the scaling and the difference are then one instruction for each pair.
    top = tl.max(score, 1)
    top = tl.where(top == float("-inf"), 0.0, top) * log2_scale
    total = tl.sum(tl.exp2(score * log2_scale - top[:, None]), 1)
    score = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(scores_ptr + column, score, mask=column < blocks)


@triton.jit(do_not_specialize=VARYING)
def _mass_scores(
    q_ptr,
    k_means_ptr,
    q_segments_ptr,
    kv_ranges_ptr,
    scores_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    q_segments_stride_b,
    q_segments_stride_s,
    scale,
    q_len,
    kv_len,
    left,
    right,
    offset,
    rows,
    blocks,
    kv_planes,
    kv_heads,
    group,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores float32 [B, H, nq, nkv] of one query block against all key blocks that the band shows to it.

    k_means [B, Hkv, nkv, BLOCK_D], in q's dtype. Entries outside the band are not written. Grid: (B * H * nq,), the
    query heads of a KV head side by side, so that they read the same means.
    """
    item, kv_head, head, row = program_place(tl.program_id(0), rows, kv_heads, group)
    token = row * Q_BLOCK + tl.arange(0, Q_BLOCK)
    dim = tl.arange(0, DIM_STEP)
    inside = token < q_len
    q_base = q_ptr + item.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    q = tl.load(
        q_base + token.to(tl.int64)[:, None] * q_stride_s + dim.to(tl.int64)[None, :] * q_stride_d,
        mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    q_segment = tl.zeros([Q_BLOCK], tl.int32)
    if HAS_Q_SEGMENTS:
        segments = q_segments_ptr + item.to(tl.int64) * q_segments_stride_b
        q_segment = tl.load(segments + token.to(tl.int64) * q_segments_stride_s, mask=inside, other=-1)
    kv_ranges_ptr += item * blocks
    k_ptr = k_means_ptr + (item * kv_heads + kv_head).to(tl.int64) * blocks * BLOCK_D
    scores_ptr += ((item * (kv_heads * group) + head).to(tl.int64) * rows + row) * blocks
    log2_scale = tl.abs(scale) * 1.4426950408889634

    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    low = tl.maximum(first - left, 0)
    high = tl.minimum(last + right, kv_len - 1)
    begin = low // KV_BLOCK // TILE
    end = tl.where(low <= high, tl.maximum(high, 0) // KV_BLOCK // TILE + 1, begin)
    # A query counts where none of the block's keys lies ahead of what it sees, and at least one is within: where its
    # last key is within.
    least = first - left
    most = first + right
    # Tiles in which every query counts for every key block.
    whole_begin = tl.maximum(last - left, 0) // KV_BLOCK
    whole_begin = (whole_begin + TILE - 1) // TILE
    whole_end = tl.minimum(tl.maximum(first + right + 1, 0), kv_len) // KV_BLOCK // TILE
    if HAS_SEGMENTS:
        whole_end = begin
    whole_end = tl.where((row + 1) * Q_BLOCK <= q_len, tl.minimum(whole_end, end), begin)
    whole_begin = tl.minimum(tl.maximum(whole_begin, begin), end)
    whole_end = tl.maximum(whole_end, whole_begin)
    for tile in range(whole_begin, whole_end):
        _store_scores(
            q, q_base, q_stride_s, q_stride_d, q_segment, token, k_ptr, kv_ranges_ptr, scores_ptr, tile, log2_scale,
            q_len, kv_len, least, most, row, blocks, kv_planes, Q_BLOCK, KV_BLOCK, TILE, HEAD_DIM, BLOCK_D,
            DIM_STEP, NEGATIVE, False, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
    for edge in range(begin, end - (whole_end - whole_begin)):
        tile = tl.where(edge < whole_begin, edge, edge + (whole_end - whole_begin))
        _store_scores(
            q, q_base, q_stride_s, q_stride_d, q_segment, token, k_ptr, kv_ranges_ptr, scores_ptr, tile, log2_scale,
            q_len, kv_len, least, most, row, blocks, kv_planes, Q_BLOCK, KV_BLOCK, TILE, HEAD_DIM, BLOCK_D,
            DIM_STEP, NEGATIVE, True, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip


class MassTile(NamedTuple):
    """Key blocks per step, warps, and stages of the load pipeline.

    Three programs of a sm_90 tile fit on one SM: one takes exponentials while another multiplies.
    """

    tile: int
    num_warps: int
    num_stages: int


def mass_tile(dtype: torch.dtype, head_dim: int, capability: tuple[int, int], segments: bool) -> MassTile:
    """The tile for a dtype and padded head size on a CUDA target. Sized not to spill; timed on sm_90 alone."""
    if dtype == torch.float32:
        return MassTile(32, 8, 1)
    if head_dim > 128:
        if capability[0] == 8:
            return MassTile(32 if segments else 64, 8, 1)
        return MassTile(64, 8, 2)
    return MassTile(64, 8, 2) if segments else MassTile(64, 4, 2)


def mass_launch(
    q: Tensor,
    k_means: Tensor,
    q_segments: Tensor | None,
    kv_ranges: Tensor | None,
    scale: float,
    band: dict[str, int],
    q_block: int,
    kv_block: int,
    tile: MassTile | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that scores blocks, and its result float32 [B, H, nq, nkv].

    ``k_means`` [B, Hkv, nkv, BLOCK_D] in q's dtype; ``kv_ranges`` int32 [2, B, nkv]: least and greatest segment.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads, blocks = k_means.shape[1], k_means.shape[2]
    rows = ceil_div(band["q_len"], q_block)
    scores = q.new_empty(batch, heads, rows, blocks, dtype=torch.float32)
    if tile is None:
        tile = mass_tile(q.dtype, min(256, tile_side(head_dim)), capability_of(q.device), kv_ranges is not None)
    has_q_segments = kv_ranges is not None and q_segments is not None
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_means_ptr": k_means,
        "q_segments_ptr": q_segments if has_q_segments else scores,
        "kv_ranges_ptr": scores if kv_ranges is None else kv_ranges,
        "scores_ptr": scores,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        "q_segments_stride_b": q_segments.stride(0) if has_q_segments and q_segments is not None else 0,
        "q_segments_stride_s": q_segments.stride(1) if has_q_segments and q_segments is not None else 1,
        "scale": scale,
        **band,
        "rows": rows,
        "blocks": blocks,
        "kv_planes": 0 if kv_ranges is None else kv_ranges.stride(0),
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "TILE": tile.tile,
        "HEAD_DIM": head_dim,
        "BLOCK_D": k_means.shape[3],
        "DIM_STEP": dim_steps(head_dim, 64)[1] if q.dtype != torch.float32 else min(32, k_means.shape[3]),
        "NEGATIVE": scale < 0,
        "HAS_SEGMENTS": kv_ranges is not None,
        "HAS_Q_SEGMENTS": has_q_segments,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(_mass_scores, (batch * heads * rows,), arguments, options), scores
