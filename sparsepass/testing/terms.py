"""What may happen to the scores of a test problem: soft caps, slopes, biases, masks and sinks from a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsepass.kernels.scores import Scores

TERMS = ("softcap", "slopes", "bias", "mask", "sinks")
"""The kinds of ``Case.terms``: the fields of ``Scores``."""


def draw_scores(
    terms: Sequence[str],
    shape: tuple[int, int, int, int],
    blocks: tuple[int, int],
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Scores | None:
    """``Scores`` with the named terms for [B, H, Sq, Skv] and blocks of tokens; None if there are none.

    Masks and biases have any of their dimensions shared or in another order in memory, hide single pairs and whole
    blocks, and leave others whole. A bias is of ``dtype`` or float32.
    """
    if not terms:
        return None
    heads = shape[1]
    softcap = slopes = bias = mask = sinks = None
    if "softcap" in terms:
        softcap = (0.5, 5.0, 50.0)[int(torch.randint(3, (1,), generator=generator))]
    if "slopes" in terms:
        items = shape[:1] if bool(torch.rand((), generator=generator) < 0.3) else ()
        slopes = (torch.rand(*items, heads, generator=generator) * 0.5).to(device)
    if "bias" in terms:
        size, hidden = _pairs(shape, blocks, generator)
        bias = torch.randn(size, generator=generator)
        kind = dtype if dtype != torch.float64 and bool(torch.rand((), generator=generator) < 0.5) else torch.float32
        least = -torch.inf if bool(torch.rand((), generator=generator) < 0.5) else torch.finfo(kind).min
        bias = _laid_out(bias.to(kind).masked_fill_(hidden, least), generator).to(device)
    if "mask" in terms:
        size, hidden = _pairs(shape, blocks, generator)
        mask = _laid_out(~hidden, generator).to(device)
    if "sinks" in terms:
        sinks = (torch.randn(heads, generator=generator) * 2).to(device)
    return Scores(softcap, slopes, bias, mask, sinks)


def _pairs(
    shape: tuple[int, int, int, int], blocks: tuple[int, int], generator: torch.Generator
) -> tuple[list[int], Tensor]:
    """A shape that broadcasts to [B, H, Sq, Skv], and which pairs of it are hidden: whole blocks and single ones."""
    shared = torch.rand(4, generator=generator) < 0.3
    size = [1 if alone else full for alone, full in zip(shared.tolist(), shape, strict=True)]
    of_block = [-(-tokens // block) if tokens > 1 else 1 for tokens, block in zip(size[2:], blocks, strict=True)]
    kind = torch.rand(*size[:2], *of_block, generator=generator)
    for dim, block in zip((2, 3), blocks, strict=True):
        kind = kind.repeat_interleave(block, dim).narrow(dim, 0, size[dim])
    single = torch.rand(size, generator=generator) < 0.3
    return size, (kind < 0.3) | ((kind < 0.7) & single)


def _laid_out(x: Tensor, generator: torch.Generator) -> Tensor:
    """x, or x under other strides: transposed in memory, or a part of something larger."""
    kind = int(torch.randint(4, (1,), generator=generator))
    if kind == 1:
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 2:
        return torch.nn.functional.pad(x, (3, 5))[..., 3 : 3 + x.shape[3]]
    if kind == 3:
        return x.repeat_interleave(2, dim=3)[..., ::2]
    return x
