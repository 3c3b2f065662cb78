"""Triton: what happens to scaled scores before the softmax, pair by pair (``kernels/scores.py``).

Every term has a pointer or a number that is None where the term is not there; then nothing of it is compiled.
"""

import triton
import triton.language as tl

from sparsepass.kernels.attend.triton.visible import shown_pairs, visible_pairs
from sparsepass.kernels.runtime.launch import VARYING

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def hyperbolic_tangent(x, EXACT: tl.constexpr):
    """tanh of float32. By its exponential it errs by 1e-7, which is little in a score but many units of a small one:
    EXACT takes an odd polynomial there.
    """
    far = 1.0 - 2.0 / (tl.math.exp2(x * (2.0 * LOG2E)) + 1.0)
    if EXACT:
        x2 = x * x
        p = -8.8632355e-3 * x2 + 2.1869488e-2
        p = p * x2 - 5.3968254e-2
        p = p * x2 + 0.13333333
        p = p * x2 - 0.33333333
        far = tl.where(tl.abs(x) < 0.35, x + x * (p * x2), far)
    return far


@triton.jit
def changed_scores(scores, factor, softcap, slope, distance, EXACT: tl.constexpr):
    """Products [BLOCK_M, KEYS] after scale, soft cap and slope, times log2(e).

    ``factor``: the scale over the soft cap, without one times log2(e); ``softcap``: times log2(e), or None;
    ``slope``: times log2(e), or None; ``distance``: key minus query position.
    """
    scores = scores * factor
    if softcap is not None:
        scores = softcap * hyperbolic_tangent(scores, EXACT)
    if slope is not None:
        scores = scores + slope * distance.to(tl.float32)
    return scores


@triton.jit(do_not_specialize=VARYING)
def _block_map(
    map_ptr,
    mask_ptr,
    bias_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    q_len,
    kv_len,
    left,
    right,
    offset,
    rows,
    blocks,
    heads,
    hidden,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One entry of the block map: 0 no pair is visible, 2 mask and bias hide none, 1 otherwise.

    Grid: (nkv, nq, batch * heads of the map). Where the band hides the block, nothing is read.
    """
    block = tl.program_id(0)
    row = tl.program_id(1)
    head = tl.program_id(2) % heads
    item = tl.program_id(2) // heads
    item64, head64 = item.to(tl.int64), head.to(tl.int64)
    start = block * KV_BLOCK
    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    state = tl.full([], 0, tl.int32)
    if (start <= last + right) & (tl.minimum(start + KV_BLOCK, kv_len) > first - left):
        some = tl.zeros([STEP], tl.int32)
        every = tl.full([STEP], 1, tl.int32)
        for begin in range(0, Q_BLOCK, STEP):
            token = row * Q_BLOCK + begin + tl.arange(0, STEP)
            inside = token < q_len
            q_segment = tl.zeros([STEP], tl.int32)
            kv_segments = kv_segments_ptr
            if kv_segments_ptr is not None:
                kv_segments = kv_segments_ptr + item64 * kv_segments_stride_b
                if q_segments_ptr is not None:
                    at = q_segments_ptr + item64 * q_segments_stride_b + token.to(tl.int64) * q_segments_stride_s
                    q_segment = tl.load(at, mask=inside, other=-1)
            visible, _ = visible_pairs(
                start, token + offset, q_segment, kv_segments, kv_segments_stride_s, kv_len, left, right,
                KV_BLOCK, kv_segments_ptr is not None,
            )  # fmt: skip
            key = start + tl.arange(0, KV_BLOCK)
            mask_row = mask_ptr
            if mask_ptr is not None:
                mask_row = (
                    mask_ptr + item64 * mask_stride_b + head64 * mask_stride_h + token.to(tl.int64) * mask_stride_q
                )
            bias_row = bias_ptr
            if bias_ptr is not None:
                bias_row = (
                    bias_ptr + item64 * bias_stride_b + head64 * bias_stride_h + token.to(tl.int64) * bias_stride_q
                )
            in_keys = key < kv_len
            shown = shown_pairs(key, inside, in_keys, bias_row, bias_stride_k, mask_row, mask_stride_k, hidden)
            hides = (shown == 0) & inside[:, None] & in_keys[None, :]
            some = tl.maximum(some, tl.max((shown & visible).to(tl.int32), 1))
            every = tl.minimum(every, 1 - tl.max(hides.to(tl.int32), 1))
        state = tl.max(some, 0) * (1 + tl.min(every, 0))
    place = ((item64 * heads + head) * rows + row) * blocks + block
    tl.store(map_ptr + place, state.to(tl.int8))
