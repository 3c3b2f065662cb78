"""Selection by a score and a rule on the CPU, in torch operations: one product per head and chunk of rows.

Scores and rules are those of ``kernels/select/rule.py``; conventions of shapes and masks:
``kernels/attend/reference.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu.visible import PADDING, UNBOUNDED, Visibility
from sparsepass.kernels.scores import check_blocks
from sparsepass.kernels.select.cpu.topk import allowed_blocks, block_means, unlike_blocks
from sparsepass.kernels.select.rule import Rule, check_rule, dial_tensor

_SCORES = 1 << 19
"""Scores held at once, by head: 2 MiB of float32, which stay in the cache between the passes over them."""


def _tokens(x: Tensor, segments: Tensor | None) -> Tensor:
    """One head's tokens [S, D] in float32, those of segment -1 as zeros."""
    x = x.to(torch.float32)
    return x if segments is None else torch.where((segments != PADDING)[:, None], x, 0.0)


def _log_mass(scores: Tensor, block: int) -> Tensor:
    """log sum exp over blocks of columns: [n, columns] to [blocks, n]; overwrites ``scores``."""
    missing = -scores.shape[1] % block
    if missing:
        scores = torch.constant_pad_nd(scores, (0, missing), value=-math.inf)
    scores = scores.reshape(scores.shape[0], -1, block)
    top = scores.amax(-1, keepdim=True)
    finite = torch.where(top == -math.inf, 0.0, top)
    return (scores.sub_(finite).exp_().sum(-1).log_() + finite[..., 0]).mT


