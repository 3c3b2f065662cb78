"""Lists from block scores, in Triton: no sort, no host.

The rules are ``kernels/select/rule.py``; conventions of shapes, bands, segments and lists:
``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.blocks import ceil_div, tile_side
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.select.rule import Rule

LEVEL_ROWS, LEVEL_COLUMNS = 1, 256
"""Rows of a program and key blocks at a time, where neither sums nor ties need the whole row."""


@triton.jit
def _band_of_rows(row, rows, q_len, kv_len, left, right, offset, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr):
    """Position of a row's first and last query, and the first and last key block of its band; none: -1 as the last."""
    first = row * Q_BLOCK + offset
    last = tl.minimum((row + 1) * Q_BLOCK, q_len) - 1 + offset
    low = tl.maximum(first - left, 0)
    high = tl.minimum(last + right, kv_len - 1)
    return first, last, low // KV_BLOCK, tl.where((row < rows) & (low <= high), high // KV_BLOCK, -1)


@triton.jit
def _dial_of_head(dial_ptr, item, head, budget_stride_b, dial_stride_h, cap, LARGEST: tl.constexpr):
    """A head's own dial in ``cap``'s shape, but never one that computes more than ``cap`` does, and that for NaN."""
    given = tl.load(dial_ptr + item * budget_stride_b + head * dial_stride_h)
    return tl.where((given > cap) if LARGEST else (given < cap), given, cap)


@triton.jit
def _scores_in_band(scores_at, allowed_at, column, low, high, HAS_ALLOWED: tl.constexpr):
    """Scores of a row's allowed blocks, -inf for others and for NaN, and which blocks are allowed."""
    allowed = (column >= low) & (column <= high)
    if HAS_ALLOWED:
        allowed = allowed & (tl.load(allowed_at + column, mask=allowed, other=0) != 0)
    score = allowed
    if scores_at is not None:
        score = tl.load(scores_at + column, mask=allowed, other=float("-inf"))
        score = tl.where(score == score, score, float("-inf"))
    return score, allowed


