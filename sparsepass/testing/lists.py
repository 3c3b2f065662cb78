"""Block lists for tests: from a map of blocks, with entries that nobody may read, and as FlexAttention's BlockMask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def lists_from_mask(named: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """``kv_num_blocks`` int32 [B, H, nq] and ``kv_indices`` int32 [B, H, nq, nkv] of a bool map [B, H, nq, nkv].

    The entries past a row's count hold junk from ``generator``: a kernel that reads one, names a block far outside.
    """
    columns = named.shape[-1]
    count = named.sum(-1).int()
    order = torch.where(named, 0, columns) + torch.arange(columns, device=named.device)
    indices = order.argsort(-1).int()
    junk = torch.randint(-(2**31), 2**31 - 1, indices.shape, generator=generator).int().to(named.device)
    used = torch.arange(columns, device=named.device) < count[..., None]
    return count, torch.where(used, indices, junk)


def block_mask_of(visible: Tensor, q_block: int, kv_block: int) -> BlockMask:
    """The FlexAttention ``BlockMask`` of the pairs ``visible``, bool [B, H, Sq, Skv].

    ``mask_mod`` looks the pairs up, so that eager ``flex_attention``, which reads no lists, computes the same.
    """
    from torch.nn.attention.flex_attention import BlockMask

    q_len, kv_len = visible.shape[2:]
    padded = torch.nn.functional.pad(visible, (0, -kv_len % kv_block, 0, -q_len % q_block))
    tiles = padded.unflatten(3, (-1, kv_block)).unflatten(2, (-1, q_block))
    whole = tiles.all(-1).all(3)
    partial = tiles.any(-1).any(3) & ~whole

    def looked_up(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return visible[b, h, q_index, kv_index]

    return BlockMask.from_kv_blocks(
        *_flex_lists(partial),
        *_flex_lists(whole),
        BLOCK_SIZE=(q_block, kv_block),
        mask_mod=looked_up,
        seq_lengths=(q_len, kv_len),
    )


def _flex_lists(named: Tensor) -> tuple[Tensor, Tensor]:
    """Lists as FlexAttention makes them: the entries past a row's count are the blocks left out, not junk."""
    return named.sum(-1).int(), named.int().argsort(dim=-1, descending=True, stable=True).int()
