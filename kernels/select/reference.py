"""Eager definitions of the scores and rules of ``kernels/select/rule.py``: plain, float64, sharing no code with the
kernels.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.attend.reference import block_scores_reference
from sparsepass.kernels.select.rule import Rule


def self_similarity_reference(x: Tensor, segments: Tensor | None, block: int) -> Tensor:
    """Mean cosine of all pairs of tokens in a block, itself included: float64 [B, H, blocks] (SpargeAttn, 2502.18137).

    Tokens of segment -1 are left out; a block without any other gives 0.
    """
    batch, heads, length, _ = x.shape
    found = torch.zeros(batch, heads, -(-length // block), dtype=torch.float64)
    for item in range(batch):
        for index, start in enumerate(range(0, length, block)):
            tokens = x[item, :, start : start + block].double().cpu()
            if segments is not None:
                tokens = tokens[:, (segments[item, start : start + block] != -1).cpu()]
            if tokens.shape[1]:
                cosines = torch.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1, eps=1e-30)
                found[item, :, index] = cosines.mean((1, 2))
    return found.to(x.device)


def block_logits_reference(
    q: Tensor,
    k: Tensor,
    *,
    score: str,
    stride: int,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
) -> Tensor:
    """Scores float64 [B, H, nq, nkv] of every block, -inf where nothing scores it. Their softmax is the row's mass.

    ``pooled``: mean query . mean key * scale.
    ``mass``: log sum over queries of exp(query . mean key * scale). A query counts for a block if no key of the block
    lies ahead of what its band shows, one lies within, and its segment is between the block's least and greatest.
    ``antidiagonal``: folds of ``stride`` tokens, scored by the sum of q[stride - 1 - t] . k[t] over t, times scale /
    stride; softmax over a folded query's row; log of the mass summed per block. Two folds count for each other if the
    band shows any pair of them, their ranges of segments meet and neither is padding alone.
    """
    mask: dict[str, Any] = {"left": left, "right": right, "offset": offset}
    batch, heads, q_len, _ = q.shape
    kv_len, group = k.shape[2], heads // k.shape[1]
    if score == "pooled":
        mask |= {"q_block": q_block, "kv_block": kv_block, "q_segments": q_segments, "kv_segments": kv_segments}
        return block_scores_reference(q, k, scale=scale, **mask)[0]
    if kv_segments is None:
        kv_of, q_of = torch.zeros(batch, kv_len), torch.zeros(batch, q_len)
    else:
        kv_of = kv_segments.cpu()
        q_of = torch.zeros(batch, q_len) if q_segments is None else q_segments.cpu()
    step = kv_block if score == "mass" else stride
    logits = torch.full((batch, heads, -(-q_len // q_block), -(-kv_len // kv_block)), -math.inf, dtype=torch.float64)
    for item in range(batch):
        keys = [kv_of[item, start : start + step] for start in range(0, kv_len, step)]
        low = torch.tensor([float(part.min()) for part in keys])
        high = torch.tensor([float(part.max()) for part in keys])
        first_key = torch.arange(len(keys)) * step
        last_key = (first_key + step).clamp(max=kv_len) - 1
        for head in range(heads):
            query, key = q[item, head].double().cpu(), k[item, head // group].double().cpu()
            if score == "mass":
                position = torch.arange(q_len)[:, None] + offset
                seen = torch.ones(q_len, len(keys), dtype=torch.bool)
                if right >= 0:
                    seen &= last_key <= position + right
                if left >= 0:
                    seen &= last_key >= position - left
                segment = q_of[item][:, None]
                seen &= (segment >= low) & (segment <= high) & (segment != -1)
                means = []
                for index, start in enumerate(range(0, kv_len, step)):
                    means.append(_mean(key[start : start + step][keys[index] != -1]))
                found = (query @ torch.stack(means).mT * scale).masked_fill(~seen, -math.inf)
                for row in range(logits.shape[2]):
                    logits[item, head, row] = found[row * q_block : (row + 1) * q_block].logsumexp(0)
                continue
            parts = [q_of[item, start : start + step] for start in range(0, q_len, step)]
            q_low = torch.tensor([float(part.min()) for part in parts])[:, None]
            q_high = torch.tensor([float(part.max()) for part in parts])[:, None]
            first = (torch.arange(len(parts)) * step + offset)[:, None]
            last = first - offset + step
            last = last.clamp(max=q_len) - 1 + offset
            seen = (q_low <= high) & (low <= q_high) & (high != -1) & (q_high != -1)
            if right >= 0:
                seen &= first_key <= last + right
            if left >= 0:
                seen &= last_key >= first - left
            query = torch.where((q_of[item] == -1)[:, None], 0.0, query)
            key = torch.where((kv_of[item] == -1)[:, None], 0.0, key)
            folded_q = torch.constant_pad_nd(query, (0, 0, 0, -q_len % step)).unflatten(0, (-1, step)).flip(1)
            folded_k = torch.constant_pad_nd(key, (0, 0, 0, -kv_len % step)).unflatten(0, (-1, step))
            found = torch.einsum("itd,jtd->ij", folded_q, folded_k) * scale / step
            shares = found.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
            for row in range(logits.shape[2]):
                rows = shares[row * q_block // step : (row + 1) * q_block // step]
                for column in range(logits.shape[3]):
                    columns = slice(column * kv_block // step, (column + 1) * kv_block // step)
                    logits[item, head, row, column] = rows[:, columns].sum().log()
    return logits.to(q.device)


def _mean(tokens: Tensor) -> Tensor:
    return tokens.sum(0) / max(1, len(tokens))


def always_listed_reference(
    q: Tensor, k: Tensor, *, rule: Rule, dial: Tensor | None = None, **mask: Any
) -> tuple[Tensor, Tensor]:
    """Bool [B, H, nq, nkv]: the blocks that a rule lists whatever the scores, and those that the mask allows."""
    _, allowed, _ = block_scores_reference(q, k, **mask)
    batch, heads, rows, columns = allowed.shape
    q_block, kv_block, offset = mask["q_block"], mask["kv_block"], mask["offset"]
    row = torch.arange(rows, device=q.device)[:, None]
    column = torch.arange(columns, device=q.device)
    first, last = row * q_block + offset, ((row + 1) * q_block).clamp(max=q.shape[2]) - 1 + offset
    sink = -(-rule.sink // kv_block) if rule.sink_in_tokens else rule.sink
    listed = allowed.cumsum(-1) <= sink
    if rule.keep == "window":
        tokens = torch.full((batch, heads), float(rule.dial), dtype=torch.float64)
        if dial is not None:
            tokens = torch.minimum(tokens, dial.double().cpu().expand(batch, heads).nan_to_num(rule.dial))
        tokens = tokens.clamp(min=1).floor().to(q.device)[:, :, None, None]
        listed = listed | (((column + 1) * kv_block - 1 > first - tokens) & (column * kv_block < last + tokens))
    else:
        diagonal = torch.div(last, kv_block, rounding_mode="floor")
        listed = listed | ((column <= diagonal) & (column > diagonal - rule.window))
    listed = listed | (row >= rows - rule.last)
    if rule.self_similarity is not None:
        segments = mask["kv_segments"]
        unlike = self_similarity_reference(k, segments, kv_block) < rule.self_similarity
        listed = listed | unlike.repeat_interleave(heads // k.shape[1], 1)[:, :, None]
        if rule.score == "pooled":
            of_rows = self_similarity_reference(q, None if segments is None else mask["q_segments"], q_block)
            listed = listed | (of_rows < rule.self_similarity)[..., None]
    return listed & allowed, allowed


def select_scored_reference(
    q: Tensor, k: Tensor, *, rule: Rule, dial: Tensor | None = None, logits: Tensor | None = None, **mask: Any
) -> Tensor:
    """Bool [B, H, nq, nkv]: the blocks that ``rule`` lists. ``logits`` may replace the scores it asks for.

    ``threshold``: those whose exp(score) is at least the dial times the row's largest. ``coverage``: the fewest, best
    first and ties to the lower index, whose softmax together with that of the always listed blocks reaches the dial.
    A row without any score lists all it may; NaN scores nothing.
    """
    listed, allowed = always_listed_reference(q, k, rule=rule, dial=dial, **mask)
    if rule.keep == "window":
        return listed
    if logits is None:
        logits = block_logits_reference(q, k, score=str(rule.score), stride=rule.stride, **mask)
    logits = torch.where(allowed & ~logits.isnan(), logits.double(), -math.inf).cpu()
    chosen = listed.cpu().clone()
    allowed = allowed.cpu()
    batch, heads, rows, _ = logits.shape
    for item, head, row in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, rows))).tolist():
        line, open_ = logits[item, head, row], allowed[item, head, row]
        own = rule.dial
        if dial is not None:
            given = float(dial.expand(batch, heads)[item, head])
            costs_less = given > own if rule.keep == "threshold" else given < own
            own = given if costs_less else own
        top = float(line.max())
        if top == -math.inf or (own <= 0 if rule.keep == "threshold" else own >= 1):
            chosen[item, head, row] = open_
            continue
        if rule.keep == "threshold":
            chosen[item, head, row] |= open_ & (line >= top + math.log(own))
            continue
        mass = torch.where(line == top, 1.0, (line - top).exp())
        need = own * float(mass[open_].sum())
        held = float(mass[chosen[item, head, row]].sum())
        free = [c for c in open_.nonzero().flatten().tolist() if not chosen[item, head, row, c]]
        for column in sorted(free, key=lambda c: (-float(line[c]), c)):
            if held >= need:
                break
            held += float(mass[column])
            chosen[item, head, row, column] = True
    return chosen.to(q.device)
