"""Pooled block top-k in Triton (The Sparse Frontier, arXiv 2504.17768): which key blocks each query block attends to.

Q and K are read once, to average their blocks. Then one program takes a few rows of one head, scores them against every
block average, finds each row's k-th best score exactly by bisection over the bits of its float32 scores, and writes the
lists: scores never leave registers. Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.arguments import check_counter, check_segments
from sparsepass.kernels.blocks import blocks_per_row, ceil_div, list_width, tile_side
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.scores import budgets_in_map, check_blocks, width_in_map
from sparsepass.kernels.select.triton.pool import UNROLL, allowed_launches, average_launch
from sparsepass.kernels.spec import CUDA, refuse_unsupported


@triton.jit(do_not_specialize=VARYING)
def _budgets_from_densities(
    density_ptr,
    budget_ptr,
    density_stride_b,
    density_stride_h,
    q_len,
    kv_len,
    left,
    right,
    offset,
    most,
    heads,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
):
    """``blocks.blocks_per_row`` on the device, at most ``most``. Grid: (heads, batch of the densities)."""
    head = tl.program_id(0)
    item = tl.program_id(1)
    first = tl.arange(0, ROWS) * Q_BLOCK
    low = tl.maximum(first + offset - left, 0)
    high = tl.minimum(tl.minimum(first + Q_BLOCK, q_len) - 1 + offset + right, kv_len - 1)
    visible = tl.where((first < q_len) & (low <= high), tl.maximum(high, 0) // KV_BLOCK - low // KV_BLOCK + 1, 0)
    density = tl.load(density_ptr + item.to(tl.int64) * density_stride_b + head * density_stride_h)
    share = tl.where(density < 1.0, density, 1.0).to(tl.float64)  # NaN gives 1: more, never less
    wanted = share * tl.sum(visible, 0).to(tl.float64)
    budget = 0
    for bit in tl.static_range(BITS - 1, -1, -1):
        smaller = budget + (1 << bit)
        too_few = tl.sum(tl.minimum(visible, smaller - 1), 0).to(tl.float64) < wanted
        budget = tl.where(too_few, smaller, budget)
    tl.store(budget_ptr + item * heads + head, tl.minimum(budget, most))


@triton.jit(do_not_specialize=VARYING)
def _select(
    q_means_ptr,
    k_means_ptr,
    allowed_ptr,
    budget_ptr,
    counts_ptr,
    lists_ptr,
    counter_ptr,
    q_unlike_ptr,
    k_unlike_ptr,
    k_means_stride,
    scale,
    budget,
    dense_from,
    budget_stride_b,
    allowed_stride_b,
    allowed_stride_h,
    q_len,
    kv_len,
    left,
    right,
    offset,
    rows,
    blocks,
    width,
    groups,
    heads,
    group,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
    HAS_UNLIKE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Lists of ROWS query blocks of one head, all key blocks at once (COLUMNS of them). Grid: (B * H * groups,).

    ``dense_from``: the first row that lists everything.
    """
    program = tl.program_id(0)
    head = program // groups % heads
    item = program // groups // heads
    row = (groups - 1 - program % groups) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    plane = (item * heads + head).to(tl.int64)
    kv_plane = (item * (heads // group) + head // group).to(tl.int64)

    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    low = tl.maximum(first - left, 0)
    high = tl.minimum(last + right, kv_len - 1)
    allowed = (row < rows) & (low <= high) & (column * KV_BLOCK <= high) & (column * KV_BLOCK + KV_BLOCK > low)
    if HAS_ALLOWED:
        bits = allowed_ptr + item.to(tl.int64) * allowed_stride_b + head.to(tl.int64) * allowed_stride_h
        bits = bits + row.to(tl.int64) * blocks + column
        allowed = allowed & (tl.load(bits, mask=allowed, other=0) != 0)

    # Outer products, dimension by dimension, in float32: exact up to rounding, and in the same order everywhere.
    score = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Groups of 16 columns are loaded whole, so that loads stay wide; what lies past the last block is never allowed.
    start = tl.minimum(tl.min(low), kv_len) // KV_BLOCK // 16 * 16
    stop = tl.maximum(tl.max(high), 0) // KV_BLOCK // 16 * 16 + 16
    used = (column >= start) & (column < stop)
    q_at = q_means_ptr + (plane * rows + row) * DIM
    k_at = k_means_ptr + kv_plane * DIM * k_means_stride + column
    for dim in range(0, DIM, UNROLL):
        for step in tl.static_range(UNROLL):
            q = tl.load(q_at + dim + step, mask=row < rows, other=0.0)
            k = tl.load(k_at + (dim + step) * k_means_stride, mask=used, other=0.0)
            score += q * k
    score = score * scale

    # Integers in the order of the floats. -0.0 becomes 0.0, NaN the least of all floats.
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score == score, score, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    sink = tl.min(tl.where(allowed, column, COLUMNS), 1)[:, None]
    diagonal = tl.where(last >= 0, tl.maximum(last, 0) // KV_BLOCK, -2)
    always = (column == sink) | (column == diagonal) | (column == diagonal - 1) | (row >= dense_from)
    forced = allowed & always
    if HAS_UNLIKE:
        of_row = tl.load(q_unlike_ptr + plane * rows + row, mask=row < rows, other=0)
        of_column = tl.load(k_unlike_ptr + kv_plane * blocks + column, mask=column < blocks, other=0)
        forced = forced | (allowed & ((of_row | of_column) != 0))
    rank = tl.where(forced, 0x7FFFFFFF, tl.where(allowed, rank, -0x80000000))

    visible = tl.sum(allowed.to(tl.int32), 1)
    if HAS_BUDGETS:
        budget = tl.load(budget_ptr + item * budget_stride_b + head)
    keep = tl.maximum(tl.minimum(visible, budget), tl.sum(forced.to(tl.int32), 1))

    # The greatest threshold with at least `keep` ranks at or over it, bit by bit from the sign: the k-th best rank.
    threshold = tl.full([ROWS], -0x80000000, tl.int32)
    for bit in range(32):
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - bit))
        reached = tl.sum((rank >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= keep, candidate, threshold)
    over = rank > threshold[:, None]
    tied = rank == threshold[:, None]
    room = keep - tl.sum(over.to(tl.int32), 1)
    chosen = over | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= room[:, None]))

    target = lists_ptr + (plane * rows + row) * width
    in_rows = row < rows
    tl.store(
        target + column,
        tl.zeros([ROWS, COLUMNS], tl.int32),
        mask=in_rows & (column >= keep[:, None]) & (column < width),
    )
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(target + place, tl.broadcast_to(column, [ROWS, COLUMNS]), mask=chosen & in_rows)
    flat = tl.arange(0, ROWS) + (groups - 1 - program % groups) * ROWS
    tl.store(counts_ptr + plane * rows + flat, keep, mask=flat < rows)
    if COUNT:
        tl.atomic_add(counter_ptr + 2, tl.sum(visible, 0).to(tl.int64), sem="relaxed")


