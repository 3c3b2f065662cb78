"""Tensors of every layout, and memory that shows when it is read without having been written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("bhsd", "bshd", "packed", "strided_dim", "misaligned", "expanded_batch", "guarded")
"""Strides of a [B, H, S, D] tensor: contiguous; as models pass it; a part of one QKV projection; every second entry;
a storage offset that no vector load takes; one row for the whole batch; inside a larger tensor full of NaN."""

_GUARD = 160
"""Tokens of NaN behind the last one in layout ``guarded``: more than a block of 128 that is read whole."""


def laid_out(shape: Sequence[int], layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal random values [B, H, S, D] on the CPU, under the strides of one of ``LAYOUTS``."""
    b, h, s, d = shape
    if layout == "bhsd":
        return torch.randn(b, h, s, d, generator=generator).to(dtype)
    if layout == "bshd":
        return torch.randn((b, s, h, d), generator=generator).to(dtype).transpose(1, 2)
    if layout == "packed":
        return torch.randn((b, s, 3, h, d), generator=generator).to(dtype)[:, :, 1].transpose(1, 2)
    if layout == "strided_dim":
        return torch.randn((b, h, s, 2 * d), generator=generator).to(dtype)[..., ::2]
    if layout == "misaligned":
        return torch.randn((b, h, s, d + 3), generator=generator).to(dtype)[..., 1 : d + 1]
    if layout == "guarded":
        whole = torch.full((b + 1, h + 1, s + _GUARD, d + 8), torch.nan, dtype=dtype)
        inner = whole[:b, :h, :s, :d]
        return inner.copy_(torch.randn(b, h, s, d, generator=generator))
    if layout == "expanded_batch":
        return torch.randn((1, h, s, d), generator=generator).to(dtype).expand(b, h, s, d)
    raise ValueError(f"layout is {layout!r}; accepted are {', '.join(LAYOUTS)}.")


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device`` with its strides, its storage offset and what lies around it in its storage."""
    if torch.device(device).type == "cpu":
        return x
    elements = x.untyped_storage().nbytes() // x.element_size()
    storage = torch.as_strided(x, (elements,), (1,), 0).to(device)
    return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Every floating tensor that ``torch.empty`` and its relatives return is full of NaN, every integer one of junk.

    A kernel that leaves part of its output or of a buffer unwritten then shows it. Not seen: names imported from torch
    before (``from torch import empty``), and allocations in C++; ``leave_stale`` is for these.
    """
    places: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(Tensor, "new_empty"), (Tensor, "new_empty_strided")]
    originals = [getattr(owner, name) for owner, name in places]

    def poisoning(original: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = original(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(-123 if tensor.dtype.is_signed else 77)

        return filled

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def leave_stale(like: Tensor, copies: int = 4) -> None:
    """Fill ``copies`` tensors like ``like`` with NaN and free them: the allocator hands such memory out next."""
    held = [torch.full_like(like, torch.nan) for _ in range(copies)]
    del held
