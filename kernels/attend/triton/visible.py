"""Triton: which pairs of a tile are visible, and the values that must reach only the rows that see them.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

import triton
import triton.language as tl

from sparsepass.kernels.runtime.launch import VARYING


@triton.jit
def program_place(program, tiles, kv_heads, group):
    """(batch item, KV head, head, tile) of a program.

    Neighboring programs are the query heads of one KV head on the same rows (they read the same K and V), then the
    rows from the last to the first (under a causal mask the longest first, so that the last wave is short).
    """
    tile = tiles - 1 - (program // group) % tiles
    kv_head = (program // (group * tiles)) % kv_heads
    item = program // (group * tiles * kv_heads)
    return item, kv_head, kv_head * group + program % group, tile


@triton.jit
def visible_pairs(start, position, q_segment, kv_segments_ptr, kv_segments_stride, kv_len, left, right, KEYS, SEGMENTS):
    """Bool [BLOCK_M, BLOCK_N] of the visible pairs, and bool [BLOCK_N] of the keys that anyone may see."""
    key = start + tl.arange(0, KEYS)
    there = key < kv_len
    visible = (
        there[None, :] & (key[None, :] >= (position - left)[:, None]) & (key[None, :] <= (position + right)[:, None])
    )
    if SEGMENTS:
        segment = tl.load(kv_segments_ptr + key.to(tl.int64) * kv_segments_stride, mask=there, other=-1)
        there = segment != -1
        visible = visible & there[None, :] & (segment[None, :] == q_segment[:, None])
    return visible, there


@triton.jit
def shown_pairs(key, inside, there, bias_row, bias_stride_k, mask_row, mask_stride_k, hidden):
    """Bool [BLOCK_M, KEYS]: what mask and bias leave visible, by ``bias_row`` and ``mask_row``: pointers [BLOCK_M]."""
    shown = inside[:, None] & there[None, :]
    if mask_row is not None:
        mask = tl.load(mask_row[:, None] + key.to(tl.int64)[None, :] * mask_stride_k, mask=shown, other=0)
        shown = shown & (mask != 0)
    if bias_row is not None:
        bias = tl.load(bias_row[:, None] + key.to(tl.int64)[None, :] * bias_stride_k, mask=shown, other=0.0)
        shown = shown & ((bias.to(tl.float32) <= hidden) == 0)
    return shown


@triton.jit(do_not_specialize=VARYING)
def add_nonfinite_values(
    v_ptr,
    out_ptr,
    flags_ptr,
    spans_ptr,
    parted_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    mask_ptr,
    bias_ptr,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    hidden,
    span_stride_b,
    span_stride_h,
    q_len,
    kv_len,
    left,
    right,
    offset,
    tiles,
    width,
    kv_heads,
    group,
    programs,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Adds the inf and NaN values of masked blocks to the rows that see them, in the tiles flagged by ``_attend``.

    Grid: ceil(programs / FLAGS). Nearly always it reads the flags, all 0, and ends.
    """
    mine = tl.program_id(0) * FLAGS + tl.arange(0, FLAGS)
    flags = tl.load(flags_ptr + mine, mask=mine < programs, other=0)
    if tl.max(flags, 0) == 0:
        return
    v_dim = tl.arange(0, BLOCK_DV)
    v_dim_mask = v_dim < V_HEAD_DIM
    for program in range(tl.program_id(0) * FLAGS, tl.minimum((tl.program_id(0) + 1) * FLAGS, programs)):
        if tl.load(flags_ptr + program) > 0:
            item, kv_head, head, tile = program_place(program, tiles, kv_heads, group)
            item64 = item.to(tl.int64)
            place = item64 * span_stride_b + head.to(tl.int64) * span_stride_h + tile * BLOCK_M // Q_BLOCK
            edges = tl.load(spans_ptr + 2 * place + 1)
            v_base = v_ptr + item64 * v_stride_b + kv_head.to(tl.int64) * v_stride_h
            for begin in range(tile * BLOCK_M, tl.minimum((tile + 1) * BLOCK_M, q_len), STEP):
                token = begin + tl.arange(0, STEP)
                inside = token < q_len
                q_segment = tl.zeros([STEP], tl.int32)
                kv_segments = kv_segments_ptr
                if HAS_SEGMENTS:
                    kv_segments = kv_segments_ptr + item64 * kv_segments_stride_b
                    if HAS_Q_SEGMENTS:
                        q_segments = q_segments_ptr + item64 * q_segments_stride_b
                        q_segment = tl.load(q_segments + token.to(tl.int64) * q_segments_stride_s, inside, other=-1)
                mask_row = mask_ptr
                if mask_ptr is not None:
                    mask_row = mask_ptr + item64 * mask_stride_b + head.to(tl.int64) * mask_stride_h
                    mask_row = mask_row + token.to(tl.int64) * mask_stride_q
                bias_row = bias_ptr
                if bias_ptr is not None:
                    bias_row = bias_ptr + item64 * bias_stride_b + head.to(tl.int64) * bias_stride_h
                    bias_row = bias_row + token.to(tl.int64) * bias_stride_q
                up = tl.zeros([STEP, BLOCK_DV], tl.float32)
                down = tl.zeros([STEP, BLOCK_DV], tl.float32)
                for step in range(edges * (KV_BLOCK // STEP)):
                    block = tl.load(parted_ptr + place * width + step // (KV_BLOCK // STEP))
                    start = block * KV_BLOCK + step % (KV_BLOCK // STEP) * STEP
                    visible, there = visible_pairs(
                        start, token + offset, q_segment, kv_segments, kv_segments_stride_s, kv_len, left, right,
                        STEP, HAS_SEGMENTS,
                    )  # fmt: skip
                    key = (start + tl.arange(0, STEP)).to(tl.int64)
                    if (mask_ptr is not None) or (bias_ptr is not None):
                        visible = visible & shown_pairs(
                            key, inside, key < kv_len, bias_row, bias_stride_k, mask_row, mask_stride_k, hidden
                        )
                    v = tl.load(
                        v_base + key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d,
                        mask=there[:, None] & v_dim_mask[None, :],
                        other=0.0,
                    ).to(tl.float32)
                    bad = (tl.abs(v) < float("inf")) == 0
                    sight = visible.to(tl.float16)
                    up = tl.dot(sight, (bad & (v != float("-inf"))).to(tl.float16), up)
                    down = tl.dot(sight, (bad & (v != float("inf"))).to(tl.float16), down)
                row = (item64 * q_len + token.to(tl.int64)) * (kv_heads * group) + head
                places = out_ptr + row[:, None] * V_HEAD_DIM + v_dim[None, :]
                there_out = inside[:, None] & v_dim_mask[None, :]
                out = tl.load(places, mask=there_out, other=0.0).to(tl.float32)
                out = tl.where(up > 0, out + float("inf"), out)
                out = tl.where(down > 0, out - float("inf"), out)
                tl.store(places, out.to(out_ptr.dtype.element_ty), mask=there_out)
