"""Triton: the best of many values, and block lists from diagonals.

``keep_best`` finds the best ``most`` values of a row, or the fewest whose sum reaches a share of the row's, without
sorting: by bisection over the bits of the float32 values, two bits per pass over the row. One program takes one row of
any length, so it is deterministic. Ties go to the lower index, NaN is the least of all values.
Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.blocks import ceil_div, tile_side
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.select.triton.pool import allowed_launches
from sparsepass.kernels.slash.best import Best

CHANGING = (*VARYING, "size", "forced", "least_count", "diagonals", "first_diagonal", "shifts", "first_shift", "near")


@triton.jit
def _ranks(values, there, index, first, forced, floor):
    """Integers in the order of the values, and the positive finite part of them. Excluded: -2^31; forced: 2^31 - 1."""
    mass = tl.where(there & (values > 0.0) & (values < float("inf")), values, 0.0)
    ordered = tl.where(values == 0.0, 0.0, values)
    ordered = tl.where(ordered == ordered, ordered, float("-inf"))
    bits = ordered.to(tl.int32, bitcast=True)
    rank = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    there = there & (rank >= floor)
    rank = tl.where((index >= first) & (index < first + forced), 0x7FFFFFFF, rank)
    return tl.where(there, rank, -0x80000000), tl.where(there, mass, 0.0)


@triton.jit(do_not_specialize=CHANGING)
def _keep_best(
    values_ptr,
    most_ptr,
    share_ptr,
    least_ptr,
    first_ptr,
    floor_ptr,
    flags_ptr,
    num_ptr,
    list_ptr,
    rank_ptr,
    size,
    width,
    most,
    forced,
    heads,
    CHUNK: tl.constexpr,
    HAS_MOST: tl.constexpr,
    BY_MASS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    LIST: tl.constexpr,
):
    """Flags int8 of the kept of ``size`` values, and with LIST their ascending indices. Grid: (B * H,)."""
    program = tl.program_id(0)
    plane = program.to(tl.int64)
    values = values_ptr + plane * size
    lane = tl.arange(0, CHUNK)
    if HAS_MOST:
        most = tl.load(most_ptr + program)
    first = 0
    if HAS_FIRST:
        first = tl.load(first_ptr + program // heads)
    floor = -0x7FFFFFFF
    if HAS_FLOOR:
        floor = tl.load(floor_ptr + program)
    goal = 0.0
    least = 0
    if BY_MASS:
        sums = tl.zeros([CHUNK], tl.float32)
        for begin in range(0, size, CHUNK):
            index = begin + lane
            value = tl.load(values + index, mask=index < size, other=0.0)
            _, mass = _ranks(value, index < size, index, first, forced, floor)
            sums += mass
        goal = tl.sum(sums, 0) * tl.load(share_ptr + program)
        least = tl.load(least_ptr + program)

    # ``threshold`` grows from the top bit down in the order of unsigned integers; the ranks are signed.
    threshold = tl.full([], 0, tl.int32)
    LOWEST: tl.constexpr = -0x80000000
    for step in range(16):
        shift = 30 - 2 * step
        one = (threshold | (tl.full([], 1, tl.int32) << shift)) ^ LOWEST
        two = (threshold | (tl.full([], 2, tl.int32) << shift)) ^ LOWEST
        three = (threshold | (tl.full([], 3, tl.int32) << shift)) ^ LOWEST
        count1 = tl.zeros([CHUNK], tl.int32)
        count2 = tl.zeros([CHUNK], tl.int32)
        count3 = tl.zeros([CHUNK], tl.int32)
        mass1 = tl.zeros([CHUNK], tl.float32)
        mass2 = tl.zeros([CHUNK], tl.float32)
        mass3 = tl.zeros([CHUNK], tl.float32)
        for begin in range(0, size, CHUNK):
            index = begin + lane
            value = tl.load(values + index, mask=index < size, other=0.0)
            rank, mass = _ranks(value, index < size, index, first, forced, floor)
            count1 += (rank >= one).to(tl.int32)
            count2 += (rank >= two).to(tl.int32)
            count3 += (rank >= three).to(tl.int32)
            if BY_MASS:
                mass1 += tl.where(rank >= one, mass, 0.0)
                mass2 += tl.where(rank >= two, mass, 0.0)
                mass3 += tl.where(rank >= three, mass, 0.0)
        n1 = tl.sum(count1, 0)
        n2 = tl.sum(count2, 0)
        n3 = tl.sum(count3, 0)
        enough1 = n1 >= most
        enough2 = n2 >= most
        enough3 = n3 >= most
        if BY_MASS:
            enough1 = enough1 | ((tl.sum(mass1, 0) >= goal) & (n1 >= least))
            enough2 = enough2 | ((tl.sum(mass2, 0) >= goal) & (n2 >= least))
            enough3 = enough3 | ((tl.sum(mass3, 0) >= goal) & (n3 >= least))
        digit = tl.where(enough3, 3, tl.where(enough2, 2, tl.where(enough1, 1, 0)))
        threshold = threshold | (digit << shift)
    threshold = threshold ^ LOWEST

    over = tl.zeros([CHUNK], tl.int32)
    held = tl.zeros([CHUNK], tl.float32)
    tied = tl.zeros([CHUNK], tl.float32)
    for begin in range(0, size, CHUNK):
        index = begin + lane
        value = tl.load(values + index, mask=index < size, other=0.0)
        rank, mass = _ranks(value, index < size, index, first, forced, floor)
        over += (rank > threshold).to(tl.int32)
        held += tl.where(rank > threshold, mass, 0.0)
        tied = tl.maximum(tied, tl.where(rank == threshold, mass, 0.0))
    kept_over = tl.sum(over, 0)
    room = most - kept_over
    if BY_MASS:
        each = tl.max(tied, 0)
        missing = goal - tl.sum(held, 0)
        wanted = tl.where(each > 0.0, tl.ceil(missing / tl.where(each > 0.0, each, 1.0)), 2147483008.0)
        wanted = tl.where(missing > 0.0, wanted, 0.0)
        wanted = tl.where(threshold == 0x7FFFFFFF, 2147483008.0, wanted)  # the forced ones, all of them
        wanted = tl.minimum(tl.maximum(wanted, 0.0), 2147483008.0).to(tl.int32)
        room = tl.minimum(room, tl.maximum(wanted, least - kept_over))
    if LIST:
        room = tl.minimum(room, width - kept_over)
    tl.store(rank_ptr + program, threshold)

    done = 0
    ties = 0
    for begin in range(0, size, CHUNK):
        index = begin + lane
        value = tl.load(values + index, mask=index < size, other=0.0)
        rank, _ = _ranks(value, index < size, index, first, forced, floor)
        equal = (rank == threshold) & (rank != LOWEST)
        order = ties + tl.cumsum(equal.to(tl.int32), 0)
        chosen = ((rank > threshold) & (most > 0)) | (equal & (order <= room))
        ties += tl.sum(equal.to(tl.int32), 0)
        tl.store(flags_ptr + plane * size + index, chosen.to(tl.int8), mask=index < size)
        if LIST:
            place = done + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(list_ptr + plane * width + place, index, mask=chosen & (place < width))
        done += tl.sum(chosen.to(tl.int32), 0)
    tl.store(num_ptr + program, tl.minimum(done, width))


@triton.jit(do_not_specialize=CHANGING)
def _touched(
    diagonals_ptr,
    best_ptr,
    diagonals,
    first_diagonal,
    shifts,
    first_shift,
    offset,
    near,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The greatest of the token diagonals that touch a diagonal of blocks: [B * H, shifts]. Grid: (shifts, B * H).

    The block diagonal ``a`` (key block minus query block) is touched by the token diagonals from a*B - B + 1 to
    a*B + B - 1. It is infinite where the last ``near`` offsets touch it: those are always kept.
    """
    index = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    low = (first_shift + index) * BLOCK - BLOCK + 1
    diagonal = low + tl.arange(0, SPAN)
    there = (diagonal < low + 2 * BLOCK - 1) & (diagonal >= first_diagonal) & (diagonal < first_diagonal + diagonals)
    value = tl.load(diagonals_ptr + plane * diagonals + diagonal - first_diagonal, mask=there, other=0.0)
    value = tl.where(value == value, value, 0.0)
    value = tl.where(there & (diagonal <= offset) & (diagonal > offset - near), float("inf"), value)
    tl.store(best_ptr + plane * shifts + index, tl.max(value, 0))


