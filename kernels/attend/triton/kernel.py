"""Block-sparse attention in Triton: FlashAttention-2's online softmax (arXiv 2307.08691) over listed key blocks.

The device code; ``kernels/attend/triton/launch.py`` launches it. Conventions of shapes, bands, segments and lists:
``kernels/attend/reference.py``.
"""

import triton
import triton.language as tl

from sparsepass.kernels.attend.triton.terms import changed_scores
from sparsepass.kernels.attend.triton.visible import program_place, visible_pairs
from sparsepass.kernels.runtime.launch import VARYING


@triton.jit
def fold_block(
    q,
    acc,
    total,
    top,
    flag,
    k_tile,
    v_tile,
    k_stride_s,
    v_stride_s,
    start,
    position,
    q_segment,
    kv_segments_ptr,
    kv_segments_stride,
    kv_len,
    left,
    right,
    log2_scale,
    inside,
    v_dim_mask,
    q_stride_d,
    k_stride_d,
    q_tail,
    k_tail,
    factor,
    softcap,
    slope,
    bias_row,
    bias_stride,
    mask_row,
    mask_stride,
    hidden,
    skip,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN_DV: tl.constexpr,
    SIGN: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHANGED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: folds the keys ``start .. start + KEYS`` into (acc, total, top, flag).

    ``top`` is the running maximum of the scores times ``log2_scale``, as a rounded number: kept without the factor, the
    compiler fuses the product into the difference of two maxima, of equal ones too, and every step then multiplies what
    is summed so far by 1 plus a rounding error. ``flag`` turns 1 at a masked block with a non-finite value.
    ``factor`` to ``hidden``: ``kernels/attend/triton/terms.py``.
    ``skip``: binary logarithm of a weight; keys that have less in every row are left out. None: none are.
    """
    k_ptrs = k_tile + start.to(tl.int64) * k_stride_s
    v_ptrs = v_tile + start.to(tl.int64) * v_stride_s
    if MASKED:
        visible, there = visible_pairs(
            start, position, q_segment, kv_segments_ptr, kv_segments_stride, kv_len, left, right, KEYS, SEGMENTS
        )
    else:
        there = tl.full([KEYS], 1, tl.int1)

    if DIM_STEP == BLOCK_D:
        if MASKED or HEAD_DIM < BLOCK_D:
            k = tl.load(k_ptrs, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[:, None] & there[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if TAIL > 0:
            tail = (tl.arange(0, TAIL) < HEAD_DIM - BLOCK_D)[:, None]
            k = tl.load(k_tail + start.to(tl.int64) * k_stride_s, mask=tail & there[None, :], other=0.0)
            scores = tl.dot(q_tail, k, scores, input_precision=PRECISION)
    else:  # q is then a tile of pointers
        scores = tl.zeros([q.shape[0], KEYS], tl.float32)
        for begin in tl.static_range(0, BLOCK_D, DIM_STEP):
            here = begin + tl.arange(0, DIM_STEP) < HEAD_DIM
            step = tl.full([], begin, tl.int64)
            q_part = tl.load(q + step * q_stride_d, mask=inside[:, None] & here[None, :], other=0.0)
            k_part = tl.load(k_ptrs + step * k_stride_d, mask=here[:, None] & there[None, :], other=0.0)
            scores += tl.dot(q_part, k_part, input_precision=PRECISION)
    if SIGN != 1:
        scores = scores * SIGN
    if CHANGED:
        key = start + tl.arange(0, KEYS)
        distance = key[None, :] - position[:, None]
        scores = changed_scores(scores, factor, softcap, slope, distance, v_tile.dtype.element_ty == tl.float32)
    if bias_row is not None:
        at = bias_row[:, None] + (start + tl.arange(0, KEYS)).to(tl.int64)[None, :] * bias_stride
        bias = tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)
        scores = scores + bias * 1.4426950408889634
        if MASKED:
            visible = visible & ((bias <= hidden) == 0)
    if MASKED:
        if mask_row is not None:
            at = mask_row[:, None] + (start + tl.arange(0, KEYS)).to(tl.int64)[None, :] * mask_stride
            visible = visible & (tl.load(at, mask=inside[:, None] & there[None, :], other=0) != 0)
        scores = tl.where(visible, scores, float("-inf"))
    block_top = tl.max(scores, 1) * log2_scale
    needed = True
    if skip is not None:  # a row outside the queries asks for nothing; NaN does
        less = block_top < top + skip
        needed = tl.max((inside & (less == 0)).to(tl.int32), 0) > 0
    if needed:
        new_top = tl.maximum(top, block_top)
        # A row that has seen nothing yet has top -inf, and -inf - -inf is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.math.exp2(scores * log2_scale - base[:, None])
        decay = tl.math.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        top = new_top
        if MASKED:
            v = tl.load(v_ptrs, mask=v_dim_mask[None, :] & there[:, None], other=0.0)
            # A weight of 0 times a hidden inf or NaN is NaN, so such values wait for add_nonfinite_values.
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            flag = tl.maximum(flag, tl.max((finite == 0).to(tl.int32)))
            acc = tl.dot(weights.to(v.dtype), tl.where(finite, v, 0.0), acc, input_precision=PRECISION)
        else:
            v = tl.load(v_ptrs) if EVEN_DV else tl.load(v_ptrs, mask=v_dim_mask[None, :], other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, top, flag


@triton.jit
def attend_tile(
    program,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    flags_ptr,
    spans_ptr,
    parted_ptr,
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
    mask_ptr,
    bias_ptr,
    slopes_ptr,
    sinks_ptr,
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
    sinks_stride,
    factor,
    softcap,
    hidden,
    skip,
    SIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    CHANGED: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of BLOCK_M query rows of one head against its listed blocks."""
    item, kv_head, head, tile = program_place(program, tiles, kv_heads, group)
    row = tile * BLOCK_M // Q_BLOCK

    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < q_len
    v_dim = tl.arange(0, BLOCK_DV)
    v_dim_mask = v_dim < V_HEAD_DIM
    item64 = item.to(tl.int64)
    token64 = token.to(tl.int64)

    dim = tl.arange(0, DIM_STEP).to(tl.int64)
    q_base = q_ptr + item64 * q_stride_b + head.to(tl.int64) * q_stride_h
    q = q_base + token64[:, None] * q_stride_s + dim[None, :] * q_stride_d
    if DIM_STEP == BLOCK_D:
        q = tl.load(q, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    k_base = k_ptr + item64 * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_base = v_ptr + item64 * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    edge_key = tl.arange(0, EDGE_N).to(tl.int64)
    k_edge = k_base + dim[:, None] * k_stride_d + edge_key[None, :] * k_stride_s
    v_edge = v_base + edge_key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d
    key = tl.arange(0, BLOCK_N).to(tl.int64)
    k_tile = k_base + dim[:, None] * k_stride_d + key[None, :] * k_stride_s
    q_tail, k_edge_tail, k_tile_tail = None, None, None
    if TAIL > 0:  # the head size is a power of two and a rest
        tail = BLOCK_D + tl.arange(0, TAIL).to(tl.int64)
        q_tail = q_base + token64[:, None] * q_stride_s + tail[None, :] * q_stride_d
        q_tail = tl.load(q_tail, mask=inside[:, None] & (tail < HEAD_DIM)[None, :], other=0.0)
        k_edge_tail = k_base + tail[:, None] * k_stride_d + edge_key[None, :] * k_stride_s
        k_tile_tail = k_base + tail[:, None] * k_stride_d + key[None, :] * k_stride_s
    v_tile = v_base + key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d

    kv_segments = kv_segments_ptr
    q_segment = tl.zeros([BLOCK_M], tl.int32)
    if HAS_SEGMENTS:
        kv_segments = kv_segments_ptr + item64 * kv_segments_stride_b
        if HAS_Q_SEGMENTS:
            q_segments = q_segments_ptr + item64 * q_segments_stride_b
            q_segment = tl.load(q_segments + token64 * q_segments_stride_s, mask=inside, other=-1)
    position = token + offset

    place = item64 * span_stride_b + head.to(tl.int64) * span_stride_h + row
    count = tl.load(spans_ptr + 2 * place)
    edges = tl.load(spans_ptr + 2 * place + 1)
    blocks = parted_ptr + place * width
    PER_EDGE: tl.constexpr = KV_BLOCK // EDGE_N
    PER_BLOCK: tl.constexpr = KV_BLOCK // BLOCK_N
    EVEN_DV: tl.constexpr = V_HEAD_DIM == BLOCK_DV

    slope, mask_row, bias_row = None, None, None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + item * slopes_stride_b + head * slopes_stride_h) * 1.4426950408889634
    if mask_ptr is not None:
        mask_row = mask_ptr + item64 * mask_stride_b + head.to(tl.int64) * mask_stride_h + token64 * mask_stride_q
    if bias_ptr is not None:
        bias_row = bias_ptr + item64 * bias_stride_b + head.to(tl.int64) * bias_stride_h + token64 * bias_stride_q

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:  # as a key already seen, whose value is 0
        sink = tl.load(sinks_ptr + head * sinks_stride)
        top = tl.zeros([BLOCK_M], tl.float32) + sink * 1.4426950408889634
        total = total + tl.where(sink == float("-inf"), 0.0, 1.0)
    flag = 0
    for step in tl.range(0, edges * PER_EDGE, num_stages=EDGE_STAGES):
        start = tl.load(blocks + step // PER_EDGE) * KV_BLOCK + step % PER_EDGE * EDGE_N
        acc, total, top, flag = fold_block(
            q, acc, total, top, flag, k_edge, v_edge, k_stride_s, v_stride_s, start, position, q_segment,
            kv_segments, kv_segments_stride_s, kv_len, left, right, log2_scale, inside, v_dim_mask,
            q_stride_d, k_stride_d, q_tail, k_edge_tail, factor, softcap, slope, bias_row, bias_stride_k, mask_row,
            mask_stride_k, hidden, None, EDGE_N, HEAD_DIM, BLOCK_D, DIM_STEP, TAIL, EVEN_DV, SIGN, True, HAS_SEGMENTS,
            CHANGED, PRECISION,
        )  # fmt: skip
    for step in range(edges * PER_BLOCK, count * PER_BLOCK):
        start = tl.load(blocks + step // PER_BLOCK) * KV_BLOCK + step % PER_BLOCK * BLOCK_N
        acc, total, top, flag = fold_block(
            q, acc, total, top, flag, k_tile, v_tile, k_stride_s, v_stride_s, start, position, q_segment,
            kv_segments, kv_segments_stride_s, kv_len, left, right, log2_scale, inside, v_dim_mask,
            q_stride_d, k_stride_d, q_tail, k_tile_tail, factor, softcap, slope, bias_row, bias_stride_k, mask_row,
            mask_stride_k, hidden, skip, BLOCK_N, HEAD_DIM, BLOCK_D, DIM_STEP, TAIL, EVEN_DV, SIGN, False, HAS_SEGMENTS,
            CHANGED, PRECISION,
        )  # fmt: skip

    tl.store(flags_ptr + program, flag)

    # total is 0 only for rows that saw nothing: their acc is 0 and their log-sum-exp -inf.
    share = tl.where(total == 0.0, 1.0, total)[:, None]
    FULL: tl.constexpr = out_ptr.dtype.element_ty == tl.float32  # else it may be off by two units in the last place
    out = tl.div_rn(acc, tl.broadcast_to(share, acc.shape)) if FULL else acc / share
    heads = kv_heads * group
    out_row = (item64 * q_len + token64) * heads + head
    tl.store(
        out_ptr + out_row[:, None] * V_HEAD_DIM + v_dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & v_dim_mask[None, :],
    )
    if RETURN_LSE:
        lse = (tl.where(total == 0.0, 0.0, top) + tl.math.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (item64 * heads + head) * q_len + token, lse, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    flags_ptr,
    spans_ptr,
    parted_ptr,
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
    mask_ptr,
    bias_ptr,
    slopes_ptr,
    sinks_ptr,
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
    sinks_stride,
    factor,
    softcap,
    hidden,
    skip,
    SIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    CHANGED: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every tile. Grid: 1-D, batch * heads * tiles."""
    attend_tile(
        tl.program_id(0),
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, flags_ptr, spans_ptr, parted_ptr, q_segments_ptr,
        kv_segments_ptr, log2_scale, q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h,
        k_stride_s, k_stride_d, v_stride_b, v_stride_h, v_stride_s, v_stride_d, q_segments_stride_b,
        q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s, span_stride_b, span_stride_h,
        q_len, kv_len, left, right, offset, tiles, width, kv_heads, group, mask_ptr, bias_ptr, slopes_ptr,
        sinks_ptr, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k, bias_stride_b, bias_stride_h,
        bias_stride_q, bias_stride_k, slopes_stride_b, slopes_stride_h, sinks_stride, factor, softcap, hidden,
        skip, SIGN, Q_BLOCK, KV_BLOCK, BLOCK_M, BLOCK_N, EDGE_N, EDGE_STAGES, HEAD_DIM, V_HEAD_DIM, BLOCK_D, DIM_STEP,
        TAIL, BLOCK_DV, HAS_SEGMENTS, HAS_Q_SEGMENTS, CHANGED, RETURN_LSE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attend_again(
    redo_ptr,
    programs,
    REDO: tl.constexpr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    flags_ptr,
    spans_ptr,
    parted_ptr,
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
    SIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
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
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tiles that another kernel left with a non-finite value in ``redo_ptr`` int32 [programs]; flags them.

    Grid: ceil(programs / REDO). Nearly always it reads the marks, all 0, and ends.
    """
    mine = tl.program_id(0) * REDO + tl.arange(0, REDO)
    marks = tl.load(redo_ptr + mine, mask=mine < programs, other=0)
    tl.store(flags_ptr + mine, tl.zeros([REDO], tl.int32), mask=mine < programs)
    if tl.max(marks, 0) == 0:
        return
    for program in range(tl.program_id(0) * REDO, tl.minimum((tl.program_id(0) + 1) * REDO, programs)):
        if tl.load(redo_ptr + program) > 0:
            attend_tile(
                program,
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, flags_ptr, spans_ptr, parted_ptr, q_segments_ptr,
                kv_segments_ptr, log2_scale, q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b,
                k_stride_h, k_stride_s, k_stride_d, v_stride_b, v_stride_h, v_stride_s, v_stride_d,
                q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
                span_stride_b, span_stride_h, q_len, kv_len, left, right, offset, tiles, width,
                kv_heads, group, None, None, None, None, None, None, None, None, None, None,
                None, None, None, None, None, None, None, None, None, SIGN, Q_BLOCK, KV_BLOCK, BLOCK_M, BLOCK_N,
                EDGE_N, EDGE_STAGES, HEAD_DIM, V_HEAD_DIM, BLOCK_D, DIM_STEP, 0, BLOCK_DV, HAS_SEGMENTS, HAS_Q_SEGMENTS,
                False, RETURN_LSE, PRECISION,
            )  # fmt: skip
