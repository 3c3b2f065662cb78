"""XAttention's block scores in Triton (arXiv 2503.16428): softmax mass of antidiagonal sums.

``stride`` tokens fold into one: with the queries' order reversed inside a fold, one product of folded rows sums an
antidiagonal of the pairs. Softmax runs over a folded query's whole row, so its normalizer is known late: the first
kernel writes each folded query's log mass per key block, the second normalizes and sums the folds of a query block.
Heads go through one shared buffer in turns. Conventions of shapes, bands, segments: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.blocks import ceil_div, dim_steps, tile_side
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.spec import capability_of

PARTS_BYTES = 256 << 20
"""Size of the shared buffer, unless one head alone needs more."""


@triton.jit(do_not_specialize=(*VARYING, "first_plane", "folds", "kv_folds"))
def _fold_parts(
    q_ptr,
    k_ptr,
    q_ranges_ptr,
    kv_ranges_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    parts_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    scale,
    q_len,
    kv_len,
    left,
    right,
    offset,
    blocks,
    folds,
    kv_folds,
    q_planes,
    kv_planes,
    heads,
    group,
    first_plane,
    STRIDE: tl.constexpr,
    FOLDS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """parts [planes, folds, nkv]: log of the summed exp of a folded query's scores in a key block of FOLDS folds.

    Grid: (tiles of key folds, tiles of query folds, planes of this turn). Tiles that the band hides are not written.
    """
    plane = first_plane + tl.program_id(2)
    item = plane // heads
    head = plane % heads
    fold = (tl.num_programs(1) - 1 - tl.program_id(1)) * TILE_Q + tl.arange(0, TILE_Q)
    kv_fold = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)

    first = fold * STRIDE + offset
    last = tl.minimum((fold + 1) * STRIDE, q_len) - 1 + offset
    first_key = kv_fold * STRIDE
    last_key = tl.minimum((kv_fold + 1) * STRIDE, kv_len) - 1
    counts = (first_key[None, :] <= (last + right)[:, None]) & (last_key[None, :] >= (first - left)[:, None])
    counts = counts & (fold < folds)[:, None] & (kv_fold < kv_folds)[None, :]
    if tl.max(tl.max(counts.to(tl.int32), 1), 0) == 0:
        return
    q_base = q_ptr + item.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    k_base = k_ptr + item.to(tl.int64) * k_stride_b + (head // group).to(tl.int64) * k_stride_h
    score = tl.zeros([TILE_Q, TILE_K], tl.float32)
    for step in range(STRIDE):
        token = fold * STRIDE + (STRIDE - 1 - step)
        key = kv_fold * STRIDE + step
        q_there = token < q_len
        k_there = key < kv_len
        if HAS_SEGMENTS:
            kv_segments = kv_segments_ptr + item.to(tl.int64) * kv_segments_stride_b
            segment = tl.load(kv_segments + key.to(tl.int64) * kv_segments_stride_s, mask=k_there, other=-1)
            k_there = segment != -1
            if HAS_Q_SEGMENTS:
                q_segments = q_segments_ptr + item.to(tl.int64) * q_segments_stride_b
                segment = tl.load(q_segments + token.to(tl.int64) * q_segments_stride_s, mask=q_there, other=-1)
                q_there = segment != -1
        for begin in tl.static_range(0, BLOCK_D, DIM_STEP):
            dim = begin + tl.arange(0, DIM_STEP)
            q = tl.load(
                q_base + token.to(tl.int64)[:, None] * q_stride_s + dim.to(tl.int64)[None, :] * q_stride_d,
                mask=q_there[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            k = tl.load(
                k_base + key.to(tl.int64)[:, None] * k_stride_s + dim.to(tl.int64)[None, :] * k_stride_d,
                mask=k_there[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            )
            score = tl.dot(q, tl.trans(k), score, input_precision=PRECISION)
    if HAS_SEGMENTS:
        kv_low = tl.load(kv_ranges_ptr + item * kv_folds + kv_fold, mask=kv_fold < kv_folds, other=0)
        kv_high = tl.load(kv_ranges_ptr + kv_planes + item * kv_folds + kv_fold, mask=kv_fold < kv_folds, other=-1)
        q_low = tl.zeros([TILE_Q], tl.int32)
        q_high = tl.zeros([TILE_Q], tl.int32)
        if HAS_Q_SEGMENTS:
            q_low = tl.load(q_ranges_ptr + item * folds + fold, mask=fold < folds, other=0)
            q_high = tl.load(q_ranges_ptr + q_planes + item * folds + fold, mask=fold < folds, other=-1)
        counts = counts & (q_low[:, None] <= kv_high[None, :]) & (kv_low[None, :] <= q_high[:, None])
        counts = counts & (kv_high != -1)[None, :] & (q_high != -1)[:, None]
    score = tl.where(counts, score * (scale / STRIDE), float("-inf"))
    score = tl.reshape(score, [TILE_Q, TILE_K // FOLDS, FOLDS])
    top = tl.max(score, 2)
    finite = tl.where(top == float("-inf"), 0.0, top)
    part = finite + tl.log(tl.sum(tl.exp(score - finite[:, :, None]), 2))
    block = tl.program_id(0) * (TILE_K // FOLDS) + tl.arange(0, TILE_K // FOLDS)
    at = parts_ptr + (tl.program_id(2).to(tl.int64) * folds + fold)[:, None] * blocks + block[None, :]
    tl.store(at, part, mask=(fold < folds)[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=(*VARYING, "first_plane", "folds"))
def _scores_from_parts(
    parts_ptr,
    scores_ptr,
    q_len,
    kv_len,
    left,
    right,
    offset,
    rows,
    blocks,
    folds,
    first_plane,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    FOLDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """scores [B, H, nq, nkv]: log of the mass that a query block's folds give each key block. Grid: (nq, planes)."""
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    low = tl.maximum(first - left, 0)
    high = tl.minimum(last + right, kv_len - 1)
    shown = (low <= high) & (column * KV_BLOCK <= high) & (column * KV_BLOCK + KV_BLOCK > low)
    mass = tl.zeros([COLUMNS], tl.float32)
    for fold in range(row * FOLDS, tl.minimum((row + 1) * FOLDS, folds)):
        at = parts_ptr + (tl.program_id(1).to(tl.int64) * folds + fold) * blocks + column
        part = tl.load(at, mask=shown, other=float("-inf"))
        top = tl.max(part, 0)
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp(part - finite)
        total = tl.sum(weight, 0)
        mass += weight / tl.where(total > 0.0, total, 1.0)
    place = ((first_plane + tl.program_id(1)).to(tl.int64) * rows + row) * blocks
    tl.store(scores_ptr + place + column, tl.log(mass), mask=shown)