@triton.jit(do_not_specialize=CHANGING)
def _lists_from_diagonals(
    flags_ptr,
    extra_ptr,
    allowed_ptr,
    counts_ptr,
    lists_ptr,
    counter_ptr,
    shifts,
    first_shift,
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
    heads,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    COUNT: tl.constexpr,
):
    """One row's list: allowed blocks on kept diagonals or in the extra map, and the always-kept ones.

    Grid: (rows, heads, batch). Always kept, where allowed: the row's first allowed block, the block at the position of
    its last query, and the one before.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    item = tl.program_id(2)
    plane = (item * heads + head).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    first = row * BLOCK + offset
    last = tl.minimum((row + 1) * BLOCK, q_len) - 1 + offset
    low = tl.maximum(first - left, 0)
    high = tl.minimum(last + right, kv_len - 1)
    diagonal = tl.where(last >= 0, tl.maximum(last, 0) // BLOCK, -2)
    target = lists_ptr + (plane * rows + row) * width
    visible = 0
    done = 0
    for begin in range(0, blocks, CHUNK):
        block = begin + lane
        allowed = (block < blocks) & (low <= high) & (block * BLOCK <= high) & (block * BLOCK + BLOCK > low)
        if HAS_ALLOWED:
            bits = allowed_ptr + item.to(tl.int64) * allowed_stride_b + head.to(tl.int64) * allowed_stride_h
            bits = bits + row.to(tl.int64) * blocks + block
            allowed = allowed & (tl.load(bits, mask=allowed, other=0) != 0)
        seen = visible + tl.cumsum(allowed.to(tl.int32), 0)
        shift = block - row - first_shift
        named = allowed & (shift >= 0) & (shift < shifts)
        chosen = tl.load(flags_ptr + plane * shifts + shift, mask=named, other=0) != 0
        if HAS_EXTRA:
            more = extra_ptr + (plane * rows + row) * blocks + block
            chosen = chosen | (tl.load(more, mask=allowed, other=0) != 0)
        chosen = chosen | (seen == 1) | (block == diagonal) | (block == diagonal - 1)
        chosen = chosen & allowed
        place = done + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(target + place, block, mask=chosen & (place < width))
        visible += tl.sum(allowed.to(tl.int32), 0)
        done += tl.sum(chosen.to(tl.int32), 0)
    done = tl.minimum(done, width)
    for begin in range(0, width, CHUNK):
        rest = begin + lane
        tl.store(target + rest, tl.zeros([CHUNK], tl.int32), mask=(rest >= done) & (rest < width))
    tl.store(counts_ptr + plane * rows + row, done)
    if COUNT:
        tl.atomic_add(counter_ptr + 2, tl.cast(visible, tl.int64), sem="relaxed")


def keep_best_cuda(
    values: Tensor,
    *,
    most: int | Tensor,
    width: int,
    share: Tensor | None = None,
    least: Tensor | None = None,
    first: Tensor | None = None,
    forced: int = 0,
    floor: Tensor | None = None,
) -> Best:
    """The best of ``values``, contiguous float32 [B, H, N], per row of N.

    Args:
        most: how many to keep, or int32 [B, H]. 0 keeps none.
        width: room for indices; more are not kept. 0: flags alone.
        share: float32 [B, H]: keep the fewest best ones whose sum reaches this share of the row's, up to ``most``.
        least: int32 [B, H], with ``share``: but at least so many.
        first, forced: int32 [B]: the values ``first .. first + forced`` are better than all others.
        floor: int32 [B, H]: values of a lower rank are never kept.
    """
    numbers = ("keep_best", most if isinstance(most, int) else None, width, forced)
    inputs = (values, most if isinstance(most, Tensor) else None, share, least, first, floor)

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, best = keep_best_launches(
            values, most=most, width=width, share=share, least=least, first=first, forced=forced, floor=floor
        )
        return launches, tuple(best)

    return Best(*(cast(Tensor, x) for x in run_prepared(values.device, numbers, inputs, build)))


def keep_best_launches(
    values: Tensor,
    *,
    most: int | Tensor,
    width: int,
    share: Tensor | None,
    least: Tensor | None,
    first: Tensor | None,
    forced: int,
    floor: Tensor | None,
) -> tuple[list[Launch], Best]:
    """The launch of ``keep_best_cuda`` and what it fills."""
    batch, heads, size = values.shape
    found = Best(
        values.new_empty(values.shape, dtype=torch.int8),
        values.new_empty(batch, heads, dtype=torch.int32),
        values.new_empty(batch, heads, max(1, width), dtype=torch.int32),
        values.new_empty(batch, heads, dtype=torch.int32),
    )
    arguments: dict[str, Any] = {
        "values_ptr": values,
        "most_ptr": most if isinstance(most, Tensor) else found.num,
        "share_ptr": values if share is None else share,
        "least_ptr": found.num if least is None else least,
        "first_ptr": found.num if first is None else first,
        "floor_ptr": found.num if floor is None else floor,
        "flags_ptr": found.flags,
        "num_ptr": found.num,
        "list_ptr": found.indices,
        "rank_ptr": found.rank,
        "size": size,
        "width": width if width else size,
        "most": 0 if isinstance(most, Tensor) else most,
        "forced": forced,
        "heads": heads,
        "CHUNK": min(4096 if share is None else 2048, tile_side(size)),
        "HAS_MOST": isinstance(most, Tensor),
        "BY_MASS": share is not None,
        "HAS_FIRST": first is not None,
        "HAS_FLOOR": floor is not None,
        "LIST": width > 0,
    }
    warps = 16 if size > 1024 else 4
    return [Launch(_keep_best, (batch * heads,), arguments, {"num_warps": warps})], found


def touched_cuda(
    diagonals: Tensor, *, first_diagonal: int, shifts: int, first_shift: int, offset: int, near: int, block: int
) -> Tensor:
    """The greatest token diagonal touching each diagonal of blocks: float32 [B, H, shifts] from [B, H, N].

    ``first_diagonal`` and ``first_shift``: what the first entries stand for (key minus query row, key block minus
    query block). ``near``: offsets, from ``offset`` down, whose block diagonals are infinite: always kept.
    """
    options = {"first_diagonal": first_diagonal, "shifts": shifts, "first_shift": first_shift, "offset": offset}

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        batch, heads, count = diagonals.shape
        best = diagonals.new_empty(batch, heads, shifts)
        arguments: dict[str, Any] = {
            "diagonals_ptr": diagonals,
            "best_ptr": best,
            "diagonals": count,
            **options,
            "near": near,
            "BLOCK": block,
            "SPAN": 2 * block,
        }
        return [Launch(_touched, (shifts, batch * heads), arguments, {"num_warps": 1})], (best,)

    numbers = ("touched", *options.values(), near, block)
    return cast(Tensor, run_prepared(diagonals.device, numbers, (diagonals,), build)[0])


def diagonal_lists_cuda(
    flags: Tensor,
    extra: Tensor | None,
    *,
    first_shift: int,
    q_len: int,
    kv_len: int,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    block: int,
    width: int,
    blocks: Tensor | None = None,
    counter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Block lists from kept diagonals of blocks: kv_num_blocks int32 [B, H, nq], kv_indices int32 [B, H, nq, width].

    ``flags`` int8 [B, H, shifts], the first standing for key block minus query block ``first_shift``; ``extra`` int8
    [B, H, nq, nkv] or None: blocks besides. ``blocks``: a checked map [B or 1, H or 1, nq, nkv] of what may be listed.
    ``counter``: int64 [3]; [2] += visible blocks.
    """
    if blocks is not None:
        blocks = blocks.view(torch.int8).contiguous()
    numbers = ("diagonal_lists", first_shift, q_len, kv_len, left, right, offset, block, width)
    inputs = (flags, extra, q_segments, kv_segments, counter, blocks)

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        shape = (q_len, kv_len, left, right, offset)
        launches, counts, lists = diagonal_list_launches(
            flags, extra, first_shift, shape, q_segments, kv_segments, block, width, counter, blocks
        )
        return launches, (counts, lists)

    counts, lists = run_prepared(flags.device, numbers, inputs, build)
    return cast(Tensor, counts), cast(Tensor, lists)


