"""One attention problem as plain data (``Case``), and its tensors (``Inputs``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsepass.kernels.attend.reference import (
    block_sparse_attention_reference,
    listed_blocks,
    shown_by_scores,
    visible_pairs,
)
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing.lists import block_mask_of, lists_from_mask
from sparsepass.testing.memory import laid_out, moved
from sparsepass.testing.terms import draw_scores

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SEGMENTS = ("none", "left_pad", "right_pad", "packed", "packed_pad", "interleaved", "all_padding")
"""Kinds of ``Case.segments``: padding on a side, packed sequences, both, no order at all, nothing but padding."""

LISTS = ("full", "random", "sparse", "empty_rows", "single", "uneven")
"""Kinds of ``Case.lists``; ``uneven`` has one full row among rows of one block."""

SHARED_LISTS = ("none", "batch", "head", "both")
"""Kinds of ``Case.shared_lists``: which of the lists' first dimensions is 1, for all to share."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case: q [B, H, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], and block lists int32.

    ``mask``: what every launcher and reference of ours takes by keyword: ``scale``, ``left``, ``right``, ``offset``,
    ``q_segments``, ``kv_segments``, ``q_block``, ``kv_block``. ``scores``: what happens to the scaled scores, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    mask: dict[str, Any]
    scores: Scores | None = None

    @property
    def lists(self) -> BlockLists:
        return BlockLists(self.kv_num_blocks, self.kv_indices, self.mask["q_block"], self.mask["kv_block"])

    @property
    def band(self) -> Visible:
        return Visible(**self._band())

    def _band(self) -> dict[str, Any]:
        return {name: self.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}

    def to64(self) -> Inputs:
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double())

    def reference(self) -> tuple[Tensor, Tensor]:
        """Out [B, H, Sq, Dv] and log-sum-exp [B, H, Sq] in float64."""
        wide = self.to64()
        return block_sparse_attention_reference(
            wide.q, wide.k, wide.v, self.kv_num_blocks, self.kv_indices, **self.mask, scores=self.scores
        )

    def visible(self) -> Tensor:
        """Bool [B, H, Sq, Skv]: pairs that are listed and visible."""
        batch, heads, q_len, _ = self.q.shape
        kv_len = self.k.shape[2]
        q_block, kv_block = self.mask["q_block"], self.mask["kv_block"]
        named = listed_blocks(self.kv_num_blocks, self.kv_indices, -(-kv_len // kv_block))
        named = named.repeat_interleave(q_block, 2)[:, :, :q_len].repeat_interleave(kv_block, 3)[..., :kv_len]
        seen = visible_pairs(q_len, kv_len, batch=batch, device=self.q.device, **self._band())
        shown = shown_by_scores(self.scores).to(self.q.device)
        return (named & seen[:, None] & shown).expand(batch, heads, q_len, kv_len)

    def block_mask(self) -> BlockMask:
        """Lists and mask together as FlexAttention's ``BlockMask``; blocks seen whole are its full blocks."""
        return block_mask_of(self.visible(), self.mask["q_block"], self.mask["kv_block"])


@dataclass(frozen=True)
class Case:
    """One attention problem, replayed by its repr: lengths and blocks in tokens, tensors from ``seed``.

    Band: query row i stands at ``i + offset`` and sees keys from ``left`` before it to ``right`` after it; -1 lifts a
    side. ``layout``, ``segments``, ``lists``, ``shared_lists``: one of ``LAYOUTS``, ``SEGMENTS``, ``LISTS``,
    ``SHARED_LISTS``. ``bad``: that many infinite or NaN entries in each of q, k and v. ``terms``: those of
    ``terms.TERMS`` that change the scores.
    """

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    q_block: int
    kv_block: int
    left: int
    right: int
    offset: int
    scale: float
    layout: str
    segments: str
    lists: str
    shared_lists: str
    bad: int
    seed: int
    terms: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def tensors(self, device: torch.device | str = "cpu") -> Inputs:
        """Inputs drawn from the seed on the CPU, then moved, so that a case is the same everywhere."""
        generator = torch.Generator().manual_seed(self.seed)
        q = self._drawn((self.batch, self.heads, self.q_len, self.head_dim), generator)
        k = self._drawn((self.batch, self.kv_heads, self.kv_len, self.head_dim), generator)
        v = self._drawn((self.batch, self.kv_heads, self.kv_len, self.v_head_dim), generator)
        for x in (q, k, v):
            for _ in range(self.bad):
                head, token, dim = (int(torch.randint(n, (1,), generator=generator)) for n in x.shape[1:])
                value = (float("nan"), float("inf"), float("-inf"))[int(torch.randint(3, (1,), generator=generator))]
                x[0, head, token, dim] = value
        q_segments, kv_segments = self._segments(generator)
        kv_num_blocks, kv_indices = self._lists(generator)
        mask = {
            "scale": self.scale,
            "left": self.left,
            "right": self.right,
            "offset": self.offset,
            "q_segments": None if q_segments is None else q_segments.to(device),
            "kv_segments": None if kv_segments is None else kv_segments.to(device),
            "q_block": self.q_block,
            "kv_block": self.kv_block,
        }
        shape = (self.batch, self.heads, self.q_len, self.kv_len)
        scores = draw_scores(self.terms, shape, (self.q_block, self.kv_block), self.dtype, generator, device)
        q, k, v = (moved(x, device) for x in (q, k, v))
        return Inputs(q, k, v, kv_num_blocks.to(device), kv_indices.to(device), mask, scores)

    def _drawn(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return laid_out(shape, self.layout, self.dtype, generator)

    def _segments(self, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """(q_segments, kv_segments) int32; queries sit at the band's positions, so they take those keys' segments."""
        if self.segments == "none":
            return None, None
        kv = torch.zeros(self.batch, self.kv_len, dtype=torch.int32)
        token = torch.arange(self.kv_len)
        for row in kv:
            cut = int(torch.randint(self.kv_len + 1, (1,), generator=generator))
            if self.segments == "left_pad":
                row[token < cut] = -1
            elif self.segments == "right_pad":
                row[token >= cut] = -1
            elif self.segments == "all_padding":
                row[:] = -1
            elif self.segments == "interleaved":
                row[:] = torch.randint(-1, 3, (self.kv_len,), generator=generator).int()
            else:
                edges = torch.randint(self.kv_len + 1, (3,), generator=generator)
                row[:] = (token[:, None] >= edges[None]).sum(1).int()
                if self.segments == "packed_pad":
                    row[row == 3] = -1
        if self.segments in ("left_pad", "right_pad", "all_padding"):
            return None, kv
        position = (torch.arange(self.q_len) + self.offset).clamp(0, self.kv_len - 1)
        return kv[:, position].contiguous(), kv

    def _lists(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = 1 if self.shared_lists in ("batch", "both") else self.batch
        heads = 1 if self.shared_lists in ("head", "both") else self.heads
        rows, columns = -(-self.q_len // self.q_block), -(-self.kv_len // self.kv_block)
        return draw_lists(self.lists, (batch, heads, rows, columns), generator)


def draw_lists(kind: str, shape: tuple[int, int, int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Block lists of one of ``LISTS`` for [B, H, query blocks, key blocks]: ``kv_num_blocks`` and ``kv_indices``."""
    batch, heads, rows, columns = shape
    share = {"full": 1.0, "random": 0.6, "sparse": 0.25, "empty_rows": 0.6, "single": 0.0, "uneven": 0.0}[kind]
    named = torch.rand(shape, generator=generator) < share
    if kind == "empty_rows":
        named &= torch.rand(batch, heads, rows, 1, generator=generator) < 0.5
    if kind in ("single", "uneven"):
        only = torch.randint(columns, (batch, heads, rows, 1), generator=generator)
        named = named.scatter(-1, only, True)
    if kind == "uneven":
        whole = torch.randint(rows, (batch, heads, 1), generator=generator)
        named |= (torch.arange(rows) == whole)[..., None]
    return lists_from_mask(named, generator)
