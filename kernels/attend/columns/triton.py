"""Attention over single keys ("columns") in Triton, continuing a block-sparse attention's output and log-sum-exp.

Three launches. The first marks, for every row of query blocks, which of its columns count: seen by any of its queries
and in none of its listed blocks; apart from each other those that all of its queries see, and those that need a mask.
The second gathers keys and values by index and goes on with the online softmax (arXiv 2307.08691) where the block
kernel stopped. The third brings inf and NaN values to the rows that see them, and nearly always finds nothing to do.
Columns as gathered keys: MInference's vertical-slash kernel (arXiv 2407.02490).
Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.arguments import check_columns, check_counter, check_lists, check_segments
from sparsepass.kernels.attend.triton.block_map import in_kernel_form, pair_arguments, term_arguments
from sparsepass.kernels.attend.triton.lists import segment_range_launch
from sparsepass.kernels.attend.triton.terms import changed_scores
from sparsepass.kernels.attend.triton.visible import program_place, shown_pairs
from sparsepass.kernels.blocks import ceil_div, tile_side
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.scores import Scores, check_blocks, check_scores
from sparsepass.kernels.spec import capability_of, column_tile, refuse_unsupported

LOG2E = 1.4426950408889634
INFO = 4
"""Numbers per row beside its marks: where whole columns begin and end in the list, where those with a mask do."""
CHANGING = (
    *VARYING,
    *("column_width", "column_words", "column_stride_b", "column_stride_h", "column_stride_r", "num_stride_b"),
    *("num_stride_h", "num_stride_r", "mark_stride_b", "mark_stride_h", "list_batch", "list_heads"),
)


@triton.jit(do_not_specialize=CHANGING)
def _mark_columns(
    counts_ptr,
    lists_ptr,
    num_ptr,
    columns_ptr,
    taken_ptr,
    marks_ptr,
    info_ptr,
    q_ranges_ptr,
    kv_segments_ptr,
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
    num_stride_b,
    num_stride_h,
    num_stride_r,
    column_stride_b,
    column_stride_h,
    column_stride_r,
    column_stride_e,
    kv_segments_stride_b,
    kv_segments_stride_s,
    heads,
    rows,
    width,
    column_width,
    column_words,
    q_len,
    kv_len,
    left,
    right,
    offset,
    kv_blocks,
    q_planes,
    times,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Bits of one row's columns, 32 to a word: whole ones in the first plane of the row, masked ones in the second.

    HAS_PAIRS: a mask or a bias may hide any pair, so that every column is masked. ``blocks_ptr``: their map, or None.
    Grid: (rows, heads, batch) of the marks. ``times`` is how many (batch, head) pairs share them, for the counter.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    item = tl.program_id(2)
    item64 = item.to(tl.int64)
    head64 = head.to(tl.int64)
    place = (item64 * heads + head64) * rows + row
    count = tl.load(counts_ptr + item64 * count_stride_b + head64 * count_stride_h + row.to(tl.int64) * count_stride_r)
    count = tl.minimum(count, width)
    num = tl.load(num_ptr + item64 * num_stride_b + head64 * num_stride_h + row.to(tl.int64) * num_stride_r)
    num = tl.minimum(num, column_width)

    # Blocks listed in this row, one byte each. The barriers order what different threads of this program do here.
    lane = tl.arange(0, CHUNK)
    taken = taken_ptr + place * kv_blocks
    for begin in range(0, kv_blocks, CHUNK):
        tl.store(taken + begin + lane, tl.zeros([CHUNK], tl.int8), mask=begin + lane < kv_blocks)
    tl.debug_barrier()
    listed = lists_ptr + item64 * list_stride_b + head64 * list_stride_h + row.to(tl.int64) * list_stride_r
    for begin in range(0, count, CHUNK):
        block = tl.load(listed + (begin + lane).to(tl.int64) * list_stride_e, mask=begin + lane < count, other=-1)
        tl.store(taken + block, tl.full([CHUNK], 1, tl.int8), mask=(block >= 0) & (block < kv_blocks))
    tl.debug_barrier()

    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    q_low = 0
    q_high = 0
    if HAS_Q_SEGMENTS:
        q_low = tl.load(q_ranges_ptr + item * rows + row)
        q_high = tl.load(q_ranges_ptr + q_planes + item * rows + row)
    source = columns_ptr + item64 * column_stride_b + head64 * column_stride_h + row.to(tl.int64) * column_stride_r
    marks = marks_ptr + place * 2 * column_words
    word = tl.arange(0, CHUNK // 32)
    bit = tl.arange(0, 32)
    whole_from = column_width
    whole_to = 0
    edge_from = column_width
    edge_to = 0
    active = 0
    for begin in range(0, column_words, CHUNK // 32):
        entry = (begin + word)[:, None] * 32 + bit[None, :]
        valid = entry < num
        column = tl.load(source + entry.to(tl.int64) * column_stride_e, mask=valid, other=-1)
        valid = valid & (column >= 0) & (column < kv_len)
        valid = valid & (column >= first - left) & (column <= last + right)
        valid = valid & (tl.load(taken + column // KV_BLOCK, mask=valid, other=1) == 0)
        whole = (column >= last - left) & (column <= first + right)
        if blocks_ptr is not None:
            states = blocks_ptr + item64 * blocks_stride_b + head64 * blocks_stride_h + row.to(tl.int64) * kv_blocks
            valid = valid & (tl.load(states + column // KV_BLOCK, mask=valid, other=0) != 0)
        if HAS_PAIRS:
            whole = whole & (column < 0)
        if HAS_SEGMENTS:
            segments = kv_segments_ptr + item64 * kv_segments_stride_b
            segment = tl.load(segments + column.to(tl.int64) * kv_segments_stride_s, mask=valid, other=-1)
            valid = valid & (segment != -1) & (segment >= q_low) & (segment <= q_high)
            whole = whole & (q_low == q_high)
        edge = valid & (whole == 0)
        whole = whole & valid
        here = begin + word < column_words
        tl.store(marks + begin + word, tl.sum(whole.to(tl.int32) << bit[None, :], 1), mask=here)
        tl.store(marks + column_words + begin + word, tl.sum(edge.to(tl.int32) << bit[None, :], 1), mask=here)
        whole_from = tl.minimum(whole_from, tl.min(tl.where(whole, entry, column_width)))
        whole_to = tl.maximum(whole_to, tl.max(tl.where(whole, entry + 1, 0)))
        edge_from = tl.minimum(edge_from, tl.min(tl.where(edge, entry, column_width)))
        edge_to = tl.maximum(edge_to, tl.max(tl.where(edge, entry + 1, 0)))
        active += tl.sum(valid.to(tl.int32))
    info = info_ptr + place * 4
    tl.store(info, whole_from)
    tl.store(info + 1, whole_to)
    tl.store(info + 2, edge_from)
    tl.store(info + 3, edge_to)
    if COUNT:
        tl.atomic_add(counter_ptr + 1, ((active + KV_BLOCK - 1) // KV_BLOCK * times).to(tl.int64), sem="relaxed")


@triton.jit
def _marked(marks, columns, start, limit, column_stride_e, KEYS: tl.constexpr):
    """Columns of the entries ``start .. start + KEYS`` and whether each counts; the others are position 0."""
    entry = start + tl.arange(0, KEYS)
    there = entry < limit
    word = tl.load(marks + entry // 32, mask=there, other=0)
    there = there & (((word >> (entry % 32)) & 1) != 0)
    column = tl.load(columns + entry.to(tl.int64) * column_stride_e, mask=entry < limit, other=0)
    return tl.where(there, column, 0), there


@triton.jit
def _fold_columns(
    q,
    acc,
    total,
    top,
    flag,
    marks,
    columns,
    start,
    limit,
    column_stride_e,
    k_base,
    v_base,
    k_stride_s,
    v_stride_s,
    k_stride_d,
    v_stride_d,
    q_stride_d,
    position,
    q_segment,
    kv_segments,
    kv_segments_stride,
    left,
    right,
    log2_scale,
    inside,
    factor,
    softcap,
    slope,
    bias_row,
    bias_stride,
    mask_row,
    mask_stride,
    hidden,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DIM_STEP: tl.constexpr,
    SIGN: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHANGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over gathered keys; as ``attend_tiles_triton.fold_block`` otherwise."""
    column, there = _marked(marks, columns, start, limit, column_stride_e, KEYS)
    key = column.to(tl.int64)
    dim = tl.arange(0, DIM_STEP)
    k_ptrs = k_base + key[None, :] * k_stride_s + dim.to(tl.int64)[:, None] * k_stride_d
    if DIM_STEP == BLOCK_D:
        k = tl.load(k_ptrs, mask=(dim < HEAD_DIM)[:, None] & there[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
    else:  # q is then a tile of pointers
        scores = tl.zeros([q.shape[0], KEYS], tl.float32)
        for begin in tl.static_range(0, BLOCK_D, DIM_STEP):
            here = begin + dim < HEAD_DIM
            step = tl.full([], begin, tl.int64)
            q_part = tl.load(q + step * q_stride_d, mask=inside[:, None] & here[None, :], other=0.0)
            k_part = tl.load(k_ptrs + step * k_stride_d, mask=here[:, None] & there[None, :], other=0.0)
            scores += tl.dot(q_part, k_part, input_precision=PRECISION)
    if SIGN != 1:
        scores = scores * SIGN
    if CHANGED:
        distance = column[None, :] - position[:, None]
        scores = changed_scores(scores, factor, softcap, slope, distance, v_base.dtype.element_ty == tl.float32)
    if bias_row is not None:
        at = bias_row[:, None] + key[None, :] * bias_stride
        bias = tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = scores + bias * 1.4426950408889634
    if MASKED:
        seen = there[None, :] & (column[None, :] >= (position - left)[:, None])
        seen = seen & (column[None, :] <= (position + right)[:, None])
        if SEGMENTS:
            segment = tl.load(kv_segments + key * kv_segments_stride, mask=there, other=-1)
            seen = seen & (segment != -1)[None, :] & (segment[None, :] == q_segment[:, None])
        if bias_row is not None:
            seen = seen & ((bias <= hidden) == 0)
        if mask_row is not None:
            at = mask_row[:, None] + key[None, :] * mask_stride
            seen = seen & (tl.load(at, mask=inside[:, None] & there[None, :], other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
    else:
        scores = tl.where(there[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
    # A row that has seen nothing yet has top -inf, and -inf - -inf is NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.math.exp2(scores * log2_scale - base[:, None])
    decay = tl.math.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    v_dim = tl.arange(0, BLOCK_DV)
    v_ptrs = v_base + key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d
    v = tl.load(v_ptrs, mask=(v_dim < V_HEAD_DIM)[None, :] & there[:, None], other=0.0)
    if MASKED:
        # A weight of 0 times a hidden inf or NaN is NaN, so such values wait for _add_nonfinite_columns.
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        flag = tl.maximum(flag, tl.max((finite == 0).to(tl.int32)))
        v = tl.where(finite, v, 0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top, flag


@triton.jit(do_not_specialize=CHANGING)
def _attend_columns(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    flags_ptr,
    marks_ptr,
    info_ptr,
    columns_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    log2_scale,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    column_stride_b,
    column_stride_h,
    column_stride_r,
    column_stride_e,
    mark_stride_b,
    mark_stride_h,
    column_words,
    q_len,
    left,
    right,
    offset,
    tiles,
    kv_heads,
    group,
    mask_ptr,
    bias_ptr,
    slopes_ptr,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    slopes_stride_b,
    slopes_stride_h,
    factor,
    softcap,
    hidden,
    SIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    CHANGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of BLOCK_M query rows of one head against its columns, in place. Grid: 1-D, batch * heads * tiles."""
    program = tl.program_id(0)
    item, kv_head, head, tile = program_place(program, tiles, kv_heads, group)
    row = tile * BLOCK_M // Q_BLOCK
    item64 = item.to(tl.int64)
    head64 = head.to(tl.int64)
    place = item64 * mark_stride_b + head64 * mark_stride_h + row
    info = info_ptr + place * 4
    whole_from = tl.load(info) // BLOCK_N * BLOCK_N
    whole_to = tl.load(info + 1)
    edge_from = tl.load(info + 2) // EDGE_N * EDGE_N
    edge_to = tl.load(info + 3)
    tl.store(flags_ptr + program, 0)
    if (whole_from < whole_to) | (edge_from < edge_to):
        token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = token < q_len
        token64 = token.to(tl.int64)
        dim = tl.arange(0, DIM_STEP).to(tl.int64)
        q = q_ptr + item64 * q_stride_b + head64 * q_stride_h
        q = q + token64[:, None] * q_stride_s + dim[None, :] * q_stride_d
        if DIM_STEP == BLOCK_D:
            q = tl.load(q, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        k_base = k_ptr + item64 * k_stride_b + kv_head.to(tl.int64) * k_stride_h
        v_base = v_ptr + item64 * v_stride_b + kv_head.to(tl.int64) * v_stride_h
        kv_segments = kv_segments_ptr
        q_segment = tl.zeros([BLOCK_M], tl.int32)
        if HAS_SEGMENTS:
            kv_segments = kv_segments_ptr + item64 * kv_segments_stride_b
            if HAS_Q_SEGMENTS:
                q_segments = q_segments_ptr + item64 * q_segments_stride_b
                q_segment = tl.load(q_segments + token64 * q_segments_stride_s, mask=inside, other=-1)
        position = token + offset
        columns = columns_ptr + item64 * column_stride_b + head64 * column_stride_h
        columns += row.to(tl.int64) * column_stride_r
        marks = marks_ptr + place * 2 * column_words

        # The block kernel's state: its normalized output counts as one key whose score is the log-sum-exp.
        heads = kv_heads * group
        v_dim = tl.arange(0, BLOCK_DV)
        out_row = (item64 * q_len + token64) * heads + head
        outs = out_ptr + out_row[:, None] * V_HEAD_DIM + v_dim[None, :]
        out_mask = inside[:, None] & (v_dim < V_HEAD_DIM)[None, :]
        lses = lse_ptr + (item64 * heads + head) * q_len + token
        acc = tl.load(outs, mask=out_mask, other=0.0).to(tl.float32)
        lse = tl.load(lses, mask=inside, other=float("-inf"))
        total = tl.where(lse == float("-inf"), 0.0, 1.0)
        top = lse * 1.4426950408889634
        slope, mask_row, bias_row = None, None, None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + item * slopes_stride_b + head * slopes_stride_h) * 1.4426950408889634
        if mask_ptr is not None:
            mask_row = mask_ptr + item64 * mask_stride_b + head64 * mask_stride_h + token64 * mask_stride_q
        if bias_ptr is not None:
            bias_row = bias_ptr + item64 * bias_stride_b + head64 * bias_stride_h + token64 * bias_stride_q
        flag = 0
        for start in range(whole_from, whole_to, BLOCK_N):
            acc, total, top, flag = _fold_columns(
                q, acc, total, top, flag, marks, columns, start, whole_to, column_stride_e, k_base, v_base,
                k_stride_s, v_stride_s, k_stride_d, v_stride_d, q_stride_d, position, q_segment, kv_segments,
                kv_segments_stride_s, left, right, log2_scale, inside, factor, softcap, slope, bias_row,
                bias_stride_k, mask_row, mask_stride_k, hidden, BLOCK_N, HEAD_DIM, V_HEAD_DIM, BLOCK_D,
                BLOCK_DV, DIM_STEP, SIGN, False, HAS_SEGMENTS, CHANGED, PRECISION,
            )  # fmt: skip
        for start in tl.range(edge_from, edge_to, EDGE_N, num_stages=EDGE_STAGES):
            acc, total, top, flag = _fold_columns(
                q, acc, total, top, flag, marks + column_words, columns, start, edge_to, column_stride_e, k_base,
                v_base, k_stride_s, v_stride_s, k_stride_d, v_stride_d, q_stride_d, position, q_segment, kv_segments,
                kv_segments_stride_s, left, right, log2_scale, inside, factor, softcap, slope, bias_row,
                bias_stride_k, mask_row, mask_stride_k, hidden, EDGE_N, HEAD_DIM, V_HEAD_DIM, BLOCK_D,
                BLOCK_DV, DIM_STEP, SIGN, True, HAS_SEGMENTS, CHANGED, PRECISION,
            )  # fmt: skip
        tl.store(flags_ptr + program, flag)
        share = tl.where(total == 0.0, 1.0, total)[:, None]
        FULL: tl.constexpr = out_ptr.dtype.element_ty == tl.float32  # else it may be off by two units in the last place
        out = tl.div_rn(acc, tl.broadcast_to(share, acc.shape)) if FULL else acc / share
        tl.store(outs, out.to(out_ptr.dtype.element_ty), mask=out_mask)
        lse = (tl.where(total == 0.0, 0.0, top) + tl.math.log2(total)) * 0.6931471805599453
        tl.store(lses, lse, mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def _add_nonfinite_columns(
    v_ptr,
    out_ptr,
    flags_ptr,
    marks_ptr,
    info_ptr,
    columns_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    mask_ptr,
    bias_ptr,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    hidden,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    column_stride_b,
    column_stride_h,
    column_stride_r,
    column_stride_e,
    mark_stride_b,
    mark_stride_h,
    column_words,
    q_len,
    left,
    right,
    offset,
    tiles,
    kv_heads,
    group,
    programs,
    Q_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """``visible_triton.add_nonfinite_values`` for the columns that need a mask, a slice of the value's dimensions each.

    Grid: (ceil(programs / FLAGS), ceil(V_HEAD_DIM / BLOCK_DV)).
    """
    mine = tl.program_id(0) * FLAGS + tl.arange(0, FLAGS)
    flags = tl.load(flags_ptr + mine, mask=mine < programs, other=0)
    if tl.max(flags, 0) == 0:
        return
    v_dim = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    v_dim_mask = v_dim < V_HEAD_DIM
    for program in range(tl.program_id(0) * FLAGS, tl.minimum((tl.program_id(0) + 1) * FLAGS, programs)):
        if tl.load(flags_ptr + program) > 0:
            item, kv_head, head, tile = program_place(program, tiles, kv_heads, group)
            item64 = item.to(tl.int64)
            head64 = head.to(tl.int64)
            row = tile * BLOCK_M // Q_BLOCK
            place = item64 * mark_stride_b + head64 * mark_stride_h + row
            edge_from = tl.load(info_ptr + place * 4 + 2) // STEP * STEP
            edge_to = tl.load(info_ptr + place * 4 + 3)
            columns = columns_ptr + item64 * column_stride_b + head64 * column_stride_h
            columns += row.to(tl.int64) * column_stride_r
            marks = marks_ptr + (place * 2 + 1) * column_words
            v_base = v_ptr + item64 * v_stride_b + kv_head.to(tl.int64) * v_stride_h
            for begin in range(tile * BLOCK_M, tl.minimum((tile + 1) * BLOCK_M, q_len), STEP):
                token = begin + tl.arange(0, STEP)
                inside = token < q_len
                q_segment = tl.zeros([STEP], tl.int32)
                if HAS_Q_SEGMENTS:
                    q_segments = q_segments_ptr + item64 * q_segments_stride_b
                    q_segment = tl.load(q_segments + token.to(tl.int64) * q_segments_stride_s, inside, other=-1)
                mask_row, bias_row = None, None
                if mask_ptr is not None:
                    mask_row = mask_ptr + item64 * mask_stride_b + head64 * mask_stride_h
                    mask_row = mask_row + token.to(tl.int64) * mask_stride_q
                if bias_ptr is not None:
                    bias_row = bias_ptr + item64 * bias_stride_b + head64 * bias_stride_h
                    bias_row = bias_row + token.to(tl.int64) * bias_stride_q
                up = tl.zeros([STEP, BLOCK_DV], tl.float32)
                down = tl.zeros([STEP, BLOCK_DV], tl.float32)
                for start in range(edge_from, edge_to, STEP):
                    column, there = _marked(marks, columns, start, edge_to, column_stride_e, STEP)
                    key = column.to(tl.int64)
                    seen = there[None, :] & (column[None, :] >= (token + offset - left)[:, None])
                    seen = seen & (column[None, :] <= (token + offset + right)[:, None])
                    if HAS_SEGMENTS:
                        kv_segments = kv_segments_ptr + item64 * kv_segments_stride_b
                        segment = tl.load(kv_segments + key * kv_segments_stride_s, mask=there, other=-1)
                        seen = seen & (segment != -1)[None, :] & (segment[None, :] == q_segment[:, None])
                    if (mask_ptr is not None) or (bias_ptr is not None):
                        seen = seen & shown_pairs(
                            key, inside, there, bias_row, bias_stride_k, mask_row, mask_stride_k, hidden
                        )
                    v = tl.load(
                        v_base + key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d,
                        mask=there[:, None] & v_dim_mask[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    bad = (tl.abs(v) < float("inf")) == 0
                    sight = seen.to(tl.float16)
                    up = tl.dot(sight, (bad & (v != float("-inf"))).to(tl.float16), up)
                    down = tl.dot(sight, (bad & (v != float("inf"))).to(tl.float16), down)
                out_row = (item64 * q_len + token.to(tl.int64)) * (kv_heads * group) + head
                places = out_ptr + out_row[:, None] * V_HEAD_DIM + v_dim[None, :]
                there_out = inside[:, None] & v_dim_mask[None, :]
                out = tl.load(places, mask=there_out, other=0.0).to(tl.float32)
                out = tl.where(up > 0, out + float("inf"), out)
                out = tl.where(down > 0, out - float("inf"), out)
                tl.store(places, out.to(out_ptr.dtype.element_ty), mask=there_out)


def attend_columns_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    column_num: Tensor,
    column_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_block: int,
    kv_block: int,
    scores: Scores | None = None,
    blocks: Tensor | None = None,
    counter: Tensor | None = None,
) -> None:
    """Continue a block-sparse attention over single keys: ``out`` and ``lse`` are changed in place.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv], one dtype, any strides.
        kv_num_blocks, kv_indices: the lists that ``out`` was computed with: columns inside listed blocks are skipped.
        column_num: int32 [B or 1, H or 1, nq or 1], columns per row of query blocks.
        column_indices: int32 [..., width] beside it: key positions, distinct; the first ``column_num`` count.
        out: [B, H, Sq, Dv] laid out [B, Sq, H, Dv]: attention over the listed blocks.
        lse: float32 [B, H, Sq], its log-sum-exp; -inf where a row saw nothing.
        scores: what happens to the scaled scores; sinks count in ``lse`` already.
        blocks: the block map of mask and bias, or None; columns in blocks for which it has 0 are left out.
        counter: int64 [3] on the device; [1] += blocks that each row's columns would fill.
        Everything else as for ``block_sparse_attention_cuda``.

    Raises:
        KernelInputError: shapes, dtypes, devices or sizes that the kernels do not take.
    """
    scores = in_kernel_form(check_scores(scores, q, k))
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    blocks = None if blocks is None else blocks.contiguous()
    options: dict[str, Any] = {
        "scale": scale,
        "left": left,
        "right": right,
        "offset": offset,
        "q_block": q_block,
        "kv_block": kv_block,
    }
    inputs = (q, k, v, kv_num_blocks, kv_indices, column_num, column_indices, out, lse)

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches = column_launches(
            *inputs,
            q_segments=q_segments,
            kv_segments=kv_segments,
            counter=counter,
            scores=scores,
            blocks=blocks,
            **options,
        )
        return launches, ()

    tensors = (*inputs, q_segments, kv_segments, counter, *scores.tensors, blocks)
    run_prepared(q.device, ("columns", scores.softcap, *options.values()), tensors, build)


def _shared(x: Tensor, dim: int) -> int:
    """The stride of a dimension, 0 where its one entry serves all."""
    return x.stride(dim) if x.shape[dim] > 1 else 0


def column_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    column_num: Tensor,
    column_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    counter: Tensor | None,
    scores: Scores | None = None,
    blocks: Tensor | None = None,
) -> list[Launch]:
    """The launches of ``attend_columns_cuda``. ``scores`` in the form of ``in_kernel_form``, ``blocks`` contiguous."""
    scores = Scores() if scores is None else scores
    host.check_shapes(q, k, v, offset, q_block, kv_block)
    check_lists(kv_num_blocks, kv_indices, q, q_block)
    check_counter(counter, q)
    q_segments, kv_segments = check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("attend_columns_cuda", q, v.shape[3])
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_head_dim = k.shape[1], k.shape[2], v.shape[3]
    rows = ceil_div(q_len, q_block)
    check_columns(column_num, column_indices, q, q_block)
    host.require(
        tuple(out.shape) == (batch, heads, q_len, v_head_dim)
        and out.dtype == q.dtype
        and out.transpose(1, 2).is_contiguous(),
        lambda: f"out is {out.dtype} {tuple(out.shape)} of strides {out.stride()}; expected the block kernel's.",
    )
    host.require(
        tuple(lse.shape) == (batch, heads, q_len) and lse.dtype == torch.float32 and lse.is_contiguous(),
        lambda: f"lse is {lse.dtype} {tuple(lse.shape)}; expected what the block kernel gave.",
    )
    launches: list[Launch] = []
    q_ranges = None
    if kv_segments is not None and q_segments is not None:
        launch, q_ranges = segment_range_launch(q_segments, q_block)
        launches.append(launch)

    mark_batch = batch if kv_segments is not None else max(kv_num_blocks.shape[0], column_num.shape[0])
    mark_heads = max(kv_num_blocks.shape[1], column_num.shape[1])
    if blocks is not None:
        mark_batch, mark_heads = max(mark_batch, blocks.shape[0]), max(mark_heads, blocks.shape[1])
    kv_blocks = ceil_div(kv_len, kv_block)
    width = column_indices.shape[3]
    words = ceil_div(width, 32)
    taken = kv_indices.new_empty(mark_batch, mark_heads, rows, kv_blocks, dtype=torch.int8)
    marks = kv_indices.new_empty(mark_batch, mark_heads, rows, 2, words)
    info = kv_indices.new_empty(mark_batch, mark_heads, rows, INFO)
    unused = info  # a pointer for what is not there; never read
    band = {"left": host.side(left), "right": host.side(right), "offset": offset}
    column_strides = {
        "column_stride_b": _shared(column_indices, 0),
        "column_stride_h": _shared(column_indices, 1),
        "column_stride_r": _shared(column_indices, 2),
        "column_stride_e": column_indices.stride(3),
    }
    segment_strides = {
        "kv_segments_stride_b": 0 if kv_segments is None else kv_segments.stride(0),
        "kv_segments_stride_s": 1 if kv_segments is None else kv_segments.stride(1),
    }
    arguments: dict[str, Any] = {
        "counts_ptr": kv_num_blocks,
        "lists_ptr": kv_indices,
        "num_ptr": column_num,
        "columns_ptr": column_indices,
        "taken_ptr": taken,
        "marks_ptr": marks,
        "info_ptr": info,
        "q_ranges_ptr": unused if q_ranges is None else q_ranges,
        "kv_segments_ptr": unused if kv_segments is None else kv_segments,
        "blocks_ptr": blocks,
        "counter_ptr": unused if counter is None else counter,
        "blocks_stride_b": 0 if blocks is None else _shared(blocks, 0),
        "blocks_stride_h": 0 if blocks is None else _shared(blocks, 1),
        "count_stride_b": _shared(kv_num_blocks, 0),
        "count_stride_h": _shared(kv_num_blocks, 1),
        "count_stride_r": kv_num_blocks.stride(2),
        "list_stride_b": _shared(kv_indices, 0),
        "list_stride_h": _shared(kv_indices, 1),
        "list_stride_r": kv_indices.stride(2),
        "list_stride_e": kv_indices.stride(3),
        "num_stride_b": _shared(column_num, 0),
        "num_stride_h": _shared(column_num, 1),
        "num_stride_r": _shared(column_num, 2),
        **column_strides,
        **segment_strides,
        "heads": mark_heads,
        "rows": rows,
        "width": kv_indices.shape[3],
        "column_width": width,
        "column_words": words,
        "q_len": q_len,
        "kv_len": kv_len,
        **band,
        "kv_blocks": kv_blocks,
        "q_planes": 0 if q_ranges is None else q_ranges.stride(0),
        "times": (batch // mark_batch) * (heads // mark_heads),
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "CHUNK": 512,
        "HAS_SEGMENTS": kv_segments is not None,
        "HAS_Q_SEGMENTS": q_segments is not None,
        "HAS_PAIRS": scores.hides,
        "COUNT": counter is not None,
    }
    launches.append(Launch(_mark_columns, (rows, mark_heads, mark_batch), arguments, {"num_warps": 2}))

    tile = column_tile(q.dtype, max(head_dim, v_head_dim), capability_of(q.device))
    block_m = min(tile.block_m, q_block)
    block_d = tile_side(head_dim) if head_dim <= 256 else ceil_div(head_dim, tile.dim_step) * tile.dim_step
    tiles = ceil_div(q_len, block_m)
    programs = batch * heads * tiles
    flags = info.new_empty(programs)
    common: dict[str, Any] = {
        "v_ptr": v,
        "out_ptr": out,
        "flags_ptr": flags,
        "marks_ptr": marks,
        "info_ptr": info,
        "columns_ptr": column_indices,
        "q_segments_ptr": unused if q_segments is None else q_segments,
        "kv_segments_ptr": unused if kv_segments is None else kv_segments,
        **dict(zip(("v_stride_b", "v_stride_h", "v_stride_s", "v_stride_d"), v.stride(), strict=True)),
        "q_segments_stride_b": 0 if q_segments is None else q_segments.stride(0),
        "q_segments_stride_s": 1 if q_segments is None else q_segments.stride(1),
        **segment_strides,
        **column_strides,
        "mark_stride_b": mark_heads * rows if mark_batch > 1 else 0,
        "mark_stride_h": rows if mark_heads > 1 else 0,
        "column_words": words,
        "q_len": q_len,
        **band,
        "tiles": tiles,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "Q_BLOCK": q_block,
        "BLOCK_M": block_m,
        "V_HEAD_DIM": v_head_dim,
        "BLOCK_DV": tile_side(v_head_dim),
        "HAS_SEGMENTS": kv_segments is not None,
        "HAS_Q_SEGMENTS": q_segments is not None,
    }
    arguments = {
        **common,
        "q_ptr": q,
        "k_ptr": k,
        "lse_ptr": lse,
        "log2_scale": abs(scale) * LOG2E if scale else 1.0,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_s", "k_stride_d"), k.stride(), strict=True)),
        "SIGN": int(math.copysign(1, scale)) if scale else 0,
        "BLOCK_N": tile.block_n,
        "EDGE_N": tile.edge_n,
        "EDGE_STAGES": tile.edge_stages,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "DIM_STEP": min(tile.dim_step, block_d),
        "PRECISION": tile.precision,
        **term_arguments(scores, scale),
    }
    for name in ("sinks_ptr", "sinks_stride"):  # the sinks are in the log-sum-exp already
        del arguments[name]
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    launches.append(Launch(_attend_columns, (programs,), arguments, options))
    # Slices of 32 dimensions: the kernel nearly never does anything, and must not spill for it.
    arguments = {
        **common,
        **pair_arguments(scores),
        "programs": programs,
        "STEP": 16,
        "FLAGS": 64,
        "BLOCK_DV": min(32, tile_side(v_head_dim)),
    }
    grid = (ceil_div(programs, 64), ceil_div(v_head_dim, 32))
    options = {"num_warps": 2, "num_stages": 2 if capability_of(q.device)[0] == 8 else 1}
    launches.append(Launch(_add_nonfinite_columns, grid, arguments, options))
    return launches
