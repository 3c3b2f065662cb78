"""Parameters that differ by head, on the device."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.cache
def per_head(values: tuple[float, ...], device: torch.device, at_most: bool = False) -> torch.Tensor:
    """One parameter of a site's heads on its device, float32 [1, H]. Kept for good: compiled graphs refer to it.

    ``at_most``: rounded down, as ``float32_at_most`` does.
    """
    import torch

    if at_most:
        values = tuple(map(float32_at_most, values))
    return torch.tensor([values], dtype=torch.float32, device=device)


def float32_at_most(value: float) -> float:
    """The largest float32 that is no more than ``value``.

    A share of blocks is compared with whole numbers: 0.4 rounded up asks for one block more than 0.4 of 10 is.
    """
    (nearest,) = struct.unpack("<f", struct.pack("<f", value))
    if nearest <= value:
        return float(nearest)
    (bits,) = struct.unpack("<I", struct.pack("<f", nearest))
    (below,) = struct.unpack("<f", struct.pack("<I", bits - 1))
    return float(below)
