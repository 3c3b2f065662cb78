"""What the selection kernels of all methods share: block averages, self-similarity, and which blocks may be listed.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.attend.triton.lists import segment_range_launch
from sparsepass.kernels.blocks import ceil_div, tile_side
from sparsepass.kernels.runtime.launch import VARYING, Launch

UNROLL = 8
"""Dimensions handled per step of the top-k's score loop; float32 averages are padded with zeros to a multiple of it."""


@triton.jit(do_not_specialize=VARYING)
def _average_blocks(
    x_ptr,
    segments_ptr,
    out_ptr,
    unlike_ptr,
    x_stride_b,
    x_stride_h,
    x_stride_s,
    x_stride_d,
    segment_stride_b,
    segment_stride_s,
    out_stride_h,
    out_stride_r,
    out_stride_d,
    length,
    heads,
    blocks,
    least,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    FIND_UNLIKE: tl.constexpr,
):
    """Mean over one block of tokens, without those of segment -1. Grid: (blocks, heads, batch).

    FIND_UNLIKE: also whether the mean cosine of the block's pairs of tokens is under ``least``: the squared length of
    the mean of the tokens at length 1, so no pair is looked at. NaN counts as under.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    item = tl.program_id(2)
    dim = tl.arange(0, BLOCK_D)
    base = x_ptr + item.to(tl.int64) * x_stride_b + head.to(tl.int64) * x_stride_h
    count = 0
    total = tl.zeros([BLOCK_D], tl.float32)
    middle = tl.zeros([BLOCK_D], tl.float32)
    for begin in tl.static_range(0, BLOCK, TOKENS):
        token = block * BLOCK + begin + tl.arange(0, TOKENS)
        used = token < length
        if HAS_SEGMENTS:
            segment_row = segments_ptr + item.to(tl.int64) * segment_stride_b
            segment = tl.load(segment_row + token.to(tl.int64) * segment_stride_s, mask=used, other=-1)
            used = segment != -1
        x = tl.load(
            base + token.to(tl.int64)[:, None] * x_stride_s + dim.to(tl.int64)[None, :] * x_stride_d,
            mask=used[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        ).to(tl.float32)
        count += tl.sum(used.to(tl.int32), 0)
        total += tl.sum(x, 0)
        if FIND_UNLIKE:
            middle += tl.sum(x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-30)[:, None], 0)
    count = tl.maximum(count, 1)
    out = out_ptr + (item * heads + head).to(tl.int64) * out_stride_h + block.to(tl.int64) * out_stride_r
    tl.store(out + dim.to(tl.int64) * out_stride_d, total / count.to(tl.float32), mask=dim < PADDED_DIM)
    if FIND_UNLIKE:
        middle = middle / count.to(tl.float32)
        alike = tl.sum(middle * middle, 0) >= least
        tl.store(unlike_ptr + (item * heads + head).to(tl.int64) * blocks + block, (alike == 0).to(tl.int8))


@triton.jit(do_not_specialize=VARYING)
def _allowed_blocks(
    q_segments_ptr,
    kv_segments_ptr,
    q_ranges_ptr,
    kv_ranges_ptr,
    allowed_ptr,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    q_planes,
    kv_planes,
    q_len,
    kv_len,
    left,
    right,
    offset,
    rows,
    blocks,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
):
    """int8 [B, nq, nkv]: 1 where any pair is visible through band and segments. Grid: (chunks of nkv, nq, batch).

    Ranges of segments settle most blocks; where they overlap without being one and the same, the pairs are looked at.
    """
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.program_id(1)
    item = tl.program_id(2)
    there = column < blocks
    kv_low = tl.load(kv_ranges_ptr + item * blocks + column, mask=there, other=-1)
    kv_high = tl.load(kv_ranges_ptr + kv_planes + item * blocks + column, mask=there, other=-1)
    if HAS_Q_SEGMENTS:
        q_low = tl.load(q_ranges_ptr + item * rows + row)
        q_high = tl.load(q_ranges_ptr + q_planes + item * rows + row)
    else:
        q_low = 0
        q_high = 0
    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    key = column * KV_BLOCK
    in_band = there & (key + KV_BLOCK - 1 >= first - left) & (key <= last + right) & (last >= -right)
    in_band = in_band & (first - left < kv_len)
    overlap = in_band & (q_low <= kv_high) & (kv_low <= q_high)
    single = (q_low == q_high) & (kv_low == kv_high)
    allowed = (overlap & single & (kv_low != -1)).to(tl.int32)
    unsure = (overlap & (single == 0)).to(tl.int32)
    if tl.max(unsure, 0) > 0:
        token = row * Q_BLOCK + tl.arange(0, Q_BLOCK)
        position = token + offset
        inside = token < q_len
        q_segment = tl.zeros([Q_BLOCK], tl.int32)
        if HAS_Q_SEGMENTS:
            q_row = q_segments_ptr + item.to(tl.int64) * q_segments_stride_b
            q_segment = tl.load(q_row + token.to(tl.int64) * q_segments_stride_s, mask=inside, other=-1)
        kv_row = kv_segments_ptr + item.to(tl.int64) * kv_segments_stride_b
        lane = tl.arange(0, CHUNK)
        for index in range(CHUNK):
            if tl.max(tl.where(lane == index, unsure, 0), 0) > 0:
                hits = tl.zeros([Q_BLOCK], tl.int32)
                for step in range(0, KV_BLOCK, STEP):
                    keys = (tl.program_id(0) * CHUNK + index) * KV_BLOCK + step + tl.arange(0, STEP)
                    segment = tl.load(kv_row + keys.to(tl.int64) * kv_segments_stride_s, mask=keys < kv_len, other=-1)
                    pair = (q_segment[:, None] == segment[None, :]) & (segment != -1)[None, :] & inside[:, None]
                    pair = pair & (keys[None, :] >= (position - left)[:, None])
                    pair = pair & (keys[None, :] <= (position + right)[:, None])
                    hits = tl.maximum(hits, tl.max(pair.to(tl.int32), 1))
                allowed = tl.where(lane == index, tl.max(hits, 0), allowed)
    place = (item.to(tl.int64) * rows + row) * blocks
    tl.store(allowed_ptr + place + column, allowed.to(tl.int8), mask=there)


def average_launch(
    x: Tensor,
    segments: Tensor | None,
    block: int,
    *,
    transposed: bool = False,
    dtype: torch.dtype = torch.float32,
    padded: int | None = None,
    self_similarity: float | None = None,
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch that averages blocks, its result [B, H, blocks, D'] (transposed: [B, H, D', blocks']), and the unlike.

    D' is ``padded``, else the next multiple of UNROLL, filled up with zeros; blocks' one of 16, filled up with
    anything. ``unlike`` int8 [B, H, blocks], with ``self_similarity``: 1 where a block's mean cosine is under it.
    """
    batch, heads, length, head_dim = x.shape
    blocks = ceil_div(length, block)
    padded = ceil_div(head_dim, UNROLL) * UNROLL if padded is None else padded
    columns = ceil_div(blocks, 16) * 16
    shape = (batch, heads, padded, columns) if transposed else (batch, heads, blocks, padded)
    means = x.new_empty(shape, dtype=dtype)
    unlike = None if self_similarity is None else x.new_empty(batch, heads, blocks, dtype=torch.int8)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "segments_ptr": x if segments is None else segments,
        "out_ptr": means,
        "unlike_ptr": means if unlike is None else unlike,
        **dict(zip(("x_stride_b", "x_stride_h", "x_stride_s", "x_stride_d"), x.stride(), strict=True)),
        "segment_stride_b": 0 if segments is None else segments.stride(0),
        "segment_stride_s": 1 if segments is None else segments.stride(1),
        "out_stride_h": means.stride(1),
        "out_stride_r": 1 if transposed else padded,
        "out_stride_d": columns if transposed else 1,
        "length": length,
        "heads": heads,
        "blocks": blocks,
        "least": 0.0 if self_similarity is None else self_similarity,
        "BLOCK": block,
        "TOKENS": block if padded <= 256 else min(block, 16),
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded,
        "BLOCK_D": tile_side(padded),
        "HAS_SEGMENTS": segments is not None,
        "FIND_UNLIKE": unlike is not None,
    }
    return Launch(_average_blocks, (blocks, heads, batch), arguments, {"num_warps": 8}), means, unlike


