"""Rows of attention that see nothing: eager gives them the mean of all values or NaN, the block-sparse op zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sparsepass.measure.coverage.count import SDPA, SOFTMAX

HIDING = torch.finfo(torch.float32).min / 2
"""What is added to hidden scores is lower."""


class HiddenRowsGiveZero(TorchFunctionMode):
    """An uncompiled run as if the rows that see nothing gave zero.

    It is what the output is compared with where padding makes such rows and the model lets them reach others: patches
    made of several tokens, convolutions.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        name = getattr(func, "__name__", "")
        if name == SDPA:
            mask = args[3] if len(args) > 3 else given.get("attn_mask")
            if mask is not None:
                hidden = ~mask.any(-1) if mask.dtype == torch.bool else mask.amax(-1) < HIDING
                return out.masked_fill(hidden.unsqueeze(-1), 0.0)
        elif name in SOFTMAX and name != "logsumexp":
            scores = args[0] if args else given.get("input", given.get("self"))
            if isinstance(scores, torch.Tensor) and scores.is_floating_point() and scores.numel():
                return out.masked_fill(scores.amax(-1, keepdim=True) < HIDING, 0.0)
        return out