@triton.jit(do_not_specialize=(*VARYING, "sink", "near", "dial_stride_h"))
def _lists_by_level(
    scores_ptr,
    allowed_ptr,
    dial_ptr,
    q_unlike_ptr,
    k_unlike_ptr,
    counts_ptr,
    lists_ptr,
    counter_ptr,
    cap,
    budget_stride_b,
    dial_stride_h,
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
    times,
    sink,
    near,
    dense_from,
    KEEP: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_DIALS: tl.constexpr,
    HAS_UNLIKE: tl.constexpr,
    HAS_Q_UNLIKE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Lists by position or by a share of the row's best block. Arguments and grid: as ``_lists_by_coverage``.

    COLUMNS key blocks at a time, and of those only what the rows' bands hold: once for the best score, once to list.
    """
    program = tl.program_id(0)
    head = program // groups % heads
    item = program // groups // heads
    flat = (groups - 1 - program % groups) * ROWS + tl.arange(0, ROWS)
    row = flat[:, None]
    plane = (item * heads + head).to(tl.int64)
    first, last, low, high = _band_of_rows(flat, rows, q_len, kv_len, left, right, offset, Q_BLOCK, KV_BLOCK)
    lane = tl.arange(0, COLUMNS)[None, :]
    begin = tl.min(low, 0) // COLUMNS
    end = (tl.max(high, 0) + COLUMNS) // COLUMNS
    first, last, low, high = first[:, None], last[:, None], low[:, None], high[:, None]
    dial = tl.zeros([ROWS, 1], tl.float32) + cap
    if HAS_DIALS:
        dial = _dial_of_head(dial_ptr, item, head, budget_stride_b, dial_stride_h, dial, KEEP == "threshold")
    scores_at = None
    if KEEP == "threshold":
        scores_at = scores_ptr + (plane * rows + row) * blocks
    bits = allowed_ptr + item.to(tl.int64) * allowed_stride_b + head.to(tl.int64) * allowed_stride_h
    bits = bits + row.to(tl.int64) * blocks

    least = tl.zeros([ROWS, 1], tl.float32)
    if KEEP == "threshold":
        top = tl.full([ROWS, 1], float("-inf"), tl.float32)
        for chunk in range(begin, end):
            score, _ = _scores_in_band(scores_at, bits, chunk * COLUMNS + lane, low, high, HAS_ALLOWED)
            top = tl.maximum(top, tl.max(score, 1)[:, None])
        # A row without any score keeps all: nothing says what to leave out.
        everything = (dial <= 0.0) | (top == float("-inf"))
        least = tl.where(everything, float("-inf"), top + tl.log(tl.where(dial <= 0.0, 1.0, dial)))

    keep = tl.zeros([ROWS], tl.int32)
    seen = tl.zeros([ROWS], tl.int32)
    target = lists_ptr + (plane * rows + row) * width
    for chunk in range(begin, end):
        column = chunk * COLUMNS + lane
        score, allowed = _scores_in_band(scores_at, bits, column, low, high, HAS_ALLOWED)
        chosen = allowed & (column < low + sink)
        if HAS_ALLOWED:
            chosen = allowed & (seen[:, None] + tl.cumsum(allowed.to(tl.int32), 1) <= sink)
        if KEEP == "window":
            tokens = tl.maximum(dial, 1.0).to(tl.int32)
            behind = column * KV_BLOCK + KV_BLOCK > first - tokens + 1
            chosen = chosen | (allowed & behind & (column * KV_BLOCK <= last + tokens - 1))
        else:
            diagonal = tl.where(last >= 0, tl.maximum(last, 0) // KV_BLOCK, -1)
            chosen = chosen | (allowed & (column <= diagonal) & (column > diagonal - near))
            chosen = chosen | (allowed & (score >= least))
        chosen = chosen | (allowed & (row >= dense_from))
        if HAS_UNLIKE:
            kv_plane = (item * (heads // group) + head // group).to(tl.int64)
            unlike = tl.load(k_unlike_ptr + kv_plane * blocks + column, mask=column < blocks, other=0)
            if HAS_Q_UNLIKE:
                unlike = unlike | tl.load(q_unlike_ptr + plane * rows + row, mask=row < rows, other=0)
            chosen = chosen | (allowed & (unlike != 0))
        place = keep[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        tl.store(target + place, tl.broadcast_to(column, [ROWS, COLUMNS]), mask=chosen & (place < width))
        keep += tl.sum(chosen.to(tl.int32), 1)
        seen += tl.sum(allowed.to(tl.int32), 1)

    for chunk in range(tl.min(keep, 0) // COLUMNS, tl.cdiv(width, COLUMNS)):
        column = chunk * COLUMNS + lane
        rest = (row < rows) & (column >= keep[:, None]) & (column < width)
        tl.store(target + column, tl.zeros([ROWS, COLUMNS], tl.int32), mask=rest)
    tl.store(counts_ptr + plane * rows + flat, tl.minimum(keep, width), mask=flat < rows)
    if COUNT:
        tl.atomic_add(counter_ptr + 2, tl.sum(seen, 0).to(tl.int64) * times, sem="relaxed")


@triton.jit(do_not_specialize=(*VARYING, "sink", "near", "dial_stride_h"))
def _lists_by_coverage(
    scores_ptr,
    allowed_ptr,
    dial_ptr,
    q_unlike_ptr,
    k_unlike_ptr,
    counts_ptr,
    lists_ptr,
    counter_ptr,
    cap,
    budget_stride_b,
    dial_stride_h,
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
    times,
    sink,
    near,
    dense_from,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_DIALS: tl.constexpr,
    HAS_UNLIKE: tl.constexpr,
    HAS_Q_UNLIKE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Lists by the mass covered, of ROWS query blocks of one head. Grid: (batch * heads * groups,) of the lists.

    ``near``: blocks always listed up to the diagonal one. ``dense_from``: the first row that lists everything.
    ``times``: pairs of batch item and head that share a row of the lists, for the counter.
    """
    program = tl.program_id(0)
    head = program // groups % heads
    item = program // groups // heads
    row = (groups - 1 - program % groups) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    plane = (item * heads + head).to(tl.int64)
    in_rows = row < rows

    _, last, low, high = _band_of_rows(row, rows, q_len, kv_len, left, right, offset, Q_BLOCK, KV_BLOCK)
    allowed = (column >= low) & (column <= high)
    if HAS_ALLOWED:
        bits = allowed_ptr + item.to(tl.int64) * allowed_stride_b + head.to(tl.int64) * allowed_stride_h
        bits = bits + row.to(tl.int64) * blocks + column
        allowed = allowed & (tl.load(bits, mask=allowed, other=0) != 0)
    visible = tl.sum(allowed.to(tl.int32), 1)

    dial = tl.zeros([ROWS, 1], tl.float32) + cap
    if HAS_DIALS:
        dial = _dial_of_head(dial_ptr, item, head, budget_stride_b, dial_stride_h, dial, False)

    chosen = allowed & (column < low + sink)
    if HAS_ALLOWED:
        chosen = allowed & (tl.cumsum(allowed.to(tl.int32), 1) <= sink)
    diagonal = tl.where(last >= 0, tl.maximum(last, 0) // KV_BLOCK, -1)
    chosen = chosen | (allowed & (column <= diagonal) & (column > diagonal - near))
    chosen = chosen | (allowed & (row >= dense_from))
    if HAS_UNLIKE:
        kv_plane = (item * (heads // group) + head // group).to(tl.int64)
        unlike = tl.load(k_unlike_ptr + kv_plane * blocks + column, mask=column < blocks, other=0)
        if HAS_Q_UNLIKE:
            unlike = unlike | tl.load(q_unlike_ptr + plane * rows + row, mask=in_rows, other=0)
        chosen = chosen | (allowed & (unlike != 0))

    score = tl.load(scores_ptr + (plane * rows + row) * blocks + column, mask=allowed, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    top = tl.max(score, 1)[:, None]
    finite = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.where(score == top, 1.0, tl.exp(score - finite))
    mass = tl.where(allowed & (top > float("-inf")), mass, 0.0)
    free = allowed & (chosen == 0)
    needed = dial * tl.sum(mass, 1)[:, None] - tl.sum(tl.where(chosen, mass, 0.0), 1)[:, None]
    # Integers in the order of the floats; the k-th best by bisection over their bits, as in ``_select``.
    score = tl.where(score == 0.0, 0.0, score)
    bits32 = score.to(tl.int32, bitcast=True)
    rank = tl.where(free, tl.where(bits32 >= 0, bits32, bits32 ^ 0x7FFFFFFF), -0x80000000)
    mass = tl.where(free, mass, 0.0)
    threshold = tl.full([ROWS, 1], -0x80000000, tl.int32)
    for bit in range(32):
        candidate = threshold ^ (tl.full([], 1, tl.int32) << (31 - bit))
        reached = tl.sum(tl.where(rank >= candidate, mass, 0.0), 1)[:, None]
        threshold = tl.where(reached >= needed, candidate, threshold)
    over = free & (rank > threshold)
    tied = free & (rank == threshold)
    held = tl.sum(tl.where(over, mass, 0.0), 1)[:, None]
    before = (tl.cumsum(tied.to(tl.int32), 1) - 1).to(tl.float32)
    taken = over | (tied & (held + before * mass < needed))
    chosen = chosen | (taken & (needed > 0.0))
    chosen = chosen | (allowed & ((dial >= 1.0) | (top == float("-inf"))))

    keep = tl.sum(chosen.to(tl.int32), 1)
    target = lists_ptr + (plane * rows + row) * width
    rest = in_rows & (column >= keep[:, None]) & (column < width)
    tl.store(target + column, tl.zeros([ROWS, COLUMNS], tl.int32), mask=rest)
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(target + place, tl.broadcast_to(column, [ROWS, COLUMNS]), mask=chosen & (place < width))
    flat = tl.arange(0, ROWS) + (groups - 1 - program % groups) * ROWS
    tl.store(counts_ptr + plane * rows + flat, tl.minimum(keep, width), mask=flat < rows)
    if COUNT:
        tl.atomic_add(counter_ptr + 2, tl.sum(visible, 0).to(tl.int64) * times, sem="relaxed")


def rule_launch(
    rule: Rule,
    band: dict[str, int],
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    q_block: int,
    kv_block: int,
    scores: Tensor | None,
    allowed: Tensor | None,
    dial: Tensor | None,
    q_unlike: Tensor | None,
    k_unlike: Tensor | None,
    counter: Tensor | None,
    like: Tensor,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that turns scores float32 [B, H, nq, nkv] into lists, and the lists: counts, indices.

    By position alone (``scores`` None) rows that agree are made once: the lists then have a batch or heads of 1.
    """
    rows, blocks = ceil_div(band["q_len"], q_block), ceil_div(band["kv_len"], kv_block)
    list_batch, list_heads = batch, heads
    if scores is None:
        shared = [x.shape for x in (allowed, dial) if x is not None]
        list_batch, list_heads = (max([1, *(shape[dim] for shape in shared)]) for dim in (0, 1))
    width = rule.width(q_block, kv_block, blocks)
    counts = like.new_empty(list_batch, list_heads, rows, dtype=torch.int32)
    lists = like.new_empty(list_batch, list_heads, rows, width, dtype=torch.int32)
    by_coverage = rule.keep == "coverage"
    columns = tile_side(blocks if by_coverage else min(blocks, LEVEL_COLUMNS))
    rows_each = max(1, min(8, 4096 // columns)) if by_coverage else LEVEL_ROWS
    groups = ceil_div(rows, rows_each)
    arguments: dict[str, Any] = {
        "scores_ptr": counts if scores is None else scores,
        **host.allowed_arguments(allowed, counts),
        "dial_ptr": counts if dial is None else dial,
        "q_unlike_ptr": counts if q_unlike is None else q_unlike,
        "k_unlike_ptr": counts if k_unlike is None else k_unlike,
        "counts_ptr": counts,
        "lists_ptr": lists,
        "counter_ptr": counts if counter is None else counter,
        "cap": float(rule.dial),
        "budget_stride_b": 0 if dial is None or dial.shape[0] == 1 else dial.stride(0),
        "dial_stride_h": 0 if dial is None or dial.shape[1] == 1 else dial.stride(1),
        **band,
        "rows": rows,
        "blocks": blocks,
        "width": width,
        "groups": groups,
        "heads": list_heads,
        "group": heads // kv_heads,
        "times": (batch // list_batch) * (heads // list_heads),
        "sink": rule.sink_blocks(kv_block),
        "near": rule.window,
        "dense_from": rows - rule.last,
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "ROWS": rows_each,
        "COLUMNS": columns,
        "HAS_DIALS": dial is not None,
        "HAS_UNLIKE": k_unlike is not None,
        "HAS_Q_UNLIKE": q_unlike is not None,
        "COUNT": counter is not None,
    }
    grid = (list_batch * list_heads * groups,)
    if by_coverage:
        launch = Launch(_lists_by_coverage, grid, arguments, {"num_warps": {8192: 8}.get(columns, 4)})
    else:  # one warp: its scans need no barrier
        launch = Launch(_lists_by_level, grid, arguments | {"KEEP": rule.keep}, {"num_warps": 1})
    return launch, counts, lists
