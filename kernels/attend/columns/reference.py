"""Eager definition of attention over listed blocks and gathered columns: slow, plain, correct in float64.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``. Columns are token positions that a
row of query blocks attends to besides its listed blocks.
"""

from itertools import product

import torch
from torch import Tensor


def listed_pairs(
    q_len: int,
    kv_len: int,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    column_num: Tensor,
    column_indices: Tensor,
    *,
    batch: int,
    heads: int,
    q_block: int,
    kv_block: int,
) -> Tensor:
    """Bool [B, H, Sq, Skv]: pairs that a listed block or a column names. Raises ValueError on malformed columns."""
    named = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)

    def at(x: Tensor, item: int, head: int, row: int) -> Tensor:
        return x[item % x.shape[0], head % x.shape[1], row % x.shape[2]]

    for item, head, row in product(range(batch), range(heads), range(-(-q_len // q_block))):
        mine = named[item, head, row * q_block : (row + 1) * q_block]
        for block in at(kv_indices, item, head, row)[: int(at(kv_num_blocks, item, head, row))].tolist():
            mine[:, block * kv_block : (block + 1) * kv_block] = True
        columns = at(column_indices, item, head, row)[: int(at(column_num, item, head, row))].tolist()
        if columns != sorted(set(columns)) or any(not 0 <= c < kv_len for c in columns):
            raise ValueError(f"row {(item, head, row)}: columns {columns}, want ascending within 0..{kv_len - 1}")
        mine[:, columns] = True
    return named.to(kv_indices.device)


def column_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    column_num: Tensor,
    column_indices: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of listed blocks and columns: (out [B, H, Sq, Dv], log-sum-exp [B, H, Sq]).

    ``column_num`` int32 [B or 1, H or 1, nq or 1] and ``column_indices`` [..., width]: the first entries of a row are
    key positions, ascending. One inside a listed block counts once. Float64 for float64 inputs, else float32. A row
    that sees nothing gives 0 and -inf; a non-finite key or value reaches the rows that see it, and no others.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    visible = listed_pairs(
        q_len,
        kv_len,
        kv_num_blocks,
        kv_indices,
        column_num,
        column_indices,
        batch=batch,
        heads=heads,
        q_block=q_block,
        kv_block=kv_block,
    )
    position = torch.arange(q_len, device=q.device)[:, None] + offset
    distance = torch.arange(kv_len, device=q.device)[None, :] - position
    if right >= 0:
        visible = visible & (distance <= right)
    if left >= 0:
        visible = visible & (distance >= -left)
    if kv_segments is not None:
        own = torch.zeros_like(kv_segments[:, :1]) if q_segments is None else q_segments
        same = (own[:, :, None] == kv_segments[:, None, :]) & (kv_segments >= 0)[:, None, :]
        visible = visible & same[:, None]

    out = torch.zeros(batch, heads, q_len, v.shape[3], dtype=work, device=q.device)
    lse = torch.full((batch, heads, q_len), -torch.inf, dtype=work, device=q.device)
    for item, head in product(range(batch), range(heads)):
        kv_head = head * k.shape[1] // heads
        values = v[item, kv_head].to(work)
        scores = q[item, head].to(work) @ k[item, kv_head].to(work).T * scale
        for row in range(q_len):
            seen = visible[item, head, row]
            if not seen.any():
                continue
            mine, given = scores[row, seen], values[seen]
            top = mine.amax()
            base = torch.where(top == -torch.inf, 0.0, top)
            weights = (mine - base).exp()
            total = weights.sum()
            lse[item, head, row] = base + total.log()
            # 0 * inf is NaN, but any non-finite value that is seen must show: those are added by sight.
            weights = torch.where(total == 0, 0.0, weights / total)
            result = weights @ torch.where(given.isfinite(), given, 0.0)
            for sign in (torch.inf, -torch.inf):
                result = result + torch.where(((given == sign) | given.isnan()).any(0), sign, 0.0)
            out[item, head, row] = result
    return out.to(q.dtype), lse