def diagonal_list_launches(
    flags: Tensor,
    extra: Tensor | None,
    first_shift: int,
    shape: tuple[int, int, int, int, int],
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    block: int,
    width: int,
    counter: Tensor | None,
    blocks_map: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of ``diagonal_lists_cuda`` and the lists; ``shape``: q_len, kv_len, left, right, offset."""
    q_len, kv_len, left, right, offset = shape
    batch, heads, shifts = flags.shape
    rows, blocks = ceil_div(q_len, block), ceil_div(kv_len, block)
    band = {"q_len": q_len, "kv_len": kv_len, "left": host.side(left), "right": host.side(right), "offset": offset}
    launches: list[Launch] = []
    allowed = blocks_map
    if allowed is None and kv_segments is not None:
        launches, allowed = allowed_launches(q_segments, kv_segments, band, block, block)
    counts = flags.new_empty(batch, heads, rows, dtype=torch.int32)
    lists = flags.new_empty(batch, heads, rows, width, dtype=torch.int32)
    arguments: dict[str, Any] = {
        "flags_ptr": flags,
        "extra_ptr": flags if extra is None else extra,
        **host.allowed_arguments(allowed, flags),
        "counts_ptr": counts,
        "lists_ptr": lists,
        "counter_ptr": counts if counter is None else counter,
        "shifts": shifts,
        "first_shift": first_shift,
        **band,
        "rows": rows,
        "blocks": blocks,
        "width": width,
        "heads": heads,
        "BLOCK": block,
        "CHUNK": min(1024, tile_side(blocks)),
        "HAS_EXTRA": extra is not None,
        "COUNT": counter is not None,
    }
    launches.append(Launch(_lists_from_diagonals, (rows, heads, batch), arguments, {"num_warps": 4}))
    return launches, counts, lists


def allowed_cuda(
    q_segments: Tensor | None, kv_segments: Tensor | None, shape: tuple[int, int, int, int, int], block: int
) -> Tensor:
    """int8 [B, 1, nq, nkv] under segments: 1 where a pair is visible. ``shape``: q_len, kv_len, left, right, offset.

    Without segments nothing is launched: ``flex.band_blocks`` has the formula.
    """
    if kv_segments is None:
        raise ValueError("allowed_cuda is for segments; without them the band alone decides")
    given = kv_segments
    q_len, kv_len, left, right, offset = shape
    band = {"q_len": q_len, "kv_len": kv_len, "left": host.side(left), "right": host.side(right), "offset": offset}

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, allowed = allowed_launches(q_segments, given, band, block, block)
        return launches, (allowed,)

    inputs = (q_segments, kv_segments)
    return cast(Tensor, run_prepared(given.device, ("allowed", *shape, block), inputs, build)[0])