def select_blocks_cuda(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_block: int,
    kv_block: int,
    density: float | Tensor,
    max_density: float | None = None,
    self_similarity: float | None = None,
    last: int = 0,
    blocks: Tensor | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Block lists by pooled top-k, one per (batch, query head, query block).

    Args:
        q, k: [B, H, Sq, D] and [B, Hkv, Skv, D], fp16, bf16 or fp32, any strides.
        scale: factor on the scores (its sign matters here).
        left, right, offset: band, in tokens; -1 lifts a side.
        q_segments, kv_segments: int32 [B, Sq] and [B, Skv], or None.
        q_block, kv_block: tokens per list block, powers of two from 16 up.
        density: share of the band-visible blocks to keep, or float32 [B or 1, H] on the device, one per head.
        max_density: with a tensor, the greatest density in it (it sizes the lists without reading the tensor); a
            greater one is cut to it. None: 1.0.
        self_similarity: query and key blocks whose tokens' mean cosine is under it are computed whole, whatever the
            density: their mean says nothing (SpargeAttn, arXiv 2502.18137). Lists then have room for every block.
        last: query blocks at the end that list every visible block (FlashPrefill), besides ``density``. Lists then
            have room for every block.
        blocks: a block map [B or 1, H or 1, nq, nkv]; what it has 0 for is not selected, and ``density`` is of each
            head's other blocks.
        counter: int64 [3] on the device; [2] += blocks with any visible pair, over all (batch, head, row).

    Returns:
        kv_num_blocks int32 [B, H, nq] and kv_indices int32 [B, H, nq, width], contiguous; unused entries are 0.
        Nothing synchronizes with the host.

    Raises:
        KernelInputError: shapes, dtypes, devices or sizes that the kernels do not take.
    """
    budgets = None
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    if blocks is not None:
        blocks = blocks.contiguous()
        most = max_density if max_density is not None else 1.0 if isinstance(density, Tensor) else density
        shares = torch.where(density < most, density, most) if isinstance(density, Tensor) else density
        budgets = budgets_in_map(blocks, shares).expand(-1, q.shape[1]).contiguous()
        density = max_density = most
    per_head = density if isinstance(density, Tensor) else None
    options: dict[str, Any] = {
        "scale": scale,
        "left": left,
        "right": right,
        "offset": offset,
        "q_block": q_block,
        "kv_block": kv_block,
        "max_density": max_density,
        "self_similarity": self_similarity,
        "last": last,
    }

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, *outputs = select_launches(
            q, k, q_segments=q_segments, kv_segments=kv_segments, density=density, counter=counter,
            blocks_map=blocks, budgets=budgets, **options,
        )  # fmt: skip
        return launches, tuple(outputs)

    numbers = ("select", *options.values(), density if per_head is None else None)
    inputs = (q, k, q_segments, kv_segments, per_head, counter, blocks, budgets)
    kv_num_blocks, kv_indices = run_prepared(q.device, numbers, inputs, build)
    return cast(Tensor, kv_num_blocks), cast(Tensor, kv_indices)


def select_launches(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    density: float | Tensor,
    max_density: float | None,
    self_similarity: float | None = None,
    last: int = 0,
    counter: Tensor | None,
    blocks_map: Tensor | None = None,
    budgets: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of ``select_blocks_cuda`` and the lists they fill.

    ``blocks_map``: contiguous int8 [B or 1, H or 1, nq, nkv], the blocks that may be listed, with ``budgets`` int32 [B
    or 1, H] that follow from it; ``density`` is then their cap.
    """
    host.check_shapes(q, k, None, offset, q_block, kv_block)
    check_counter(counter, q)
    q_segments, kv_segments = check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("select_blocks_cuda", q)
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows, blocks = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    host.require(
        blocks <= CUDA.max_kv_blocks,
        lambda: f"{kv_len} keys are {blocks} blocks of {kv_block}; at most {CUDA.max_kv_blocks}: use larger blocks.",
    )
    band = {"q_len": q_len, "kv_len": kv_len, "left": host.side(left), "right": host.side(right), "offset": offset}
    sizes = {"Q_BLOCK": q_block, "KV_BLOCK": kv_block}

    similar: dict[str, Any] = {"self_similarity": self_similarity}
    q_launch, q_means, q_unlike = average_launch(q, None if kv_segments is None else q_segments, q_block, **similar)
    k_launch, k_means, k_unlike = average_launch(k, kv_segments, kv_block, transposed=True, **similar)
    launches = [q_launch, k_launch]
    unused = q_means  # a pointer for what is not there; never read

    allowed = blocks_map
    if allowed is None and kv_segments is not None:
        more, allowed = allowed_launches(q_segments, kv_segments, band, q_block, kv_block)
        launches += more

    shape = (q_len, kv_len, left, right, offset, q_block, kv_block)
    if isinstance(density, Tensor):
        host.require(
            density.shape in ((batch, heads), (1, heads))
            and density.dtype == torch.float32
            and density.device == q.device,
            lambda: (
                f"density is {density.dtype} {tuple(density.shape)} on {density.device}; expected a float, or float32 "
                f"[{batch} or 1, {heads}] on {q.device}."
            ),
        )
        budget = blocks_per_row(*shape, 1.0 if max_density is None else max_density)
        budgets = q.new_empty(density.shape, dtype=torch.int32)
        arguments = {
            "density_ptr": density,
            "budget_ptr": budgets,
            "density_stride_b": density.stride(0),
            "density_stride_h": density.stride(1),
            **band,
            "most": budget,
            "heads": heads,
            **sizes,
            "ROWS": tile_side(rows),
            "BITS": max(1, blocks.bit_length()),
        }
        launches.append(Launch(_budgets_from_densities, (heads, density.shape[0]), arguments, {"num_warps": 4}))
    else:
        budget = blocks_per_row(*shape, density)

    width = list_width(kv_len, kv_block, budget)
    if self_similarity is not None or last:
        width = blocks
    elif blocks_map is not None:
        assert not isinstance(density, Tensor)  # it is the budgets' cap
        width = width_in_map(blocks, density)
    kv_num_blocks = q.new_empty(batch, heads, rows, dtype=torch.int32)
    kv_indices = q.new_empty(batch, heads, rows, width, dtype=torch.int32)
    columns = tile_side(blocks)
    rows_each = max(1, min(8, 4096 // columns))
    groups = ceil_div(rows, rows_each)
    arguments = {
        "q_means_ptr": q_means,
        "k_means_ptr": k_means,
        **host.allowed_arguments(allowed, unused),
        "budget_ptr": unused if budgets is None else budgets,
        "counts_ptr": kv_num_blocks,
        "lists_ptr": kv_indices,
        "counter_ptr": unused if counter is None else counter,
        "q_unlike_ptr": unused if q_unlike is None else q_unlike,
        "k_unlike_ptr": unused if k_unlike is None else k_unlike,
        "k_means_stride": k_means.stride(2),
        "scale": scale,
        "budget": budget,
        "dense_from": rows - last,
        "budget_stride_b": 0 if budgets is None or budgets.shape[0] == 1 else heads,
        **band,
        "rows": rows,
        "blocks": blocks,
        "width": width,
        "groups": groups,
        "heads": heads,
        "group": heads // kv_heads,
        **sizes,
        "ROWS": rows_each,
        "COLUMNS": columns,
        "DIM": q_means.shape[3],
        "UNROLL": UNROLL,
        "HAS_BUDGETS": budgets is not None,
        "HAS_UNLIKE": q_unlike is not None,
        "COUNT": counter is not None,
    }
    warps = {8192: 8}.get(columns, 4)
    launches.append(Launch(_select, (batch * heads * groups,), arguments, {"num_warps": warps}))
    return launches, kv_num_blocks, kv_indices
