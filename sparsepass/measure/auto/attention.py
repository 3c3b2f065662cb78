"""What the queries of an eager call attend to, caught at scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sparsepass.graph.canonical import SDPA

Seen = Callable[[torch.Tensor], None]
"""Is given the weights float32 [B, H, Sq, Skv] of one layer."""


class Attention(TorchFunctionMode):
    """While entered, ``seen`` gets the weights of every attention call of few queries. Nothing is changed.

    Only ``torch.nn.functional.scaled_dot_product_attention`` is caught: ``attn_implementation="sdpa"`` of transformers.
    """

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.calls = 0
        self._seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is SDPA:
            self.calls += 1
            self._seen(weights(*args, **kwargs))
        return function(*args, **kwargs)


def weights(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The softmax that SDPA takes, float32 [B, H, Sq, Skv]; its arguments and defaults are those of SDPA."""
    groups = query.shape[1] // key.shape[1]
    split = query.unflatten(1, (key.shape[1], groups)).float()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (torch.einsum("bkgqd,bksd->bkgqs", split, key.float()) * factor).flatten(1, 2)
    if is_causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask.float()
    return scores.softmax(-1).nan_to_num(0.0)
