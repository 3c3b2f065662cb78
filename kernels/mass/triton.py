"""Kept attention mass of sampled queries in Triton: two launches, the keys read once.

The first finds each sampled row's log-sum-exp over a tile of keys, for all query heads of a KV head together; the
second merges the tiles and compares with what the attention kernel summed. Conventions:
``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.arguments import check_segments
from sparsepass.kernels.blocks import ceil_div, tile_side
from sparsepass.kernels.mass.api import STEP
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.spec import refuse_unsupported

LOG2E = 1.4426950408889634
CHANGING = (*VARYING, "key_tiles", "queries")


@triton.jit
def _row(number, q_len, COUNT: tl.constexpr, WEYL: tl.constexpr):
    """The ``number``-th sampled row, int64: as ``sampled.sampled_rows`` has it."""
    number = number.to(tl.int64)
    row = ((number << 16) + ((number * WEYL) & 65535)) * q_len // (COUNT << 16)
    return tl.where(number == COUNT - 1, q_len - 1, row)


@triton.jit(do_not_specialize=CHANGING)
def _tile_lse(
    q_ptr,
    k_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    parts_ptr,
    log2_scale,
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
    q_len,
    kv_len,
    left,
    right,
    offset,
    key_tiles,
    kv_heads,
    group,
    COUNT: tl.constexpr,
    WEYL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 log-sum-exp of every sampled row over one tile of keys: parts [B, H, COUNT, key_tiles].

    Grid: (key_tiles, kv_heads, batch).
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    item = tl.program_id(2).to(tl.int64)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = key < kv_len
    segment = tl.zeros([BLOCK_N], tl.int32)
    if HAS_SEGMENTS:
        kv_row = kv_segments_ptr + item * kv_segments_stride_b
        segment = tl.load(kv_row + key.to(tl.int64) * kv_segments_stride_s, mask=there, other=-1)
        there = there & (segment != -1)
    dim = tl.arange(0, DIM_STEP)
    k_base = k_ptr + item * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    k_ptrs = k_base + key.to(tl.int64)[None, :] * k_stride_s + dim.to(tl.int64)[:, None] * k_stride_d
    if DIM_STEP == BLOCK_D:
        k = tl.load(k_ptrs, mask=(dim < HEAD_DIM)[:, None] & there[None, :], other=0.0)
    for begin in range(0, group * COUNT, BLOCK_M):
        lane = begin + tl.arange(0, BLOCK_M)
        valid = lane < group * COUNT
        head = kv_head * group + lane // COUNT
        token = _row(lane % COUNT, q_len, COUNT, WEYL)
        q_ptrs = q_ptr + item * q_stride_b + head.to(tl.int64) * q_stride_h + token * q_stride_s
        q_ptrs = q_ptrs[:, None] + dim.to(tl.int64)[None, :] * q_stride_d
        if DIM_STEP == BLOCK_D:
            q = tl.load(q_ptrs, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION)
        else:
            scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for first in tl.static_range(0, BLOCK_D, DIM_STEP):
                here = first + dim < HEAD_DIM
                step = tl.full([], first, tl.int64)
                q = tl.load(q_ptrs + step * q_stride_d, mask=valid[:, None] & here[None, :], other=0.0)
                part = tl.load(k_ptrs + step * k_stride_d, mask=here[:, None] & there[None, :], other=0.0)
                scores += tl.dot(q, part, input_precision=PRECISION)
        position = token + offset
        seen = valid[:, None] & there[None, :] & (key[None, :] >= (position - left)[:, None])
        seen = seen & (key[None, :] <= (position + right)[:, None])
        if HAS_SEGMENTS:
            mine = tl.zeros([BLOCK_M], tl.int32)
            if HAS_Q_SEGMENTS:
                own = q_segments_ptr + item * q_segments_stride_b + token * q_segments_stride_s
                mine = tl.load(own, mask=valid, other=-1)
            seen = seen & (segment[None, :] == mine[:, None])
        scores = tl.where(seen, scores * log2_scale, float("-inf"))
        top = tl.max(scores, 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(scores - base[:, None]), 1)
        found = tl.where(total > 0, base + tl.log2(total), float("-inf"))
        place = ((item * kv_heads * group + head) * COUNT + lane % COUNT) * key_tiles + tile
        tl.store(parts_ptr + place, found, mask=valid)


@triton.jit(do_not_specialize=CHANGING)
def _compare(
    parts_ptr, lse_ptr, kept_ptr, q_len, key_tiles, COUNT: tl.constexpr, WEYL: tl.constexpr, CHUNK: tl.constexpr
):
    """Kept mass [B, H, COUNT] from the tiles' parts and the kernel's lse [B, H, q_len]. Grid: one program each."""
    program = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    base = parts_ptr + program.to(tl.int64) * key_tiles
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, key_tiles, CHUNK):
        part = tl.load(base + start + lane, mask=start + lane < key_tiles, other=float("-inf"))
        new = tl.maximum(top, tl.max(part, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(part - shift), 0)
        top = new
    plane = (program // COUNT).to(tl.int64)
    mine = tl.load(lse_ptr + plane * q_len + _row(program % COUNT, q_len, COUNT, WEYL)) * 1.4426950408889634
    exact = top + tl.log2(total)
    kept = tl.minimum(tl.exp2(mine - exact), 1.0)
    tl.store(kept_ptr + program, tl.where(total > 0, kept, float("nan")))


def kept_mass_cuda(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    count: int,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
) -> Tensor:
    """Share of the attention mass kept in ``count`` sampled rows, float32 [B, H, count], NaN where a row sees nothing.

    q [B, H, Sq, D] and k [B, Hkv, Skv, D], fp16, bf16 or fp32, any strides; ``lse`` float32 [B, H, Sq], contiguous,
    natural logarithm. Deterministic. Raises ``KernelInputError``.
    """
    band = {"left": left, "right": right, "offset": offset}

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, kept = sampled_launches(
            q, k, lse, count=count, scale=scale, **band, q_segments=q_segments, kv_segments=kv_segments
        )
        return launches, (kept,)

    inputs = (q, k, lse, q_segments, kv_segments)
    (kept,) = run_prepared(q.device, ("sampled", count, scale, *band.values()), inputs, build)
    return cast(Tensor, kept)


def sampled_launches(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    count: int,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
) -> tuple[list[Launch], Tensor]:
    """The launches of ``kept_mass_cuda`` and what they fill."""
    host.check_shapes(q, k, None, offset, 128, 128)
    q_segments, kv_segments = check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("kept_mass_cuda", q)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    host.require(
        lse.shape == (batch, heads, q_len) and lse.dtype == torch.float32 and lse.is_contiguous(),
        lambda: f"lse is {lse.dtype} {tuple(lse.shape)}; expected contiguous float32 {(batch, heads, q_len)}.",
    )
    host.require(1 <= count <= 1024, lambda: f"count is {count}; accepted are 1 to 1024 rows.")
    block_d = tile_side(head_dim)
    wide = q.dtype == torch.float32
    block_m = 32 if wide else 64
    block_n = 32 if wide else 64 if block_d > 128 else 128
    key_tiles = ceil_div(kv_len, block_n)
    parts = q.new_empty(batch, heads, count, key_tiles, dtype=torch.float32)
    kept = q.new_empty(batch, heads, count, dtype=torch.float32)
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "q_segments_ptr": lse if q_segments is None else q_segments,
        "kv_segments_ptr": lse if kv_segments is None else kv_segments,
        "parts_ptr": parts,
        "log2_scale": scale * LOG2E,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_s", "k_stride_d"), k.stride(), strict=True)),
        "q_segments_stride_b": 0 if q_segments is None else q_segments.stride(0),
        "q_segments_stride_s": 1 if q_segments is None else q_segments.stride(1),
        "kv_segments_stride_b": 0 if kv_segments is None else kv_segments.stride(0),
        "kv_segments_stride_s": 1 if kv_segments is None else kv_segments.stride(1),
        "q_len": q_len,
        "kv_len": kv_len,
        "left": host.side(left),
        "right": host.side(right),
        "offset": offset,
        "key_tiles": key_tiles,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "COUNT": count,
        "WEYL": STEP,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "DIM_STEP": 16 if wide else block_d,
        "HAS_SEGMENTS": kv_segments is not None,
        "HAS_Q_SEGMENTS": q_segments is not None,
        "PRECISION": "tf32x3",
    }
    compare = {
        "parts_ptr": parts,
        "lse_ptr": lse,
        "kept_ptr": kept,
        "q_len": q_len,
        "key_tiles": key_tiles,
        "COUNT": count,
        "WEYL": STEP,
        "CHUNK": 256,
    }
    launches = [
        Launch(_tile_lse, (key_tiles, kv_heads, batch), arguments, {"num_warps": 8 if wide else 4, "num_stages": 2}),
        Launch(_compare, (batch * heads * count,), compare, {"num_warps": 1}),
    ]
    return launches, kept
