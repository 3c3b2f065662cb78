"""What the two implementations of ``keep_best`` return. Torch only."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Best(NamedTuple):
    """The best of values [B, H, N]: ``flags`` int8 [B, H, N], ``num`` int32 [B, H], ``indices`` int32 [B, H, width]
    ascending (past ``num``: anything), and ``rank`` int32 [B, H]: the integer rank of the least value that was kept."""

    flags: Tensor
    num: Tensor
    indices: Tensor
    rank: Tensor
