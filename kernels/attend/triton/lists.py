"""Triton kernels over block lists and segments: which segments a block holds, and which listed blocks need a mask.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.blocks import ceil_div
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch


@triton.jit(do_not_specialize=VARYING)
def _segment_ranges(segments_ptr, ranges_ptr, stride_b, stride_s, length, blocks, planes, BLOCK: tl.constexpr):
    """Least and greatest segment of every block of tokens: ranges [2, B, blocks]; ``planes`` is B * blocks."""
    block = tl.program_id(0)
    item = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < length
    row = segments_ptr + item.to(tl.int64) * stride_b
    segment = tl.load(row + token.to(tl.int64) * stride_s, mask=inside, other=0)
    place = item * blocks + block
    tl.store(ranges_ptr + place, tl.min(tl.where(inside, segment, 2147483647), 0))
    tl.store(ranges_ptr + planes + place, tl.max(tl.where(inside, segment, -2147483648), 0))


@triton.jit(do_not_specialize=VARYING)
def _partition_lists(
    counts_ptr,
    lists_ptr,
    spans_ptr,
    parted_ptr,
    ticket_ptr,
    q_ranges_ptr,
    kv_ranges_ptr,
    blocks_ptr,
    counter_ptr,
    blocks_stride_b,
    blocks_stride_h,
    count_stride_b,
    count_stride_h,
    count_stride_r,
    list_stride_b,
    list_stride_h,
    list_stride_r,
    list_stride_e,
    heads,
    rows,
    width,
    q_len,
    kv_len,
    left,
    right,
    offset,
    kv_blocks,
    q_planes,
    kv_planes,
    times,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Copies one row's list with the blocks that need a mask first; writes its length and how many those are.

    ``blocks_ptr``: a block map int8 [B or 1, H or 1, rows, kv_blocks] or None. What it has 0 for is left out, and what
    it has no 2 for needs a mask. Sets the ticket counter to 0, from which the attention's programs may draw.

    Counts are cut to the width, and blocks that the keys do not have to the nearest that they have: whatever a list
    says, the attention reads what is there.

    Grid: (rows, heads, batch) of the lists. ``times`` is how many (batch, head) pairs share a row, for the counter.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    item = tl.program_id(2)
    count = tl.load(
        counts_ptr
        + item.to(tl.int64) * count_stride_b
        + head.to(tl.int64) * count_stride_h
        + row.to(tl.int64) * count_stride_r
    )
    count = tl.minimum(tl.maximum(count, 0), width)
    source = (
        lists_ptr
        + item.to(tl.int64) * list_stride_b
        + head.to(tl.int64) * list_stride_h
        + row.to(tl.int64) * list_stride_r
    )
    place = (item * heads + head).to(tl.int64) * rows + row
    target = parted_ptr + place * width

    first_position = row * Q_BLOCK + offset
    last_position = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    if HAS_Q_SEGMENTS:
        q_low = tl.load(q_ranges_ptr + item * rows + row)
        q_high = tl.load(q_ranges_ptr + q_planes + item * rows + row)
    else:
        q_low = 0
        q_high = 0

    if blocks_ptr is not None:
        states = blocks_ptr + item.to(tl.int64) * blocks_stride_b + head.to(tl.int64) * blocks_stride_h
        states = states + row.to(tl.int64) * kv_blocks
        listed = count
        count = 0
        for begin in range(0, listed, CHUNK):
            entry = begin + tl.arange(0, CHUNK)
            block = tl.load(source + entry.to(tl.int64) * list_stride_e, mask=entry < listed, other=0)
            block = tl.minimum(tl.maximum(block, 0), kv_blocks - 1)
            kept = tl.load(states + block, mask=entry < listed, other=0) != 0
            count += tl.sum(kept.to(tl.int32), 0)
    else:
        listed = count
    edges = 0
    inner = 0
    for begin in range(0, listed, CHUNK):
        entry = begin + tl.arange(0, CHUNK)
        valid = entry < listed
        block = tl.load(source + entry.to(tl.int64) * list_stride_e, mask=valid, other=0)
        block = tl.minimum(tl.maximum(block, 0), kv_blocks - 1)
        first_key = block * KV_BLOCK
        last_key = first_key + KV_BLOCK - 1
        whole = (last_key < kv_len) & (first_key >= last_position - left) & (last_key <= first_position + right)
        if HAS_SEGMENTS:
            kv_low = tl.load(kv_ranges_ptr + item * kv_blocks + block, mask=valid, other=0)
            kv_high = tl.load(kv_ranges_ptr + kv_planes + item * kv_blocks + block, mask=valid, other=0)
            # A range of one segment on both sides, the same, and no padding: then every pair is visible.
            whole = whole & (kv_low == kv_high) & (q_low == q_high) & (kv_low == q_low) & (kv_low != -1)
        if blocks_ptr is not None:
            state = tl.load(states + block, mask=valid, other=0)
            valid = valid & (state != 0)
            whole = whole & (state == 2)
        edge = (valid & (whole == 0)).to(tl.int32)
        whole_here = (valid & whole).to(tl.int32)
        tl.store(target + edges + tl.cumsum(edge, 0) - 1, block, mask=edge != 0)
        tl.store(target + count - inner - tl.cumsum(whole_here, 0), block, mask=whole_here != 0)
        edges += tl.sum(edge, 0)
        inner += tl.sum(whole_here, 0)
    tl.store(spans_ptr + 2 * place, count)
    tl.store(spans_ptr + 2 * place + 1, edges)
    is_first = (row == 0) & (head == 0) & (item == 0)
    if is_first:
        tl.store(ticket_ptr, 0)
    if COUNT:
        tl.atomic_add(counter_ptr + 1, count.to(tl.int64) * times, sem="relaxed")
        if is_first:
            tl.atomic_add(counter_ptr, tl.full([], 1, tl.int64), sem="relaxed")


def segment_range_launch(segments: Tensor, block: int) -> tuple[Launch, Tensor]:
    """The launch that finds each block's least and greatest segment, and its result int32 [2, B, blocks]."""
    ranges = host.empty_block_ranges(segments, block)
    batch, length = segments.shape
    arguments: dict[str, Any] = {
        "segments_ptr": segments,
        "ranges_ptr": ranges,
        "stride_b": segments.stride(0),
        "stride_s": segments.stride(1),
        "length": length,
        "blocks": ranges.shape[2],
        "planes": ranges.stride(0),
        "BLOCK": block,
    }
    return Launch(_segment_ranges, (ranges.shape[2], batch), arguments, {"num_warps": 1}), ranges


