"""Eager definitions of what the kernels compute: slow, plain, correct in float64, sharing no code with them.

The conventions of every function here, and of every launcher in this package:

* ``q`` is [B, H, Sq, D], ``k`` [B, Hkv, Skv, D], ``v`` [B, Hkv, Skv, Dv]; head ``h`` reads KV head ``h // (H // Hkv)``.
* Band: query row ``i`` stands at ``p = i + offset`` and sees keys ``p - left .. p + right``; -1 lifts a side.
* Segments: ``kv_segments`` int32 [B, Skv] or None (no test); ``q_segments`` int32 [B, Sq] or None (all 0). A key is
  visible iff its segment equals the query's and is not -1: -1 marks padding, which nobody sees and which sees nothing.
* Block lists are FlexAttention's: ``kv_num_blocks`` int32 [B or 1, H or 1, nq], ``kv_indices`` int32
  [B or 1, H or 1, nq, width], the first ``kv_num_blocks`` entries of a row valid, unique and ascending.
* Scores: ``kernels/scores.py`` says what may happen to them between scaling and softmax.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsepass.kernels.scores import Scores


def visible_pairs(
    q_len: int,
    kv_len: int,
    *,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    batch: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Bool [B, Sq, Skv]: which keys each query sees through the band and the segments."""
    position = torch.arange(q_len, device=device)[:, None] + offset
    key = torch.arange(kv_len, device=device)[None, :]
    visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= key >= position - left
    if right >= 0:
        visible &= key <= position + right
    visible = visible.expand(batch, q_len, kv_len)
    if kv_segments is not None:
        if q_segments is None:
            q_segments = torch.zeros(batch, q_len, dtype=torch.int32, device=device)
        same = q_segments[:, :, None] == kv_segments[:, None, :]
        visible = visible & same & (kv_segments != -1)[:, None, :]
    return visible


def listed_blocks(kv_num_blocks: Tensor, kv_indices: Tensor, kv_blocks: int) -> Tensor:
    """Bool [B or 1, H or 1, nq, kv_blocks]: the blocks that the lists name. Raises ValueError on a malformed list."""
    named = torch.zeros(*kv_num_blocks.shape, kv_blocks, dtype=torch.bool)
    counts, indices = kv_num_blocks.tolist(), kv_indices.tolist()
    for item, head, row in product(*(range(n) for n in kv_num_blocks.shape)):
        count, entries = counts[item][head][row], indices[item][head][row]
        used = entries[:count]
        if not 0 <= count <= len(entries) or used != sorted(set(used)) or any(not 0 <= e < kv_blocks for e in used):
            raise ValueError(f"row {(item, head, row)}: {count} entries of {entries}, want ascending < {kv_blocks}")
        named[item, head, row, used] = True
    return named.to(kv_indices.device)


def shown_by_scores(scores: Scores | None) -> Tensor:
    """Bool [B or 1, H or 1, Sq or 1, Skv or 1]: the pairs that neither the mask nor the bias hides."""
    shown = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if scores is not None and scores.mask is not None:
        shown = scores.mask
    if scores is not None and scores.bias is not None:
        least = {torch.float16: -32752.0, torch.float64: -8.98e307}.get(scores.bias.dtype, -1.69e38)
        shown = shown.to(scores.bias.device) & ~(scores.bias < least)
    return shown


def changed_scores(raw: Tensor, scores: Scores | None, offset: int) -> Tensor:
    """Scaled scores [B, H, Sq, Skv] after soft cap, slopes and bias; hidden pairs come out as anything."""
    if scores is None:
        return raw
    if scores.softcap is not None:
        raw = scores.softcap * torch.tanh(raw / scores.softcap)
    if scores.slopes is not None:
        position = torch.arange(raw.shape[2], device=raw.device)[:, None] + offset
        distance = torch.arange(raw.shape[3], device=raw.device)[None, :] - position
        raw = raw + scores.slopes.to(raw.dtype)[..., None, None] * distance
    if scores.bias is not None:
        raw = raw + scores.bias.to(raw.dtype)
    return raw


