"""Pooled block top-k selection on the CPU (the block-sparse method of The Sparse Frontier, arXiv 2504.17768)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.cpu.visible import PADDING, Visibility
from sparsepass.kernels.blocks import blocks_per_row, list_width
from sparsepass.kernels.scores import HIDDEN, budgets_in_map, check_blocks, width_in_map

_PAIRS = 1 << 22
"""Token pairs tested at once where segments leave a block pair undecided: 4 MiB of booleans."""


def block_means(x: Tensor, block: int, segments: Tensor | None) -> Tensor:
    """Means over blocks of tokens, fp32 (fp64 for fp64) [B, H, blocks, D], without tokens of segment -1."""
    batch, heads, length, dim = x.shape
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = length // block * block
    if segments is None:
        means = [x[:, :, :whole].reshape(batch, heads, -1, block, dim).mean(3, dtype=work)] if whole else []
        if whole < length:
            means.append(x[:, :, whole:].mean(2, keepdim=True, dtype=work))
        return torch.cat(means, 2) if len(means) > 1 else means[0]
    used = (segments != PADDING)[:, None, :, None]
    blocks = -(-length // block)
    tokens = torch.zeros((batch, heads, blocks * block, dim), dtype=work)
    tokens[:, :, :length] = torch.where(used, x, 0)
    held = torch.zeros((batch, 1, blocks * block, 1), dtype=work)
    held[:, :, :length] = used
    total = tokens.view(batch, heads, blocks, block, dim).sum(3)
    return total / held.view(batch, 1, blocks, block, 1).sum(3).clamp(min=1)


def unlike_blocks(x: Tensor, block: int, segments: Tensor | None, least: float) -> Tensor:
    """Bool [B, H, blocks]: blocks whose tokens' mean cosine is under ``least`` (SpargeAttn, arXiv 2502.18137).

    The mean over all pairs is the squared length of the mean of the tokens at length 1. NaN counts as under.
    """
    batch, heads, length, dim = x.shape
    missing = -length % block
    used = x.new_ones(batch, length, dtype=torch.float32) if segments is None else (segments != PADDING).float()
    count = torch.constant_pad_nd(used, (0, missing)).view(batch, -1, block).sum(-1).clamp(min=1)
    found = []
    for head in range(heads):  # one at a time: the copy is as large as the input
        tokens = x[:, head].float()
        if segments is not None:
            tokens = torch.where(used[..., None] > 0, tokens, 0.0)
        weight = torch.constant_pad_nd(used / tokens.norm(dim=-1).clamp(min=1e-30), (0, missing))
        tokens = torch.constant_pad_nd(tokens, (0, 0, 0, missing)) if missing else tokens
        total = torch.matmul(weight.view(batch, -1, 1, block), tokens.view(batch, -1, block, dim))[:, :, 0]
        found.append(~((total / count[..., None]).square().sum(-1) >= least))
    return torch.stack(found, 1)


def allowed_blocks(mask: Visibility, batch: int) -> Tensor:
    """Block pairs that hold at least one visible token pair: bool [B or 1, H or 1, q_blocks, kv_blocks]."""
    rows, columns = torch.arange(mask.q_blocks)[:, None], torch.arange(mask.kv_blocks)[None, :]
    band = mask.band_any(rows, columns)[None]
    if mask.blocks is not None:  # it knows of segments too
        return band & (mask.blocks != HIDDEN)
    if mask.segment_ranges is None or mask.segments is None:
        return band[None]
    q_low, q_high, kv_low, kv_high = mask.segment_ranges
    meet = (q_low[:, :, None] <= kv_high[:, None, :]) & (q_high[:, :, None] >= kv_low[:, None, :])
    allowed = band & meet
    items = torch.arange(batch)[:, None, None]
    undecided = allowed & ~mask.is_full(items, rows[None], columns[None])
    # Ranges that meet prove nothing by themselves; what is left is little (edges of documents) and tested by token.
    found = undecided.nonzero()
    step = max(1, _PAIRS // (mask.q_block * mask.kv_block))
    for part in torch.split(found, step) if len(found) else ():
        item, row, column = part.unbind(1)
        seen = ~mask.hidden_pairs(item, row, column[:, None])
        allowed[item, row, column] = seen.flatten(1).any(1)
    return allowed[:, None]


def select(
    q: Tensor,
    k: Tensor,
    mask: Visibility,
    scale: float,
    allowed: Tensor,
    budget: Tensor,
    width: int,
    last: int,
    unlike: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The selection in torch operations, where the C++ kernel does not serve. As ``cpu_native.select``.

    ``allowed``: bool [B or 1, H or 1, nq, nkv]. ``last``: rows at the end that keep all of them.
    ``unlike``: bool [B, H, nq, nkv], kept too wherever allowed.
    """
    batch, heads, q_len, _ = q.shape
    kv_heads = k.shape[1]
    visible = allowed.sum(-1)
    queries = block_means(q, mask.q_block, None if mask.kv_segments is None else mask.q_segments)
    keys = block_means(k, mask.kv_block, mask.kv_segments)
    grouped = queries.view(batch, kv_heads, heads // kv_heads, mask.q_blocks, -1)
    scores = torch.matmul(grouped, keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale

    ends = (torch.arange(1, mask.q_blocks + 1) * mask.q_block).clamp(max=q_len) - 1 + mask.offset
    diagonal = torch.div(ends, mask.kv_block, rounding_mode="floor")[:, None]
    column = torch.arange(mask.kv_blocks)
    dense = torch.arange(mask.q_blocks)[:, None] >= mask.q_blocks - last
    forced = (column == diagonal) | (column == diagonal - 1) | dense
    forced = allowed & (forced | (allowed.cumsum(-1) == 1))
    if unlike is not None:
        forced = forced | (allowed & unlike)

    limits = torch.finfo(scores.dtype)
    # Three tiers that scores cannot leave: hidden, allowed (NaN lowest), always kept.
    scores = torch.nan_to_num(scores, nan=limits.min, posinf=limits.max, neginf=limits.min)
    scores = torch.where(allowed, scores, -torch.inf).masked_fill(forced, torch.inf)
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :width]
    count = torch.maximum(torch.minimum(visible, budget[:, :, None]), forced.sum(-1))
    count = count.expand(batch, heads, -1)
    filled = torch.arange(width) < count[..., None]
    chosen = torch.where(filled, ranked, mask.kv_blocks).sort(-1).values
    return count.to(torch.int32), torch.where(filled, chosen, 0).to(torch.int32), visible.expand(batch, heads, -1)


@torch.no_grad()
def select_blocks_cpu(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    density: float | Tensor,
    max_density: float | None = None,
    self_similarity: float | None = None,
    last: int = 0,
    blocks: Tensor | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Key blocks that each query block attends to, by the product of mean query and mean key.

    Args:
        q: [B, H, Sq, D], k: [B, Hkv, Skv, D], any float type and strides.
        scale: factor of the scores; only its sign can matter.
        left, right, offset, q_segments, kv_segments, q_block, kv_block: as for ``block_sparse_attention_cpu``.
        density: share of the blocks visible through the band to keep, 0 to 1; or float32 [B or 1, H], one per head.
            With ``blocks`` it is of each head's visible blocks.
        max_density: with a tensor of densities, a bound on them: it gives the width of the lists. None: their maximum.
        self_similarity: query and key blocks whose tokens' mean cosine is under it are computed whole.
        last: query blocks at the end that keep every visible block (FlashPrefill), besides ``density``.
        blocks: a block map [B or 1, H or 1, q_blocks, kv_blocks]; what it has 0 for is not selected.
        counter: int64 [3]; [2] += blocks that hold a visible pair, over batch, heads and rows.

    Returns:
        kv_num_blocks int32 [B, H, q_blocks] and kv_indices int32 [B, H, q_blocks, width], ascending, unused entries 0.
        Every row keeps its first visible block, the block of its last query's position and the one before, and fills
        up with the best scores; ties go to the lower index, NaN counts as the lowest score.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    mask = Visibility(q_len, kv_len, q_block, kv_block, left, right, offset, q_segments, kv_segments, blocks)
    shape = (q_len, kv_len, left, right, offset, q_block, kv_block)
    if blocks is not None:
        shares = torch.as_tensor(density, dtype=torch.float64)
        bound = max_density if max_density is not None else float(shares.max())
        budget = budgets_in_map(allowed_blocks(mask, batch), torch.where(shares < bound, shares, bound)).expand(
            batch, heads
        )
        width = width_in_map(mask.kv_blocks, bound)
    elif isinstance(density, Tensor):
        shares_of = density.to("cpu", torch.float64).tolist()
        bound = max_density if max_density is not None else max(max(row) for row in shares_of)
        widest = blocks_per_row(*shape, density=bound)
        budgets = [[min(widest, blocks_per_row(*shape, density=share)) for share in row] for row in shares_of]
    else:
        widest = blocks_per_row(*shape, density=density)
        budgets = [[widest]]
    if blocks is None:
        budget = torch.tensor(budgets, dtype=torch.int32).expand(batch, heads)
        width = list_width(kv_len, kv_block, widest)
    if last or self_similarity is not None:
        width = mask.kv_blocks

    if self_similarity is not None:
        unlike = unlike_blocks(k, kv_block, kv_segments, self_similarity)
        unlike = unlike.repeat_interleave(heads // k.shape[1], 1)[:, :, None]
        of_rows = unlike_blocks(q, q_block, None if kv_segments is None else q_segments, self_similarity)
        unlike = unlike | of_rows[..., None]
        counts, indices, visible = select(q, k, mask, scale, allowed_blocks(mask, batch), budget, width, last, unlike)
    elif cpu_native.available(q.dtype):
        allowed = None if kv_segments is None and blocks is None else allowed_blocks(mask, batch)
        counts, indices, visible = cpu_native.select(q, k, mask, scale, allowed, budget, width, last)
    else:
        counts, indices, visible = select(q, k, mask, scale, allowed_blocks(mask, batch), budget, width, last)
    if counter is not None:
        counter[2] += visible.sum()
    return counts, indices