def partition_launches(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    q_len: int,
    kv_len: int,
    batch: int,
    heads: int,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    counter: Tensor | None,
    blocks: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor, Tensor]:
    """Launches that order every list with the blocks needing a mask first, and what they fill.

    Returns (launches, lists int32 [Bp, Hp, nq, width], spans int32 [Bp, Hp, nq, 2]: a list's length, and how many of
    its blocks need a mask, a ticket counter int32 [1] at 0); Bp and Hp are those of the given lists, Bp B if there are
    segments, and either that of the contiguous map ``blocks`` (int8 [B or 1, H or 1, nq, nkv]) if that is not shared.
    """
    launches: list[Launch] = []
    q_ranges = kv_ranges = None
    if kv_segments is not None:
        launch, kv_ranges = segment_range_launch(kv_segments, kv_block)
        launches.append(launch)
        if q_segments is not None:
            launch, q_ranges = segment_range_launch(q_segments, q_block)
            launches.append(launch)
    list_batch, list_heads, rows = kv_num_blocks.shape
    width = kv_indices.shape[3]
    # Which blocks need a mask depends on the batch item once there are segments, even if the lists are shared.
    part_batch = batch if kv_segments is not None else list_batch
    part_heads = list_heads
    if blocks is not None:
        part_batch, part_heads = max(part_batch, blocks.shape[0]), max(part_heads, blocks.shape[1])
    spans = kv_indices.new_empty(part_batch, part_heads, rows, 2)
    parted = kv_indices.new_empty(part_batch, part_heads, rows, width)
    ticket = kv_indices.new_empty(1)
    unused = spans  # a pointer for what is not there; never read
    arguments: dict[str, Any] = {
        "counts_ptr": kv_num_blocks,
        "lists_ptr": kv_indices,
        "spans_ptr": spans,
        "parted_ptr": parted,
        "ticket_ptr": ticket,
        "q_ranges_ptr": unused if q_ranges is None else q_ranges,
        "kv_ranges_ptr": unused if kv_ranges is None else kv_ranges,
        "blocks_ptr": blocks,
        "counter_ptr": unused if counter is None else counter,
        "blocks_stride_b": 0 if blocks is None or blocks.shape[0] == 1 else blocks.stride(0),
        "blocks_stride_h": 0 if blocks is None or blocks.shape[1] == 1 else blocks.stride(1),
        "count_stride_b": kv_num_blocks.stride(0) if list_batch > 1 else 0,
        "count_stride_h": kv_num_blocks.stride(1) if list_heads > 1 else 0,
        "count_stride_r": kv_num_blocks.stride(2),
        "list_stride_b": kv_indices.stride(0) if list_batch > 1 else 0,
        "list_stride_h": kv_indices.stride(1) if list_heads > 1 else 0,
        "list_stride_r": kv_indices.stride(2),
        "list_stride_e": kv_indices.stride(3),
        "heads": part_heads,
        "rows": rows,
        "width": width,
        "q_len": q_len,
        "kv_len": kv_len,
        "left": host.side(left),
        "right": host.side(right),
        "offset": offset,
        "kv_blocks": ceil_div(kv_len, kv_block),
        "q_planes": 0 if q_ranges is None else q_ranges.stride(0),
        "kv_planes": 0 if kv_ranges is None else kv_ranges.stride(0),
        "times": (batch // part_batch) * (heads // part_heads),
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "CHUNK": 64,
        "HAS_SEGMENTS": kv_segments is not None,
        "HAS_Q_SEGMENTS": q_segments is not None,
        "COUNT": counter is not None,
    }
    launches.append(Launch(_partition_lists, (rows, part_heads, part_batch), arguments, {"num_warps": 1}))
    return launches, parted, spans, ticket
