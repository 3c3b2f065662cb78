"""What share of its attention mass each of a few sampled queries kept: exp(lse over what was computed - exact lse).

The exact log-sum-exp of a row is one product of a query with every key, so a few rows cost next to nothing. The rows
are fixed by shapes alone and nothing synchronizes with the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.scores import Scores, hidden_at_most
from sparsepass.kernels.types import Visible

STEP = 40503
"""Of a 16-bit Weyl sequence: it moves each sampled row inside its stretch, off the edges of blocks."""

LEAST_KEYS = 256
"""Keys that are looked at together however many rows there are."""

_CHUNK_BYTES = {"cuda": 1 << 28, "cpu": 1 << 25}


def sampled_rows(q_len: int, count: int, device: torch.device) -> Tensor:
    """int64 [count] row numbers, ascending, one in each of ``count`` equal stretches; the last is the last row.

    The question of a prompt is at its end, so that row is always there. Rows repeat where there are fewer than asked.
    """
    number = torch.arange(count, device=device)
    row = ((number << 16) + (number * STEP & 65535)) * q_len // (count << 16)
    return torch.where(number == count - 1, q_len - 1, row)


def exact_lse(
    query: Tensor, key: Tensor, rows: Tensor, *, scale: float, visible: Visible, scores: Scores | None = None
) -> Tensor:
    """Log-sum-exp of all visible scores of some rows, without a sink, [B, H, R]: float64 for float64, else float32.

    query [B, H, Sq, D] and key [B, Hkv, Skv, D] of one floating type; ``rows`` int64 [R] on their device. ``scores``:
    what happens to the scores before the softmax (``dispatch.Scores``), or None. A row that sees nothing gives -inf.
    Works on some of the keys at a time, in torch operations on any device.
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, _, size = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    group, count = heads // kv_heads, rows.shape[0]
    sampled = query.index_select(2, rows).to(wide).reshape(batch, kv_heads, group * count, size)
    per_key = batch * heads * count * wide.itemsize
    chunk = max(LEAST_KEYS, _CHUNK_BYTES.get(query.device.type, _CHUNK_BYTES["cpu"]) // per_key)
    parts = []
    for start in range(0, kv_len, chunk):
        keys = key[:, :, start : start + chunk].to(wide)
        found = (sampled @ keys.transpose(2, 3)).mul_(scale).view(batch, heads, count, -1)
        stop = start + keys.shape[2]
        if scores is not None:
            found = _with_terms(found, scores, rows, visible.offset, start, stop)
        hidden = _hidden(visible, rows, start, stop, query.device)
        parts.append(found.masked_fill(hidden, -torch.inf).logsumexp(3))
    return torch.stack(parts).logsumexp(0)


def kept_mass(
    query: Tensor, key: Tensor, lse: Tensor, *, count: int, scale: float, visible: Visible, scores: Scores | None = None
) -> Tensor:
    """Share of the attention mass kept in ``count`` sampled rows, float32 [B, H, count], NaN where a row sees nothing.

    ``lse`` float32 [B, H, Sq]: what ``block_sparse_attention`` returned for this query and key. Otherwise as
    ``exact_lse``.
    """
    scores = None if scores is None or not scores.given else scores
    if query.device.type == "cuda" and scores is None and query.dtype != torch.float64:
        from sparsepass.kernels.mass.triton import kept_mass_cuda

        return kept_mass_cuda(query, key, lse, count=count, scale=scale, **_band(visible))
    rows = sampled_rows(query.shape[2], count, query.device)
    exact = exact_lse(query, key, rows, scale=scale, visible=visible, scores=scores)
    sinks = None if scores is None else scores.sinks
    if sinks is not None:
        sinks = sinks[:, None] if sinks.dim() == 1 else _part(sinks[..., None], rows, 0, 1)[..., 0]
    whole = exact if sinks is None else torch.logaddexp(exact, sinks.to(exact.dtype))
    kept = (lse.index_select(2, rows).to(exact.dtype) - whole).exp().clamp(max=1.0)  # rounding may pass 1
    return torch.where(exact == -torch.inf, torch.nan, kept).float()


def _band(visible: Visible) -> dict[str, Any]:
    names = ("left", "right", "offset", "q_segments", "kv_segments")
    return {name: getattr(visible, name) for name in names}


def _hidden(visible: Visible, rows: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """Bool [B or 1, 1, R, stop - start]: pairs that band or segments hide."""
    place = (rows + visible.offset)[:, None]
    keys = torch.arange(start, stop, device=device)
    seen = torch.ones(rows.shape[0], stop - start, dtype=torch.bool, device=device)
    if visible.left >= 0:
        seen &= keys >= place - visible.left
    if visible.right >= 0:
        seen &= keys <= place + visible.right
    seen = seen[None]
    if visible.kv_segments is not None:
        theirs = visible.kv_segments[:, None, start:stop]
        own = visible.q_segments
        mine = theirs.new_zeros(()) if own is None else own.index_select(1, rows)[:, :, None]
        seen = seen & (theirs == mine) & (theirs != -1)
    return ~seen[:, None]


def _with_terms(found: Tensor, scores: Scores, rows: Tensor, offset: int, start: int, stop: int) -> Tensor:
    """Scores [B, H, R, keys] after soft capping, slopes, bias and mask, in that order."""
    if scores.softcap is not None:
        found = torch.tanh(found / scores.softcap) * scores.softcap
    if scores.slopes is not None:
        distance = torch.arange(start, stop, device=rows.device) - (rows + offset)[:, None]
        found = found + scores.slopes.to(found.dtype)[..., None, None] * distance
    if scores.bias is not None:
        bias = _part(scores.bias, rows, start, stop)
        hidden = bias <= hidden_at_most(bias.dtype)
        found = (found + bias.to(found.dtype)).masked_fill(hidden, -torch.inf)
    if scores.mask is not None:
        found = found.masked_fill(~_part(scores.mask, rows, start, stop), -torch.inf)
    return found


def _part(term: Tensor, rows: Tensor, start: int, stop: int) -> Tensor:
    """The sampled rows and some of the keys of a term [B or 1, H or 1, Sq or 1, Skv or 1]."""
    if term.shape[2] != 1:
        term = term.index_select(2, rows)
    return term if term.shape[3] == 1 else term[..., start:stop]