def allowed_launches(
    q_segments: Tensor | None, kv_segments: Tensor, band: dict[str, int], q_block: int, kv_block: int
) -> tuple[list[Launch], Tensor]:
    """Launches that find the blocks with any visible pair under segments, and their result int8 [B, 1, nq, nkv].

    ``band``: q_len, kv_len, left, right (``launch.side``) and offset.
    """
    rows, blocks = ceil_div(band["q_len"], q_block), ceil_div(band["kv_len"], kv_block)
    launch, kv_ranges = segment_range_launch(kv_segments, kv_block)
    launches = [launch]
    q_ranges = kv_ranges
    if q_segments is not None:
        launch, q_ranges = segment_range_launch(q_segments, q_block)
        launches.append(launch)
    batch = kv_segments.shape[0]
    allowed = torch.empty(batch, 1, rows, blocks, dtype=torch.int8, device=kv_segments.device)
    seen_q = kv_segments if q_segments is None else q_segments
    arguments: dict[str, Any] = {
        "q_segments_ptr": seen_q,
        "kv_segments_ptr": kv_segments,
        "q_ranges_ptr": q_ranges,
        "kv_ranges_ptr": kv_ranges,
        "allowed_ptr": allowed,
        "q_segments_stride_b": seen_q.stride(0),
        "q_segments_stride_s": seen_q.stride(1),
        "kv_segments_stride_b": kv_segments.stride(0),
        "kv_segments_stride_s": kv_segments.stride(1),
        "q_planes": q_ranges.stride(0),
        "kv_planes": kv_ranges.stride(0),
        **band,
        "rows": rows,
        "blocks": blocks,
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "CHUNK": 32,
        "STEP": 16,
        "HAS_Q_SEGMENTS": q_segments is not None,
    }
    launches.append(Launch(_allowed_blocks, (ceil_div(blocks, 32), rows, batch), arguments, {"num_warps": 4}))
    return launches, allowed
