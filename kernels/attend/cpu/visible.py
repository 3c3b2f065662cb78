"""Which (query, key) pairs are visible, by block and by token: what the CPU attention and the CPU selection share.

Positions: query row i stands at i + offset; a band lets it see keys from ``position - left`` to ``position + right``
(-1 lifts a side). Segments add: a key is visible only to queries of its own segment, and never if that is -1 (padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

UNBOUNDED = -1
PADDING = -1
"""Segment of tokens that nobody sees and that see nothing."""


@dataclass(frozen=True)
class Visibility:
    """The mask of one call, cut into blocks. ``q_segments`` [B, q_len] and ``kv_segments`` [B, kv_len] are int32.

    ``blocks``: int8 [B or 1, H or 1, q_blocks, kv_blocks] or None; blocks for which it has 0 are not to be listed.
    """

    q_len: int
    kv_len: int
    q_block: int
    kv_block: int
    left: int
    right: int
    offset: int
    q_segments: Tensor | None
    kv_segments: Tensor | None
    blocks: Tensor | None = None

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // self.q_block)

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_len // self.kv_block)

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor] | None:
        """Segments of query blocks [B, q_blocks, q_block] and key blocks [B, kv_blocks, kv_block], ends filled up.

        The last query block is filled with its last segment, which widens no range; the last key block with padding.
        """
        if self.kv_segments is None:
            return None
        batch = self.kv_segments.shape[0]
        keys = self.kv_segments.new_full((batch, self.kv_blocks * self.kv_block), PADDING)
        keys[:, : self.kv_len] = self.kv_segments
        queries = keys.new_zeros((batch, self.q_blocks * self.q_block))
        if self.q_segments is not None:
            queries[:, : self.q_len] = self.q_segments
            queries[:, self.q_len :] = self.q_segments[:, -1:]
        return queries.view(batch, -1, self.q_block), keys.view(batch, -1, self.kv_block)

    @cached_property
    def segment_ranges(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Least and greatest segment of every query block [B, q_blocks] and of every key block [B, kv_blocks]."""
        if self.segments is None:
            return None
        queries, keys = self.segments
        return queries.amin(-1), queries.amax(-1), keys.amin(-1), keys.amax(-1)

    def distance(self, q_index: Tensor, kv_index: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest (key - query position) over the pairs of each block pair; indices broadcast."""
        first_q = q_index * self.q_block + self.offset
        last_q = (q_index * self.q_block + self.q_block - 1).clamp(max=self.q_len - 1) + self.offset
        first_k = kv_index * self.kv_block
        last_k = (first_k + self.kv_block - 1).clamp(max=self.kv_len - 1)
        return first_k - last_q, last_k - first_q

    def band_any(self, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """True where the band shows at least one pair of the block pair."""
        low, high = self.distance(q_index, kv_index)
        shown = torch.ones_like(low, dtype=torch.bool)
        if self.right != UNBOUNDED:
            shown &= low <= self.right
        if self.left != UNBOUNDED:
            shown &= high >= -self.left
        return shown

    def is_full(self, batch: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """True where every pair of the block pair is visible and the key block holds ``kv_block`` keys."""
        low, high = self.distance(q_index, kv_index)
        full = ((kv_index + 1) * self.kv_block <= self.kv_len).expand(low.shape)
        if self.right != UNBOUNDED:
            full = full & (high <= self.right)
        if self.left != UNBOUNDED:
            full = full & (low >= -self.left)
        if self.segment_ranges is not None:
            q_low, q_high, kv_low, kv_high = self.segment_ranges
            segment = q_low[batch, q_index]
            full = full & (segment == q_high[batch, q_index]) & (segment != PADDING)
            full = full & (segment == kv_low[batch, kv_index]) & (segment == kv_high[batch, kv_index])
        return full

    def hidden(self, batch: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor | None:
        """Pairs that are not visible, for rows of block pairs; ``None`` when all are visible.

        Args:
            batch: [R] int64.
            q_index: [R] int64, the query block of each row.
            kv_index: [R, n] int64, key blocks of each row; ``kv_blocks`` or more stands for a slot without keys.

        Returns:
            bool, broadcastable to [R, q_block, n * kv_block].
        """
        rows, slots = kv_index.shape
        keys = kv_index[:, :, None] * self.kv_block + torch.arange(self.kv_block)
        keys = keys.view(rows, 1, slots * self.kv_block)
        queries = (q_index[:, None] * self.q_block + torch.arange(self.offset, self.offset + self.q_block))[:, :, None]
        tests = []
        if int(kv_index.max()) >= self.kv_len // self.kv_block:
            tests.append(keys >= self.kv_len)
        if self.right != UNBOUNDED:
            tests.append(keys > queries + self.right)
        if self.left != UNBOUNDED:
            tests.append(keys < queries - self.left)
        if self.segments is not None:
            q_segments, kv_segments = self.segments
            of_keys = kv_segments[batch[:, None], kv_index.clamp(max=self.kv_blocks - 1)].view(rows, 1, -1)
            tests.append((of_keys != q_segments[batch, q_index][:, :, None]) | (of_keys == PADDING))
        if not tests:
            return None
        masked = tests[0]
        for test in tests[1:]:
            masked = masked | test
        return masked

    def hidden_pairs(self, batch: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        """As ``hidden``, always bool [R, q_block, n * kv_block], with query rows behind the last one hidden."""
        rows, slots = kv_index.shape
        masked = self.hidden(batch, q_index, kv_index)
        behind = q_index[:, None, None] * self.q_block + torch.arange(self.q_block)[None, :, None] >= self.q_len
        full = behind if masked is None else masked | behind
        return full.expand(rows, self.q_block, slots * self.kv_block)
