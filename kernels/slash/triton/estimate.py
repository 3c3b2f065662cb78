"""What a few sampled queries attend to, in Triton: their attention mass per key and per diagonal (arXiv 2407.02490).

Sampled queries come in windows of 64 consecutive ones. Scores never leave the chip: a first launch finds each query's
maximum and sum per tile of keys, a second merges those, a third computes the weights again and adds them up along
columns and diagonals, a fourth adds up the tiles' parts of each diagonal. All sums run in one fixed order.
Conventions of shapes, bands and segments: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.arguments import check_segments
from sparsepass.kernels.blocks import ceil_div, dim_steps
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.slash.windows import WINDOW
from sparsepass.kernels.spec import capability_of, refuse_unsupported

LOG2E = 1.4426950408889634
CHANGING = (*VARYING, "key_tiles", "windows", "diagonals", "first_diagonal", "queries")


@triton.jit
def _window_scores(
    q_base,
    k,
    start,
    count,
    key,
    there,
    q_segments,
    segment,
    q_stride_s,
    q_stride_d,
    q_segments_stride_s,
    left,
    right,
    offset,
    log2_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    k_stride_d,
    WINDOW: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores times log2(e) of one window's queries with a tile of keys, -inf where a pair is not seen."""
    lane = tl.arange(0, WINDOW)
    token = start + lane
    valid = lane < count
    dim = tl.arange(0, DIM_STEP)
    q_ptrs = q_base + token.to(tl.int64)[:, None] * q_stride_s + dim.to(tl.int64)[None, :] * q_stride_d
    if DIM_STEP == BLOCK_D:
        q = tl.load(q_ptrs, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
    else:  # k is then a tile of pointers
        scores = tl.zeros([WINDOW, key.shape[0]], tl.float32)
        for begin in tl.static_range(0, BLOCK_D, DIM_STEP):
            here = begin + dim < HEAD_DIM
            step = tl.full([], begin, tl.int64)
            q = tl.load(q_ptrs + step * q_stride_d, mask=valid[:, None] & here[None, :], other=0.0)
            part = tl.load(k + step * k_stride_d, mask=here[:, None] & there[None, :], other=0.0)
            scores += tl.dot(q, part, input_precision=PRECISION)
    position = token + offset
    seen = valid[:, None] & there[None, :] & (key[None, :] >= (position - left)[:, None])
    seen = seen & (key[None, :] <= (position + right)[:, None])
    if HAS_SEGMENTS:
        mine = tl.zeros([WINDOW], tl.int32)
        if HAS_Q_SEGMENTS:
            mine = tl.load(q_segments + token.to(tl.int64) * q_segments_stride_s, mask=valid, other=-1)
        seen = seen & (segment[None, :] == mine[:, None])
    return tl.where(seen, scores * log2_scale, float("-inf"))


@triton.jit(do_not_specialize=CHANGING)
def _estimate(
    q_ptr,
    k_ptr,
    starts_ptr,
    counts_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    tops_ptr,
    sums_ptr,
    lse_ptr,
    columns_ptr,
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
    kv_len,
    left,
    right,
    offset,
    windows,
    key_tiles,
    kv_heads,
    group,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys against every window of every query head of its group. Grid: (key_tiles, kv_heads, batch).

    Without SUM: maxima and sums of the windows' rows over this tile, [B, H, windows * WINDOW, key_tiles]. With it:
    column sums [B, H, kv_len], and sums along the tile's diagonals [B, H, windows, key_tiles, BLOCK_N + WINDOW].
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    item = tl.program_id(2)
    item64 = item.to(tl.int64)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = key < kv_len
    dim = tl.arange(0, DIM_STEP)
    k = k_ptr + item64 * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    k = k + key.to(tl.int64)[None, :] * k_stride_s + dim.to(tl.int64)[:, None] * k_stride_d
    segment = tl.zeros([BLOCK_N], tl.int32)
    q_segments = q_segments_ptr
    if HAS_SEGMENTS:
        kv_row = kv_segments_ptr + item64 * kv_segments_stride_b
        segment = tl.load(kv_row + key.to(tl.int64) * kv_segments_stride_s, mask=there, other=-1)
        there = there & (segment != -1)
        q_segments = q_segments_ptr + item64 * q_segments_stride_b
    if DIM_STEP == BLOCK_D:
        k = tl.load(k, mask=(dim < HEAD_DIM)[:, None] & there[None, :], other=0.0)
    lane = tl.arange(0, WINDOW)
    at = tl.arange(0, BLOCK_N)
    for member in range(group):
        plane = (item * kv_heads + kv_head).to(tl.int64) * group + member
        q_base = q_ptr + item64 * q_stride_b + (kv_head * group + member).to(tl.int64) * q_stride_h
        column = tl.zeros([BLOCK_N], tl.float32)
        for window in range(windows):
            start = tl.load(starts_ptr + item * windows + window)
            count = tl.load(counts_ptr + item * windows + window)
            scores = _window_scores(
                q_base, k, start, count, key, there, q_segments, segment, q_stride_s, q_stride_d,
                q_segments_stride_s, left, right, offset, log2_scale, HEAD_DIM, BLOCK_D, DIM_STEP, k_stride_d, WINDOW,
                HAS_SEGMENTS, HAS_Q_SEGMENTS, PRECISION,
            )  # fmt: skip
            row = (plane * windows + window) * WINDOW + lane
            if SUM:
                lse = tl.load(lse_ptr + row)
                # Rows that see nothing, or something not finite, estimate nothing.
                sound = tl.abs(lse) < float("inf")
                weights = tl.math.exp2(scores - tl.where(sound, lse, 0.0)[:, None])
                weights = tl.where(sound[:, None], weights, 0.0)
                column += tl.sum(weights, 0)
                # Turning row r left by r puts the diagonal c - r = j into column j; what wraps around ``turn`` times
                # belongs to j - turn * BLOCK_N.
                source = at[None, :] + lane[:, None]
                turned = tl.gather(weights, source % BLOCK_N, 1)
                parts = parts_ptr + ((plane * windows + window) * key_tiles + tile) * (BLOCK_N + WINDOW)
                for turn in tl.static_range((BLOCK_N + WINDOW - 2) // BLOCK_N + 1):
                    diagonal = at + WINDOW - turn * BLOCK_N
                    part = tl.where(source >= turn * BLOCK_N, turned, 0.0)
                    if (turn + 1) * BLOCK_N < BLOCK_N + WINDOW - 1:  # else this is the last turn
                        part = tl.where(source < (turn + 1) * BLOCK_N, part, 0.0)
                    part = tl.sum(part, 0)
                    tl.store(parts + diagonal, part, mask=diagonal >= 0)
            else:
                top = tl.max(scores, 1)
                base = tl.where(top == float("-inf"), 0.0, top)
                total = tl.sum(tl.math.exp2(scores - base[:, None]), 1)
                tl.store(tops_ptr + row * key_tiles + tile, top)
                tl.store(sums_ptr + row * key_tiles + tile, total)
        if SUM:
            tl.store(columns_ptr + plane * kv_len + key, column, mask=key < kv_len)


@triton.jit(do_not_specialize=CHANGING)
def _merge_tiles(tops_ptr, sums_ptr, lse_ptr, key_tiles, CHUNK: tl.constexpr):
    """Base-2 log-sum-exp of each sampled query from its tiles' maxima and sums. Grid: (B * H * queries,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    top = tl.full([CHUNK], float("-inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, key_tiles, CHUNK):
        there = begin + lane < key_tiles
        new = tl.load(tops_ptr + row * key_tiles + begin + lane, mask=there, other=float("-inf"))
        sums = tl.load(sums_ptr + row * key_tiles + begin + lane, mask=there, other=0.0)
        high = tl.maximum(top, new)
        base = tl.where(high == float("-inf"), 0.0, high)
        total = total * tl.math.exp2(top - base) + sums * tl.math.exp2(new - base)
        top = high
    high = tl.max(top, 0)
    base = tl.where(high == float("-inf"), 0.0, high)
    total_all = tl.sum(total * tl.math.exp2(top - base), 0)
    tl.store(lse_ptr + row, base + tl.math.log2(total_all))


@triton.jit(do_not_specialize=CHANGING)
def _add_diagonals(
    parts_ptr,
    starts_ptr,
    diagonals_ptr,
    diagonals,
    first_diagonal,
    windows,
    key_tiles,
    heads,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Sums of the tiles' parts of each diagonal: [B, H, diagonals]. Grid: (chunks of diagonals, heads, batch)."""
    head = tl.program_id(1)
    item = tl.program_id(2)
    plane = (item * heads + head).to(tl.int64)
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], tl.float32)
    for window in range(windows):
        start = tl.load(starts_ptr + item * windows + window)
        # Shifted so that it is not negative where a tile may hold it; tiles before may too, past their BLOCK_N.
        place = first_diagonal + index + start + WINDOW
        base = parts_ptr + (plane * windows + window) * key_tiles * (BLOCK_N + WINDOW)
        for back in tl.static_range((WINDOW + 2 * BLOCK_N - 1) // BLOCK_N):
            tile = tl.where(place >= 0, place, -BLOCK_N) // BLOCK_N - back
            within = place - tile * BLOCK_N
            there = (place >= 0) & (tile >= 0) & (tile < key_tiles) & (within < BLOCK_N + WINDOW)
            total += tl.load(base + tile.to(tl.int64) * (BLOCK_N + WINDOW) + within, mask=there, other=0.0)
    tl.store(diagonals_ptr + plane * diagonals + index, total, mask=index < diagonals)


def estimate_cuda(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    first_diagonal: int,
    diagonals: int,
) -> tuple[Tensor, Tensor]:
    """Attention mass of sampled queries per key and per diagonal.

    Args:
        q, k: [B, H, Sq, D] and [B, Hkv, Skv, D], fp16, bf16 or fp32, any strides.
        starts, counts: int32 [B, windows]: first row of each window of queries, and how many rows it has, at most 64.
        first_diagonal, diagonals: the diagonals to sum: key minus query row, from the first on.
        Everything else as for ``select_blocks_cuda``.

    Returns:
        columns float32 [B, H, Skv] and diagonals float32 [B, H, diagonals]: the sampled queries' softmax weights,
        summed. Queries that see nothing or whose scores are not finite add nothing. Deterministic.

    Raises:
        KernelInputError: shapes, dtypes, devices or sizes that the kernels do not take.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "left": left,
        "right": right,
        "offset": offset,
        "first_diagonal": first_diagonal,
        "diagonals": diagonals,
    }
    if q.dtype == torch.float32:  # half a window at a time, as more would not stay in registers
        half = WINDOW // 2
        starts = torch.cat([starts, starts + half], 1)
        counts = torch.cat([counts.clamp(max=half), (counts - half).clamp(min=0)], 1)

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, *outputs = estimate_launches(
            q, k, starts, counts, q_segments=q_segments, kv_segments=kv_segments, **options
        )
        return launches, tuple(outputs)

    inputs = (q, k, starts, counts, q_segments, kv_segments)
    columns, sums = run_prepared(q.device, ("estimate", *options.values()), inputs, build)
    return cast(Tensor, columns), cast(Tensor, sums)


def estimate_launches(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    first_diagonal: int,
    diagonals: int,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of ``estimate_cuda`` and the sums that they fill. In float32 a window has 32 queries at most."""
    host.check_shapes(q, k, None, offset, 128, 128)
    q_segments, kv_segments = check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("estimate_cuda", q)
    batch, heads, _, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    windows = starts.shape[1]
    block_d, dim_step = dim_steps(head_dim, 64)
    wide = q.dtype == torch.float32
    major = capability_of(q.device)[0]
    # Keys per step, first and second pass: as many as do not spill. Summing diagonals takes registers.
    look = 32 if wide else 64 if block_d > 128 or major != 9 else 128
    block_n = look if major == 9 else min(look, 64)
    look_tiles, key_tiles = ceil_div(kv_len, look), ceil_div(kv_len, block_n)
    rows = WINDOW // 2 if wide else WINDOW
    queries = windows * rows
    f32 = torch.float32
    tops = q.new_empty(batch, heads, queries, look_tiles, dtype=f32)
    sums = q.new_empty(batch, heads, queries, look_tiles, dtype=f32)
    lse = q.new_empty(batch, heads, queries, dtype=f32)
    columns = q.new_empty(batch, heads, kv_len, dtype=f32)
    parts = q.new_empty(batch, heads, windows, key_tiles, block_n + rows, dtype=f32)
    found = q.new_empty(batch, heads, diagonals, dtype=f32)
    arguments: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "starts_ptr": starts,
        "counts_ptr": counts,
        "q_segments_ptr": starts if q_segments is None else q_segments,
        "kv_segments_ptr": starts if kv_segments is None else kv_segments,
        "tops_ptr": tops,
        "sums_ptr": sums,
        "lse_ptr": lse,
        "columns_ptr": columns,
        "parts_ptr": parts,
        "log2_scale": scale * LOG2E,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_s", "k_stride_d"), k.stride(), strict=True)),
        "q_segments_stride_b": 0 if q_segments is None else q_segments.stride(0),
        "q_segments_stride_s": 1 if q_segments is None else q_segments.stride(1),
        "kv_segments_stride_b": 0 if kv_segments is None else kv_segments.stride(0),
        "kv_segments_stride_s": 1 if kv_segments is None else kv_segments.stride(1),
        "kv_len": kv_len,
        "left": host.side(left),
        "right": host.side(right),
        "offset": offset,
        "windows": windows,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "WINDOW": rows,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "DIM_STEP": 16 if wide else dim_step,
        "HAS_SEGMENTS": kv_segments is not None,
        "HAS_Q_SEGMENTS": q_segments is not None,
        "PRECISION": "tf32x3",
    }
    first = {**arguments, "SUM": False, "key_tiles": look_tiles, "BLOCK_N": look}
    second = {**arguments, "SUM": True, "key_tiles": key_tiles, "BLOCK_N": block_n}
    merge = {"tops_ptr": tops, "sums_ptr": sums, "lse_ptr": lse, "key_tiles": look_tiles, "CHUNK": 128}
    add: dict[str, Any] = {
        "parts_ptr": parts,
        "starts_ptr": starts,
        "diagonals_ptr": found,
        "diagonals": diagonals,
        "first_diagonal": first_diagonal,
        "windows": windows,
        "key_tiles": key_tiles,
        "heads": heads,
        "CHUNK": 1024,
        "BLOCK_N": block_n,
        "WINDOW": rows,
    }
    launches = [
        Launch(_estimate, (look_tiles, kv_heads, batch), first, {"num_warps": 8, "num_stages": 2}),
        Launch(_merge_tiles, (batch * heads * queries,), merge, {"num_warps": 1}),
        Launch(_estimate, (key_tiles, kv_heads, batch), second, {"num_warps": 8, "num_stages": 2}),
        Launch(_add_diagonals, (ceil_div(diagonals, 1024), heads, batch), add, {"num_warps": 4}),
    ]
    return launches, columns, found