def block_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    scores: Scores | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks: (out [B, H, Sq, Dv] like ``q``, log-sum-exp [B, H, Sq], natural log).

    Computed in float64 for float64 inputs, else in float32. A row with no visible listed key gives 0 and -inf, or the
    sink. A non-finite key or value reaches the rows that see it, and no others.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = heads // k.shape[1]
    keys = k.to(compute).repeat_interleave(group, dim=1)
    values = v.to(compute).repeat_interleave(group, dim=1)

    listed = listed_blocks(kv_num_blocks, kv_indices, -(-kv_len // kv_block))
    pairs = listed.repeat_interleave(q_block, dim=2)[:, :, :q_len].repeat_interleave(kv_block, dim=3)[..., :kv_len]
    seen = visible_pairs(
        q_len,
        kv_len,
        left=left,
        right=right,
        offset=offset,
        q_segments=q_segments,
        kv_segments=kv_segments,
        batch=batch,
        device=q.device,
    )
    visible = pairs & seen[:, None] & shown_by_scores(scores).to(q.device)
    visible = visible.expand(batch, heads, q_len, kv_len)

    logits = changed_scores(q.to(compute) @ keys.transpose(-1, -2) * scale, scores, offset)
    logits = logits.masked_fill(~visible, float("-inf"))
    top = logits.amax(-1, keepdim=True)
    sink = None
    if scores is not None and scores.sinks is not None:
        sink = (
            scores.sinks.to(compute)[..., None] if scores.sinks.dim() == 3 else scores.sinks.to(compute)[:, None, None]
        )
        top = torch.maximum(top, sink)
    top = torch.where(top == float("-inf"), 0.0, top)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    lse = (top + total.log()).squeeze(-1)
    weights = torch.where(total == 0, 0.0, weights / total)

    # 0 * inf would carry a hidden value to rows that do not see it, so non-finite values are added by sight.
    out = weights @ torch.where(values.isfinite(), values, 0.0)
    sight = visible.to(compute)
    for sign in (float("inf"), float("-inf")):
        reached = sight @ ((values == sign) | values.isnan()).to(compute)
        out = out + torch.where(reached > 0, sign, 0.0)
    return out.to(q.dtype), lse


def block_scores_reference(
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
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled scores float64, and bool masks of the allowed and the always-kept blocks, each [B, H, nq, nkv].

    A block's score is the mean of its queries dotted with the mean of its keys, times ``scale``; tokens of segment -1
    are left out of the means. A block is allowed iff any pair in it is visible, and ``blocks`` (bool [B or 1, H or 1,
    nq, nkv]), if given, has it. Always kept, where allowed: the first
    allowed block of the row, the block at the position of the row's last query, and the one before it.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    q_blocks, kv_blocks = -(-q_len // q_block), -(-kv_len // kv_block)
    seen = visible_pairs(
        q_len,
        kv_len,
        left=left,
        right=right,
        offset=offset,
        q_segments=q_segments,
        kv_segments=kv_segments,
        batch=batch,
        device=q.device,
    )
    allowed = torch.zeros(batch, heads, q_blocks, kv_blocks, dtype=torch.bool, device=q.device)
    kept = torch.zeros_like(allowed)
    for row in range(q_blocks):
        rows = slice(row * q_block, (row + 1) * q_block)
        for column in range(kv_blocks):
            columns = slice(column * kv_block, (column + 1) * kv_block)
            allowed[:, :, row, column] = seen[:, rows, columns].flatten(1).any(1)[:, None]
        if blocks is not None:
            allowed[:, :, row] &= blocks[:, :, row].bool()
        diagonal = (min((row + 1) * q_block, q_len) - 1 + offset) // kv_block
        for item, head in product(range(batch), range(heads)):
            forced = {diagonal - 1, diagonal} | set(allowed[item, head, row].nonzero().flatten().tolist()[:1])
            for column in forced:
                if 0 <= column < kv_blocks and allowed[item, head, row, column]:
                    kept[item, head, row, column] = True

    queries = _block_means(q, None if kv_segments is None else q_segments, q_block)
    keys = _block_means(k, kv_segments, kv_block).repeat_interleave(heads // k.shape[1], dim=1)
    scores = queries @ keys.transpose(-1, -2) * scale
    return scores, allowed, kept


def _block_means(x: Tensor, segments: Tensor | None, block: int) -> Tensor:
    """Means over blocks of tokens, float64 [B, H, blocks, D], without tokens of segment -1 (0 if none is left)."""
    means = []
    for start in range(0, x.shape[2], block):
        tokens = x[:, :, start : start + block].double()
        if segments is None:
            means.append(tokens.mean(2))
            continue
        used = (segments[:, start : start + block] != -1)[:, None, :, None]
        means.append(torch.where(used, tokens, 0.0).sum(2) / used.sum(2).clamp(min=1))
    return torch.stack(means, dim=2)


def select_blocks_reference(
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
    last: int = 0,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled block top-k (The Sparse Frontier, arXiv 2504.17768): (kv_num_blocks, kv_indices), unused entries 0.

    The budget of a head is the smallest ``b`` such that keeping at most ``b`` band-visible blocks per row reaches
    ``density`` (a share, or a tensor [B or 1, H] of shares) of all band-visible blocks; with a map ``blocks``, of the
    head's own visible ones. A row keeps its always-kept
    blocks and then the best scores up to the budget, ties to the lower index, NaN last. The ``last`` rows keep all.
    """
    batch, heads = q.shape[:2]
    scores, allowed, kept = block_scores_reference(
        q,
        k,
        scale=scale,
        left=left,
        right=right,
        offset=offset,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_block=q_block,
        kv_block=kv_block,
        blocks=blocks,
    )
    q_blocks, kv_blocks = scores.shape[2:]
    _, band, _ = block_scores_reference(
        q[:1, :1],
        k[:1, :1],
        scale=scale,
        left=left,
        right=right,
        offset=offset,
        q_segments=None,
        kv_segments=None,
        q_block=q_block,
        kv_block=kv_block,
    )
    shares = torch.as_tensor(density, dtype=torch.float64).expand(batch, heads)
    lists: list[list[int]] = []
    widest = 1
    for item, head in product(range(batch), range(heads)):
        visible = (band[0, 0] if blocks is None else allowed[item, head]).sum(-1)
        wanted = min(float(shares[item, head]), 1.0) * int(visible.sum())
        budget = next(b for b in range(kv_blocks + 1) if int(visible.clamp(max=b).sum()) >= wanted)
        widest = max(widest, kv_blocks if last else min(kv_blocks, max(budget, 3)))
        for row in range(q_blocks):
            score = scores[item, head, row].tolist()
            candidates = allowed[item, head, row].nonzero().flatten().tolist()
            forced = kept[item, head, row].nonzero().flatten().tolist()
            ranked = sorted(
                (-score[c] if score[c] == score[c] else float("inf"), c) for c in candidates if c not in forced
            )
            room = max(0, min(budget, len(candidates)) - len(forced))
            if q_blocks - row <= last:
                room = len(ranked)
            lists.append(sorted(forced + [c for _, c in ranked[:room]]))
    kv_num_blocks = torch.tensor([len(x) for x in lists], dtype=torch.int32, device=q.device)
    padded = torch.tensor([x + [0] * (widest - len(x)) for x in lists], dtype=torch.int32, device=q.device)
    return kv_num_blocks.view(batch, heads, q_blocks), padded.view(batch, heads, q_blocks, widest)
