"""What every operation takes: which keys a query sees, and which blocks are listed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

UNBOUNDED = -1


@dataclass(frozen=True, slots=True)
class Visible:
    """Which keys a query may see, by position and by segment.

    Query row ``i`` stands at ``p = i + offset`` and sees keys ``p - left .. p + right``; -1 lifts a side. Where
    ``kv_segments`` (int32 [B, Skv]) is given, a key must also carry the row's number in ``q_segments`` (int32 [B, Sq];
    ``None``: all 0). Keys of -1 are seen by no row: padding.

    ``blocks``: a map [B or 1, H or 1, nq, nkv] of the lists' blocks, bool or as ``visible_blocks`` makes it: what it
    has 0 for is neither selected nor computed nor counted. It must say so of every block that the band hides too.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    offset: int = 0
    q_segments: torch.Tensor | None = None
    kv_segments: torch.Tensor | None = None
    blocks: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """The band and the segments, as the launchers name them."""
        return {
            "left": self.left,
            "right": self.right,
            "offset": self.offset,
            "q_segments": self.q_segments,
            "kv_segments": self.kv_segments,
        }


@dataclass(frozen=True, slots=True)
class Columns:
    """Single keys that the rows of a query block attend to besides its listed blocks: token-granular "verticals".

    ``num`` int32 [B, H, nq] and ``indices`` int32 [B, H, nq, width], where B, H and nq may be 1 (shared): the first
    ``num`` entries are key positions, distinct and ascending. One inside a listed block of the row counts once; band
    and segments hold for each pair as everywhere.
    """

    num: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True, slots=True)
class BlockLists:
    """Key blocks to compute per query block, as FlexAttention's ``BlockMask`` holds them.

    ``kv_num_blocks`` int32 [B, H, nq] (B and H may be 1) and ``kv_indices`` int32 [B, H, nq, width]: the first
    ``kv_num_blocks`` entries of a row count, are distinct and ascend. Blocks are ``q_block`` by ``kv_block`` tokens.
    ``columns``: single keys besides the blocks, or None.

    ``skip``: in [0, 1). A listed block whose scores all lie more than ``-log(skip)`` under the greatest that their row
    met before may be left out, tile by tile, once its scores are known (skip-softmax, BLASST, arXiv 2512.12087): its
    weights are less than ``skip`` times the row's greatest. 0: none is.
    """

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    q_block: int
    kv_block: int
    columns: Columns | None = None
    skip: float = 0.0
