"""Parameters that differ by head, on the device."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@functools.lru_cache(maxsize=256)
def per_head(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One parameter of a site's heads on its device, float32 [1, H]. Kept for good: compiled graphs refer to it."""
    import torch

    return torch.tensor([values], dtype=torch.float32, device=device)
