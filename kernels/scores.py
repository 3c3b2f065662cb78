"""What attention may do to its scores besides scaling them: soft caps, biases, masks as tensors, sinks. Torch only."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.blocks import ALWAYS_KEPT, ceil_div

BIAS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HIDDEN, SOME, ALL = 0, 1, 2
"""Entries of a block map: no pair of the block is visible; some may be; mask and bias hide none of it."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What happens to the scaled scores before the softmax, in this order.

    ``softcap``: c > 0, ``s = c * tanh(s / c)``. ``slopes``: float32 [H] or [B or 1, H], ``s += slope * (key position -
    query position)`` (ALiBi, arXiv 2108.12409), positions as for the band. ``bias``: a float type, [B or 1, H or 1, Sq
    or 1, Skv or 1], any strides, ``s += bias``; -inf hides the pair, and so does all that is at most half the type's
    least finite number, since models write masks so. ``mask``: bool of such a shape, False hides. ``sinks``: a float
    type, [H], a logit per head that joins the softmax's sum and has no value (GPT-OSS), or one per query, [B or 1, H or
    1, Sq or 1] (Inkling 2).

    A row that sees nothing gives 0 and a log-sum-exp of -inf, with a sink 0 and the sink.
    """

    softcap: float | None = None
    slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def given(self) -> bool:
        """Whether any of them is there."""
        return any(getattr(self, spec.name) is not None for spec in fields(self))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.slopes, self.bias, self.mask, self.sinks

    @property
    def hides(self) -> bool:
        """Whether they can hide a pair."""
        return self.bias is not None or self.mask is not None


def hidden_at_most(dtype: torch.dtype) -> float:
    """The greatest bias of this type that hides its pair."""
    return torch.finfo(dtype).min / 2


def check_scores(scores: Scores | None, query: Tensor, key: Tensor, *, by_query: bool = False) -> Scores | None:
    """``scores`` in the kernels' form, None where there are none; slopes become [B or 1, H] and sinks float32.

    Raises ``KernelInputError`` unless they fit query [B, H, Sq, D] and key [B, Hkv, Skv, D]. ``by_query``: whether
    sinks per query are taken; the kernels themselves have none (``sinks_apart``).
    """
    if scores is None or not scores.given:
        return None
    batch, heads, q_len, _ = query.shape
    softcap, slopes, sinks = scores.softcap, scores.slopes, scores.sinks
    if softcap is not None and (not isinstance(softcap, int | float) or not 0 < softcap < float("inf")):
        raise KernelInputError(f"softcap is {softcap!r}; accepted is a number above 0, or None for none.")
    for name, x in zip(("slopes", "bias", "mask", "sinks"), scores.tensors, strict=True):
        if x is not None and (not isinstance(x, Tensor) or x.layout != torch.strided):
            kind = x.layout if isinstance(x, Tensor) else type(x).__name__
            raise KernelInputError(f"{name} is of type {kind}; accepted is a strided tensor on {query.device}.")
    whole = (batch, heads, q_len, key.shape[2])
    for name, x, kinds in (("bias", scores.bias, BIAS_DTYPES), ("mask", scores.mask, (torch.bool,))):
        if x is None:
            continue
        if x.dim() != 4 or any(have not in (1, full) for have, full in zip(x.shape, whole, strict=True)):
            raise KernelInputError(
                f"{name} has shape {tuple(x.shape)}; accepted is {list(whole)}, where any dimension may be 1."
            )
        if x.dtype not in kinds or x.device != query.device:
            known = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise KernelInputError(f"{name} is {x.dtype} on {x.device}; accepted is {known} on {query.device}.")
    if slopes is not None:
        fits = slopes.dim() in (1, 2) and slopes.shape[-1] == heads and slopes.shape[:-1] in ((), (1,), (batch,))
        if not fits or not slopes.is_floating_point() or slopes.device != query.device:
            raise KernelInputError(
                f"slopes is {slopes.dtype} {tuple(slopes.shape)} on {slopes.device}; accepted is float32 [{heads}] or "
                f"[{batch} or 1, {heads}] on {query.device}."
            )
        slopes = slopes.float().view(-1, heads) if slopes.dim() == 1 else slopes.float()
    if sinks is not None:
        own = tuple(sinks.shape)
        fits = own == (heads,)
        if by_query and len(own) == 3:
            fits = own[0] in (1, batch) and own[1] in (1, heads) and own[2] in (1, q_len)
        if not fits or not sinks.is_floating_point() or sinks.device != query.device:
            more = f" or [{batch} or 1, {heads} or 1, {q_len} or 1]" if by_query else ""
            raise KernelInputError(
                f"sinks is {sinks.dtype} {own} on {sinks.device}; accepted is a float type [{heads}]{more} on "
                f"{query.device}."
            )
        sinks = sinks.float()
    return Scores(softcap, slopes, scores.bias, scores.mask, sinks)


def sinks_apart(scores: Scores | None) -> tuple[Scores | None, Tensor | None]:
    """Checked scores as the kernels take them, and sinks per query [B or 1, H or 1, Sq or 1], for ``with_sinks``."""
    if scores is None or scores.sinks is None or scores.sinks.dim() == 1:
        return scores, None
    rest = replace(scores, sinks=None)
    return rest if rest.given else None, scores.sinks


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention ``out`` [B, H, Sq, Dv] and its log-sum-exp [B, H, Sq] after sinks [B or 1, H or 1, Sq or 1] joined.

    The weights shrink by ``sum / (sum + exp(sink))``. A row that sees nothing stays 0. ``out`` is written to.
    """
    share = torch.where(lse == -math.inf, 0.0, torch.sigmoid(lse - sinks))  # -inf less -inf would be NaN
    return out.mul_(share[..., None]), torch.logaddexp(lse, sinks.to(lse.dtype))