def antidiagonal_launches(
    q: Tensor,
    k: Tensor,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_ranges: Tensor | None,
    kv_ranges: Tensor | None,
    scale: float,
    band: dict[str, int],
    q_block: int,
    kv_block: int,
    stride: int,
) -> tuple[list[Launch], Tensor]:
    """Launches that score blocks, and the result float32 [B, H, nq, nkv].

    ``q_ranges`` int32 [2, B, folds] and ``kv_ranges``: least and greatest segment of each fold of ``stride`` tokens.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows, blocks = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    folds, kv_folds = ceil_div(q_len, stride), ceil_div(kv_len, stride)
    planes = batch * heads
    turn = max(1, min(planes, PARTS_BYTES // (4 * folds * blocks)))
    parts = q.new_empty(turn, folds, blocks, dtype=torch.float32)
    scores = q.new_empty(batch, heads, rows, blocks, dtype=torch.float32)
    half = q.dtype != torch.float32
    tile_q, tile_k = (128, 128) if half else (32, 32)
    if head_dim > 128:
        tile_q, tile_k = (128, 64) if half else (32, 32)
    tile_q, tile_k = max(tile_q, q_block // stride), max(tile_k, kv_block // stride)
    segmented = kv_segments is not None
    q_given = segmented and q_segments is not None
    seen_q, seen_k = (q_segments if q_given else None), kv_segments
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "q_ranges_ptr": scores if q_ranges is None else q_ranges,
        "kv_ranges_ptr": scores if kv_ranges is None else kv_ranges,
        "q_segments_ptr": scores if seen_q is None else seen_q,
        "kv_segments_ptr": scores if seen_k is None else seen_k,
        "parts_ptr": parts,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_s", "k_stride_d"), k.stride(), strict=True)),
        "q_segments_stride_b": 0 if seen_q is None else seen_q.stride(0),
        "q_segments_stride_s": 1 if seen_q is None else seen_q.stride(1),
        "kv_segments_stride_b": 0 if seen_k is None else seen_k.stride(0),
        "kv_segments_stride_s": 1 if seen_k is None else seen_k.stride(1),
        "scale": scale,
        **band,
        "blocks": blocks,
        "folds": folds,
        "kv_folds": kv_folds,
        "q_planes": 0 if q_ranges is None else q_ranges.stride(0),
        "kv_planes": 0 if kv_ranges is None else kv_ranges.stride(0),
        "heads": heads,
        "group": heads // kv_heads,
        "STRIDE": stride,
        "FOLDS": kv_block // stride,
        "TILE_Q": tile_q,
        "TILE_K": tile_k,
        "HEAD_DIM": head_dim,
        "BLOCK_D": dim_steps(head_dim, 64)[0],
        "DIM_STEP": dim_steps(head_dim, 64)[1] if half else min(32, tile_side(head_dim)),
        "HAS_SEGMENTS": segmented,
        "HAS_Q_SEGMENTS": q_given,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    after: dict[str, Any] = {
        "parts_ptr": parts,
        "scores_ptr": scores,
        **band,
        "rows": rows,
        "blocks": blocks,
        "folds": folds,
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "FOLDS": q_block // stride,
        "COLUMNS": tile_side(blocks),
    }
    # More stages spill on the other targets.
    stages = 3 if half and head_dim <= 128 and capability_of(q.device)[0] == 9 else 1
    launches = []
    for begin in range(0, planes, turn):
        some = min(turn, planes - begin)
        grid = (ceil_div(kv_folds, tile_k), ceil_div(folds, tile_q), some)
        options = {"num_warps": 8, "num_stages": stages}
        launches.append(Launch(_fold_parts, grid, {**arguments, "first_plane": begin}, options))
        launches.append(Launch(_scores_from_parts, (rows, some), {**after, "first_plane": begin}, {"num_warps": 4}))
    return launches, scores
