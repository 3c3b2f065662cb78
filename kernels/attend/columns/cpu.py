"""Attention over single keys ("columns") on the CPU in torch operations, continuing a block-sparse attention's result.

Keys and values are gathered once for every list of columns; each group of query rows that shares the list then takes
one product, one masked softmax continued from the given log-sum-exp, and a second product. What the block attention
computed enters as one more key whose score is its log-sum-exp and whose value is its output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsepass.kernels.scores import Scores, change_pairs, check_scores

_SCORES = 1 << 20
"""Scores held at once: 4 MiB in fp32."""


@torch.no_grad()
def attend_columns_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    column_num: Tensor,
    column_indices: Tensor,
    out: Tensor,
    lse: Tensor,
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
    blocks: Tensor | None = None,
    counter: Tensor | None = None,
) -> None:
    """As ``columns_triton.attend_columns_cuda``: ``out`` [B, H, Sq, Dv] and ``lse`` [B, H, Sq] change in place.

    q [B, H, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], fp16, bf16, fp32 or fp64, any strides;
    ``column_num`` int32 [B or 1, H or 1, nq or 1] and ``column_indices`` [..., width] ascending.
    """
    scores = check_scores(scores, q, k)
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    rows = -(-q_len // q_block)
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    taken = _listed(kv_num_blocks, kv_indices, -(-kv_len // kv_block))
    filled = 0
    for item in range(batch):
        own = None if kv_segments is None else kv_segments[item].long()
        mine = None
        if own is not None:
            mine = own.new_zeros(q_len) if q_segments is None else q_segments[item].long()
        for head in range(heads):
            num = column_num[item % column_num.shape[0], head % column_num.shape[1]].tolist()
            lists = column_indices[item % column_indices.shape[0], head % column_indices.shape[1]]
            listed = taken[item % taken.shape[0], head % taken.shape[1]]
            source = head * kv_heads // heads
            for low, high, which in _groups(num, rows):
                columns = lists[which, : num[which]].long()
                columns = columns[(columns >= 0) & (columns < kv_len)]
                if own is not None:
                    columns = columns[own[columns] != -1]
                if not len(columns):
                    continue
                keys = k[item, source].index_select(0, columns).to(work)
                values = v[item, source].index_select(0, columns).to(work)
                step = max(1, _SCORES // (len(columns) * q_block))
                for first in range(low, high, step):
                    last = min(first + step, high)
                    tokens = slice(first * q_block, min(last * q_block, q_len))
                    position = torch.arange(tokens.start, tokens.stop) + offset
                    begin, end = 0, len(columns)
                    if right >= 0:
                        end = int(torch.searchsorted(columns, position[-1:] + right, right=True))
                    if left >= 0:
                        begin = int(torch.searchsorted(columns, position[:1] - left))
                    if begin >= end:
                        continue
                    part = columns[begin:end]
                    seen = ~listed[first:last, part // kv_block].repeat_interleave(q_block, 0)[: len(position)]
                    if right >= 0:
                        seen &= part <= position[:, None] + right
                    if left >= 0:
                        seen &= part >= position[:, None] - left
                    if own is not None and mine is not None:
                        seen &= own[part] == mine[tokens][:, None]
                    raw = q[item, head, tokens].to(work) * scale @ keys[begin:end].T
                    if scores is not None:
                        raw, shown = change_pairs(raw, scores, item, head, tokens, part, offset)
                        seen &= shown
                    if counter is not None:
                        per_row = torch.stack([rows_seen.any(0).sum() for rows_seen in seen.split(q_block)])
                        filled += int((-(-per_row // kv_block)).sum())
                    _continue(
                        out[item, head, tokens],
                        lse[item, head, tokens],
                        raw,
                        values[begin:end],
                        seen,
                    )
    if counter is not None:
        counter[1] += filled


def _groups(num: list[int], rows: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of rows that share a list of columns, and which list that is."""
    if len(num) == 1:
        yield 0, rows, 0
        return
    for row in range(rows):
        yield row, row + 1, row


def _listed(kv_num_blocks: Tensor, kv_indices: Tensor, blocks: int) -> Tensor:
    """Bool [B or 1, H or 1, nq, blocks]: the blocks that each row lists."""
    used = torch.arange(kv_indices.shape[3]) < kv_num_blocks[..., None]
    held = torch.zeros(*kv_num_blocks.shape, blocks + 1, dtype=torch.bool)
    return held.scatter_(-1, torch.where(used, kv_indices.long(), blocks), True)[..., :blocks]


def _continue(out: Tensor, lse: Tensor, scores: Tensor, values: Tensor, seen: Tensor) -> None:
    """Fold scores [R, n] with values [n, Dv] into out [R, Dv] and lse [R], where ``seen`` [R, n]."""
    whole = bool(seen.all())
    if not whole:
        scores = scores.masked_fill(~seen, -torch.inf)
    before = lse.to(scores.dtype)
    top = torch.maximum(scores.amax(-1), before)  # NaN stays NaN
    top = top.masked_fill(top == -torch.inf, 0.0)
    kept = torch.exp(before - top)
    weights = scores.sub_(top[:, None]).exp_()
    total = weights.sum(-1) + kept
    finite = values.isfinite()
    sound = bool(finite.all())
    new = weights @ (values if sound or whole else torch.where(finite, values, 0.0))
    earlier = out.to(scores.dtype)
    new = (new + torch.where(kept[:, None] == 0, 0.0, earlier * kept[:, None])) / torch.where(total == 0, 1.0, total)[
        :, None
    ]
    if not sound and not whole:
        for sign in (torch.inf, -torch.inf):
            reached = seen.to(values.dtype) @ ((values == sign) | values.isnan()).to(values.dtype)
            new = new + torch.where(reached > 0, sign, 0.0)
    bad = ~earlier.isfinite()
    out.copy_(torch.where(bad, earlier + new, new))
    lse.copy_(top + total.log())
