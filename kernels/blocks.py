"""Block arithmetic from shapes alone: how many key blocks a band leaves visible, and how many a density keeps.

Host integers only, no tensors: these run inside fake-tensor tracing, where a tensor's value cannot be read.
"""

from functools import lru_cache
from itertools import accumulate

ALWAYS_KEPT = 3
"""Blocks that a row keeps whatever its budget: the first visible one, the diagonal one and the one before it."""


def ceil_div(length: int, block: int) -> int:
    """Blocks of ``block`` tokens that cover ``length`` tokens."""
    return -(-length // block)


@lru_cache(maxsize=512)
def visible_block_counts(
    q_len: int, kv_len: int, left: int, right: int, offset: int, q_block: int, kv_block: int
) -> tuple[int, ...]:
    """For each query block, the number of key blocks that hold at least one pair visible through the band.

    Query row ``i`` stands at ``p = i + offset`` and sees keys ``p - left .. p + right``; -1 lifts a side. Lengths and
    blocks are in tokens. The rows of a block see one contiguous range of keys, so first and last row decide.
    """
    last_key = kv_len - 1
    counts = []
    for start in range(0, q_len, q_block):
        end = min(start + q_block, q_len) - 1
        low = 0 if left < 0 else max(0, start + offset - left)
        high = last_key if right < 0 else min(last_key, end + offset + right)
        counts.append(high // kv_block - low // kv_block + 1 if low <= high else 0)
    return tuple(counts)


@lru_cache(maxsize=512)
def cumulative_kept_blocks(
    q_len: int, kv_len: int, left: int, right: int, offset: int, q_block: int, kv_block: int
) -> tuple[int, ...]:
    """Entry ``k``: blocks computed when every row keeps at most ``k``, that is ``sum_i min(k, visible_i)``."""
    rows_with = [0] * (ceil_div(kv_len, kv_block) + 1)
    for count in visible_block_counts(q_len, kv_len, left, right, offset, q_block, kv_block):
        rows_with[count] += 1
    # Going from k - 1 to k adds one block in each row that has at least k.
    at_least = list(accumulate(reversed(rows_with)))[::-1]
    return tuple(accumulate(at_least[1:], initial=0))


@lru_cache(maxsize=4096)
def blocks_per_row(
    q_len: int,
    kv_len: int,
    left: int,
    right: int,
    offset: int,
    q_block: int,
    kv_block: int,
    density: float,
) -> int:
    """Smallest per-row budget ``k`` (in key blocks) whose total reaches ``density`` of the visible blocks.

    ``density`` is the share of the visible blocks to compute, 0 to 1; rows that see fewer than ``k`` blocks keep all
    of theirs. 1 and above gives the longest row. The result is 0 only when nothing is visible or density is 0.
    """
    kept = cumulative_kept_blocks(q_len, kv_len, left, right, offset, q_block, kv_block)
    wanted = min(density, 1.0) * kept[-1]
    low, high = 0, len(kept) - 1
    while low < high:
        middle = (low + high) // 2
        if kept[middle] >= wanted:
            high = middle
        else:
            low = middle + 1
    return low


def tile_side(size: int) -> int:
    """``size`` rounded up to a power of two of at least 16, the least side of a tile."""
    return max(16, 1 << (size - 1).bit_length())


def list_width(kv_len: int, kv_block: int, budget: int) -> int:
    """Last dimension of ``kv_indices`` for rows that keep at most ``budget`` blocks and the always-kept ones."""
    return max(1, min(ceil_div(kv_len, kv_block), max(budget, ALWAYS_KEPT)))


def split_head(head_dim: int, dim_step: int) -> tuple[int, int]:
    """A head size as the attention kernel loads it: a main part, and a tail that is a power of two or 0.

    Up to ``dim_step`` the main part is a power of two, loaded at once; with the tail, 192 is 128 + 64 and not 256.
    Larger ones are loaded in parts of ``dim_step``.
    """
    whole = tile_side(head_dim)
    half = whole // 2
    if half >= 128 and half < head_dim < whole and half <= dim_step:
        tail = tile_side(head_dim - half)
        if tail < half:
            return half, tail
    return (whole, 0) if whole <= dim_step else (ceil_div(head_dim, dim_step) * dim_step, 0)


def dim_steps(head_dim: int, step: int) -> tuple[int, int]:
    """Dimensions as a kernel loads them in all and at a time: at once up to 256, ``step`` by ``step`` beyond."""
    whole = tile_side(head_dim)
    return (whole, whole) if head_dim <= 256 else (ceil_div(head_dim, step) * step, step)
