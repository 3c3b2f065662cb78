"""Which blocks a mask or a bias leaves anything of, on the CPU in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu.visible import PADDING, UNBOUNDED
from sparsepass.kernels.blocks import ceil_div
from sparsepass.kernels.scores import Scores, hidden_at_most


@torch.no_grad()
def block_map_cpu(
    scores: Scores,
    *,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    batch: int,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
) -> Tensor:
    """As ``dispatch.visible_blocks``: int8 [B or 1, H or 1, nq, nkv]; 0 hidden, 2 whole, 1 otherwise."""
    given = [x for x in (scores.mask, scores.bias) if x is not None]
    items = batch if kv_segments is not None else max(x.shape[0] for x in given)
    heads = max(x.shape[1] for x in given)
    rows, blocks = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    found = torch.zeros(items, heads, rows, blocks, dtype=torch.int8)
    key = torch.arange(kv_len)
    for row in range(rows):
        part = slice(row * q_block, min((row + 1) * q_block, q_len))
        position = torch.arange(part.start, part.stop)[:, None] + offset
        # Only the blocks that the band shows: under a causal mask half of the tensor is not read.
        low = 0 if left == UNBOUNDED else max(0, part.start + offset - left) // kv_block
        high = kv_len if right == UNBOUNDED else min(kv_len, part.stop + offset + right)
        columns = slice(low * kv_block, min(kv_len, ceil_div(max(high, 0), kv_block) * kv_block))
        if columns.start >= columns.stop:
            continue
        shown = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        if scores.mask is not None:
            shown = _cut(scores.mask, part, columns)
        if scores.bias is not None:
            shown = shown & ~(_cut(scores.bias, part, columns) <= hidden_at_most(scores.bias.dtype))
        keys = key[columns]
        seen = torch.ones(len(position), len(keys), dtype=torch.bool)
        if right != UNBOUNDED:
            seen &= keys <= position + right
        if left != UNBOUNDED:
            seen &= keys >= position - left
        seen = seen[None, None]
        if kv_segments is not None:
            own = torch.zeros(()) if q_segments is None else q_segments[:, None, part, None]
            of_keys = kv_segments[:, None, None, columns]
            seen = seen & (of_keys == own) & (of_keys != PADDING)
        some = _blocks(shown & seen, kv_block, len(keys), missing=False).any(-1)
        every = _blocks(shown, kv_block, len(keys), missing=True, every=True).all(-1)
        found[:, :, row, low : low + some.shape[-1]] = torch.where(some, 1 + every.to(torch.int8), 0)
    return found


def _cut(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """Rows and columns of x [B, H, Sq or 1, Skv or 1]."""
    part: Tensor = x[:, :, rows] if x.shape[2] > 1 else x
    return part[..., columns] if x.shape[3] > 1 else part


def _blocks(pairs: Tensor, block: int, keys: int, *, missing: bool, every: bool = False) -> Tensor:
    """Per key whether any (or every) row has it, [B, H, blocks, block], the end filled up with ``missing``."""
    of_key = (pairs.all(2) if every else pairs.any(2)).expand(-1, -1, keys)
    padded = torch.constant_pad_nd(of_key, (0, -keys % block), value=missing)
    return padded.view(*padded.shape[:-1], -1, block)