def _high_block(mask: Visibility, last_row: int) -> int:
    """First key block that the band hides from all rows up to ``last_row``."""
    if mask.right == UNBOUNDED:
        return mask.kv_blocks
    last_key = last_row + mask.offset + mask.right
    return max(0, min(mask.kv_blocks, last_key // mask.kv_block + 1))


def _mass_scores(q: Tensor, k: Tensor, mask: Visibility, scale: float) -> Tensor:
    batch, heads, q_len, _ = q.shape
    group = heads // k.shape[1]
    # Rounded as the inputs are, which is what the matrix units of other devices see.
    means = block_means(k, mask.kv_block, mask.kv_segments).to(q.dtype).float() * scale
    scores = torch.full((batch, heads, mask.q_blocks, mask.kv_blocks), -math.inf)
    last_key = (((torch.arange(mask.kv_blocks) + 1) * mask.kv_block).clamp(max=mask.kv_len) - 1)[:, None]
    chunk = max(1, min(8, _SCORES // mask.kv_blocks // mask.q_block))
    for item in range(batch):
        for begin in range(0, mask.q_blocks, chunk):
            rows = slice(begin * mask.q_block, min((begin + chunk) * mask.q_block, q_len))
            blocks = _high_block(mask, rows.stop - 1)
            if blocks == 0:
                continue
            position = torch.arange(rows.start, rows.stop) + mask.offset
            hidden = torch.zeros(blocks, len(position), dtype=torch.bool)
            if mask.right != UNBOUNDED:
                hidden |= last_key[:blocks] > position + mask.right
            if mask.left != UNBOUNDED:
                hidden |= last_key[:blocks] < position - mask.left
            if mask.kv_segments is not None:
                low, high = _fold_ranges(mask.kv_segments[item : item + 1], mask.kv_block)
                segment = torch.zeros(1, 1) if mask.q_segments is None else mask.q_segments[item, rows]
                hidden |= (segment < low[0, :blocks, None]) | (segment > high[0, :blocks, None]) | (segment == PADDING)
            some = hidden.any(1).nonzero().flatten()
            # Under a causal mask only the last few blocks hide anything: the others are not passed over for it.
            edge = slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0, 0)
            for head in range(heads):
                found = torch.mm(means[item, head // group, :blocks], q[item, head, rows].float().mT)
                found[edge].masked_fill_(hidden[edge], -math.inf)
                part = _log_mass(found, mask.q_block)
                scores[item, head, begin : begin + len(part), :blocks] = part
    return scores


def _antidiagonal_scores(q: Tensor, k: Tensor, mask: Visibility, scale: float, stride: int) -> Tensor:
    batch, heads, q_len, dim = q.shape
    group, kv_len = heads // k.shape[1], k.shape[2]
    # The same mask over folds: which folds hold a visible pair is asked as for blocks.
    folds = Visibility(
        q_len, kv_len, stride, stride, mask.left, mask.right, mask.offset, mask.q_segments, mask.kv_segments
    )
    every, of_block = folds.kv_blocks, mask.kv_block // stride
    scores = torch.full((batch, heads, mask.q_blocks, mask.kv_blocks), -math.inf)
    per_block = mask.q_block // stride
    chunk = max(1, _SCORES // every // per_block) * per_block
    kv_ranges = None if mask.kv_segments is None else _fold_ranges(mask.kv_segments, stride)
    q_ranges = None if mask.kv_segments is None or mask.q_segments is None else _fold_ranges(mask.q_segments, stride)
    for item in range(batch):
        q_segments = None if mask.kv_segments is None or mask.q_segments is None else mask.q_segments[item]
        kv_segments = None if mask.kv_segments is None else mask.kv_segments[item]
        folded: dict[int, Tensor] = {}
        for begin in range(0, folds.q_blocks, chunk):
            end = min(begin + chunk, folds.q_blocks)
            seen = _high_block(folds, min(end * stride, q_len) - 1)
            if seen == 0:
                continue
            hidden = ~folds.band_any(torch.arange(begin, end)[:, None], torch.arange(seen)[None, :])
            if kv_ranges is not None:
                low, high = (x[item, :seen] for x in kv_ranges)
                if q_ranges is None:
                    hidden |= (low > 0) | (high < 0)
                else:
                    first, last = (x[item, begin:end, None] for x in q_ranges)
                    hidden |= (first > high) | (low > last) | (last == PADDING)
                hidden |= high == PADDING
            blind = hidden.all(1, keepdim=True) if bool(hidden.all(1).any()) else None
            for head in range(heads):
                if head // group not in folded:
                    keys = _folds(_tokens(k[item, head // group], kv_segments), stride).view(-1, stride, dim)
                    # The keys' order is reversed in place of the queries': the sums are the same, the heads fewer.
                    folded = {head // group: (keys.flip(1) * (scale / stride)).reshape(-1, stride * dim)}
                rows = slice(begin * stride, min(end * stride, q_len))
                tokens = _tokens(q[item, head, rows], None if q_segments is None else q_segments[rows])
                found = torch.mm(_folds(tokens, stride), folded[head // group][:seen].mT)
                shares = found.masked_fill_(hidden, -math.inf).softmax(-1)
                if blind is not None:
                    shares.masked_fill_(blind, 0.0)
                shares = torch.constant_pad_nd(shares, (0, -seen % of_block))
                shares = shares.view(len(shares), -1, of_block).sum(-1)
                missing = -len(shares) % per_block
                if missing:
                    shares = torch.constant_pad_nd(shares, (0, 0, 0, missing))
                part = shares.view(-1, per_block, shares.shape[1]).sum(1).log()
                at = begin // per_block
                scores[item, head, at : at + len(part), : part.shape[1]] = part
    return scores


def _folds(tokens: Tensor, stride: int) -> Tensor:
    """[S, D] to [folds, stride * D], the end filled up with zeros."""
    tokens = torch.constant_pad_nd(tokens, (0, 0, 0, -tokens.shape[0] % stride))
    return tokens.reshape(-1, stride * tokens.shape[1])


def _fold_ranges(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest segment [B, folds] of each ``size`` tokens; a short end is filled up by its last token."""
    missing = -segments.shape[1] % size
    full = torch.cat([segments, segments[:, -1:].expand(-1, missing)], 1).view(segments.shape[0], -1, size)
    return full.amin(-1), full.amax(-1)


def _dials(rule: Rule, dial: Tensor | None) -> Tensor:
    """Dials that count, float64 [B or 1, H or 1, 1, 1]: never costlier than the rule's own, which NaN stands for."""
    cap = torch.tensor([[float(rule.dial)]], dtype=torch.float64)
    if dial is not None:
        given = dial.to("cpu", torch.float64)
        cheaper = given > cap if rule.keep == "threshold" else given < cap
        cap = torch.where(cheaper, given, cap)
    return cap[:, :, None, None]


def _by_scores(rule: Rule, dials: Tensor, scores: Tensor, allowed: Tensor, listed: Tensor) -> Tensor:
    """``listed`` and what the rule takes of the other allowed blocks, bool [B, H, nq, nkv]."""
    scores = torch.where(allowed, scores, -math.inf).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    top = scores.amax(-1, keepdim=True)
    unscored = top == -math.inf
    if rule.keep == "threshold":
        everything = (dials <= 0) | unscored
        least = top + torch.where(dials <= 0, 1.0, dials).log().to(scores.dtype)
        return listed | (allowed & ((scores >= least) | everything))
    mass = torch.where(scores == top, 1.0, (scores - torch.where(unscored, 0.0, top)).exp()).double()
    mass.masked_fill_(unscored | ~allowed, 0.0)
    needed = dials * mass.sum(-1, keepdim=True) - torch.where(listed, mass, 0.0).sum(-1, keepdim=True)
    free = allowed & ~listed
    order = torch.where(free, scores, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    ranked = torch.where(free, mass, 0.0).gather(-1, order)
    taken = (ranked.cumsum(-1) - ranked < needed) & (needed > 0)
    taken = torch.zeros_like(taken).scatter_(-1, order, taken)
    return listed | (free & taken) | (allowed & ((dials >= 1) | unscored))


def _lists(chosen: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts and ascending indices (int32, unused entries 0) of a map bool [B, H, nq, nkv]."""
    place = torch.where(chosen, chosen.cumsum(-1) - 1, width)
    column = torch.arange(chosen.shape[-1], dtype=torch.int32).expand(chosen.shape)
    lists = torch.zeros(*chosen.shape[:-1], width + 1, dtype=torch.int32).scatter_(-1, place, column)
    return chosen.sum(-1).to(torch.int32), lists[..., :width].contiguous()


@torch.no_grad()
def select_scored_cpu(
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
    rule: Rule,
    dial: Tensor | None = None,
    blocks: Tensor | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Block lists by ``rule``: as ``select_scored_cuda``, for CPU tensors."""
    check_rule(rule, q_block, kv_block)
    batch, heads, q_len, _ = q.shape
    dial = dial_tensor(dial, batch, heads)
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    mask = Visibility(q_len, k.shape[2], q_block, kv_block, left, right, offset, q_segments, kv_segments, blocks)
    allowed = allowed_blocks(mask, batch)
    dials = _dials(rule, dial)

    row, column = torch.arange(mask.q_blocks)[:, None], torch.arange(mask.kv_blocks)
    first, last = row * q_block + offset, ((row + 1) * q_block).clamp(max=q_len) - 1 + offset
    listed = allowed & (allowed.cumsum(-1) <= rule.sink_blocks(kv_block))
    if rule.keep == "window":
        tokens = dials.clamp(min=1).floor().long()
        near = ((column + 1) * kv_block > first - tokens + 1) & (column * kv_block <= last + tokens - 1)
    else:
        diagonal = torch.div(last, kv_block, rounding_mode="floor")
        near = (column <= diagonal) & (column > diagonal - rule.window)
    listed = listed | (allowed & (near | (row >= mask.q_blocks - rule.last)))
    if rule.self_similarity is not None:
        unlike = unlike_blocks(k, kv_block, kv_segments, rule.self_similarity)
        listed = listed | (allowed & unlike.repeat_interleave(heads // k.shape[1], 1)[:, :, None])
        if rule.score == "pooled":
            of_rows = unlike_blocks(q, q_block, None if kv_segments is None else q_segments, rule.self_similarity)
            listed = listed | (allowed & of_rows[..., None])
    if rule.score is not None:
        if rule.score == "pooled":
            queries = block_means(q, q_block, None if kv_segments is None else q_segments)
            keys = block_means(k, kv_block, kv_segments)
            grouped = queries.unflatten(1, (k.shape[1], -1))
            scores = (grouped @ keys[:, :, None].mT).flatten(1, 2) * scale
        elif rule.score == "mass":
            scores = _mass_scores(q, k, mask, scale)
        else:
            scores = _antidiagonal_scores(q, k, mask, scale, rule.stride)
        listed = _by_scores(rule, dials, scores, allowed, listed)
    if counter is not None:
        counter[2] += allowed.expand(batch, heads, -1, -1).sum()
    return _lists(listed, rule.width(q_block, kv_block, mask.kv_blocks))