def check_blocks(blocks: Tensor | None, query: Tensor, key: Tensor, q_block: int, kv_block: int) -> Tensor | None:
    """A block map int8 [B or 1, H or 1, nq, nkv] from one of a bool or an 8-bit type. Raises ``KernelInputError``."""
    if blocks is None:
        return None
    batch, heads, q_len, _ = query.shape
    rows, columns = ceil_div(q_len, q_block), ceil_div(key.shape[2], kv_block)
    shape = tuple(blocks.shape)
    fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (rows, columns)
    kind = blocks.dtype in (torch.bool, torch.int8, torch.uint8)
    if not fits or not kind or blocks.device != query.device:
        raise KernelInputError(
            f"blocks is {blocks.dtype} {shape} on {blocks.device}; accepted is bool [{batch} or 1, {heads} or 1, "
            f"{rows}, {columns}] on {query.device} for blocks of {q_block} queries by {kv_block} keys."
        )
    return blocks.view(torch.int8)


def without_hidden(kv_num_blocks: Tensor, kv_indices: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Lists [B or 1, H or 1, nq(, width)] without the blocks that ``blocks`` [B or 1, H or 1, nq, nkv] says hidden.

    Indices out of range stay, for the kernel to refuse. Unused entries are 0.
    """
    width = kv_indices.shape[3]
    last = blocks.shape[3] - 1
    used = torch.arange(width, device=kv_indices.device) < kv_num_blocks[..., None]
    sizes = [max(a, b) for a, b in zip(kv_indices.shape[:2], blocks.shape[:2], strict=True)]
    entries = torch.where(used, kv_indices, 0).expand(*sizes, -1, -1)
    inside = (entries >= 0) & (entries <= last)
    held = blocks.expand(*sizes, -1, -1).gather(-1, entries.clamp(0, last).long())
    kept = used & ((held != HIDDEN) | ~inside)
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    num = kept.sum(-1, dtype=torch.int32)
    return num, torch.where(kept.gather(-1, order), entries.gather(-1, order), 0)


def budgets_in_map(allowed: Tensor, shares: Tensor | float) -> Tensor:
    """Least number of blocks per row by which a head keeps its share of the blocks in a map: int32 [B or 1, H or 1].

    ``allowed`` [B or 1, H or 1, nq, nkv], nonzero where a block may be kept; ``shares`` broadcasts to its first two
    dimensions. NaN and shares over 1 ask for all. As ``blocks.blocks_per_row``, on the map's device.
    """
    columns = allowed.shape[3]
    counts = (allowed != HIDDEN).sum(-1)
    rows_with = torch.zeros(*counts.shape[:2], columns + 1, dtype=torch.int64, device=allowed.device)
    rows_with.scatter_add_(-1, counts, torch.ones_like(counts))
    at_least = rows_with.flip(-1).cumsum(-1).flip(-1)  # going from k - 1 to k keeps one more in rows with at least k
    kept = torch.constant_pad_nd(at_least[..., 1:].cumsum(-1), (1, 0))
    if isinstance(shares, Tensor):
        wanted = torch.where(shares < 1.0, shares, 1.0).double()[..., None] * kept[..., -1:]
    else:
        wanted = min(float(shares), 1.0) * kept[..., -1:].double()
    return (kept < wanted).sum(-1, dtype=torch.int32)


def width_in_map(kv_blocks: int, share: float) -> int:
    """Room for a row under ``budgets_in_map``: kept blocks grow ever slower, so that ``share`` of a row is enough."""
    return max(1, min(kv_blocks, max(math.ceil(min(share, 1.0) * kv_blocks) + 1, ALWAYS_KEPT)))


def change_pairs(
    raw: Tensor, scores: Scores, item: int, head: int, rows: slice, keys: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    """Scaled scores [R, n] of one head's ``rows`` and the keys int64 [n] after soft cap, slopes and bias; and bool,
    broadcastable to [R, n]: the pairs that mask and bias leave visible. For checked ``scores``.
    """

    def at(x: Tensor) -> Tensor:
        x = x[item % x.shape[0], head % x.shape[1]]
        x = x[rows] if x.shape[0] > 1 else x
        return x[:, keys] if x.shape[1] > 1 else x

    shown = torch.ones((), dtype=torch.bool, device=raw.device)
    if scores.softcap is not None:
        raw = (raw / scores.softcap).tanh() * scores.softcap
    if scores.slopes is not None:
        position = torch.arange(rows.start, rows.stop, device=raw.device)[:, None] + offset
        raw = raw + (keys - position) * scores.slopes[item % scores.slopes.shape[0], head].to(raw.dtype)
    if scores.bias is not None:
        bias = at(scores.bias)
        raw = raw + bias.to(raw.dtype)
        shown = shown & ~(bias <= hidden_at_most(bias.dtype))
    if scores.mask is not None:
        shown = shown & at(scores.mask)
    return raw, shown
