"""A plain tiled attention kernel in torch with one switch per mistake, to see that the kit finds each of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FAULTS = {
    "wrong scale": "scores are multiplied by scale twice over head_dim^0.5",
    "missing diagonal mask": "keys after the query are seen inside a listed block",
    "missing window edge": "the window is one key too wide",
    "offset ignored": "query row i stands at i",
    "empty rows divide by zero": "a row that sees nothing is 0 / 0",
    "empty rows average": "a row that sees nothing gets the mean of the values it masked",
    "empty lists not written": "a row of blocks without a list is left as torch.empty gave it",
    "last block dropped": "the loop over a list stops one early",
    "first block dropped": "the loop over a list starts one late",
    "reads past the count": "entries past a row's count are read",
    "reads past kv_len": "the last block is read and used whole, whatever lies behind the keys",
    "ragged end counted as zeros": "keys past the end are zeros, and not masked",
    "stale output memory": "rows of the last ragged query block are not written",
    "buffer kept between calls": "the output is one buffer, made once for each shape",
    "not rescaled": "what is summed up is not rescaled when the maximum grows",
    "starts at zero": "the running maximum starts at 0",
    "overflows": "no maximum is subtracted",
    "wrong KV head": "head h reads KV head h % Hkv",
    "lists of head 0": "every head uses the first head's lists",
    "lists of item 0": "every batch item uses the first one's lists",
    "padding ignored": "kv_segments are not read",
    "packing ignored": "kv_segments are read as padding only",
    "padding sees padding": "segment -1 equals segment -1",
    "contiguous assumed": "the strides are not read",
    "query scaled in place": "q is multiplied by scale where it lies",
    "logarithm to base 2": "the log-sum-exp is to base 2",
    "log-sum-exp of empty rows": "is 0 where a row sees nothing",
    "coarse scores": "scores are rounded to 8 bits",
    "block sizes swapped": "q_block and kv_block are exchanged where keys are addressed",
    "nothing in the batch but item 0": "every item attends to the first item's keys",
    "wrong dtype": "the output is float64",
}
"""Each fault and what it does."""

_BUFFERS: dict[Any, Tensor] = {}


def tiled(
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
    fault: str = "",
) -> tuple[Tensor, Tensor]:
    """Online softmax over the listed tiles, in float32 (float64 for float64). ``fault``: one of ``FAULTS``, or none."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if fault == "wrong scale":
        scale = scale * scale * head_dim**0.5 * 1.1
    if fault == "missing diagonal mask":
        right = -1
    if fault == "missing window edge" and left >= 0:
        left += 1
    if fault == "offset ignored":
        offset = 0
    if fault == "padding ignored":
        q_segments = kv_segments = None
    if fault == "packing ignored" and kv_segments is not None:
        kv_segments, q_segments = torch.where(kv_segments == -1, -1, 0), None
    if fault == "contiguous assumed":
        q, k, v = (x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride()) for x in (q, k, v))
    if fault == "query scaled in place":
        q.mul_(scale)
        scale = 1.0
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, heads, q_len, v.shape[3], dtype=q.dtype, device=q.device)
    if fault == "buffer kept between calls":
        out = _BUFFERS.setdefault((out.shape, out.dtype), out)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    at_item, at_head = kv_num_blocks.shape[0] > 1, kv_num_blocks.shape[1] > 1
    at_item = at_item and fault != "lists of item 0"
    at_head = at_head and fault != "lists of head 0"

    for b in range(batch):
        for h in range(heads):
            mine = h % kv_heads if fault == "wrong KV head" else h // (heads // kv_heads)
            item = 0 if fault == "nothing in the batch but item 0" else b
            keys, values = k[item, mine], v[item, mine]
            for row, start in enumerate(range(0, q_len, q_block)):
                end = min(start + q_block, q_len)
                if fault == "stale output memory" and end - start < q_block and row:
                    continue
                count = int(kv_num_blocks[b * at_item, h * at_head, row])
                listed = kv_indices[b * at_item, h * at_head, row].tolist()
                used = listed[:count]
                if fault == "reads past the count":
                    used += [x % max(1, -(-kv_len // kv_block)) for x in listed[count : count + 1]]
                if fault == "last block dropped":
                    used = used[:-1]
                if fault == "first block dropped":
                    used = used[1:]
                if fault == "empty lists not written" and not used:
                    continue
                queries = q[b, h, start:end].to(compute)
                total = torch.zeros(end - start, 1, dtype=compute, device=q.device)
                first = 0.0 if fault in ("starts at zero", "overflows") else -torch.inf
                if fault == "empty rows average":
                    first = -1e30
                top = torch.full_like(total, first)
                summed = torch.zeros(end - start, v.shape[3], dtype=compute, device=q.device)
                place = torch.arange(start, end, device=q.device)[:, None] + offset
                for block in used:
                    step = q_block if fault == "block sizes swapped" else kv_block
                    low, high = block * step, min(block * step + kv_block, kv_len)
                    if low >= kv_len:
                        continue
                    tile, content = (x[low:high].to(compute) for x in (keys, values))
                    if fault == "reads past kv_len":
                        tile, content = (_whole(x, low, kv_block).to(compute) for x in (keys, values))
                    if fault == "ragged end counted as zeros":
                        short = (0, 0, 0, kv_block - (high - low))
                        tile, content = (torch.nn.functional.pad(x, short) for x in (tile, content))
                    wide = low + tile.shape[0]
                    scores = queries @ tile.T * scale
                    if fault == "coarse scores":
                        scores = scores.bfloat16().to(compute)
                    at = torch.arange(low, wide, device=q.device)
                    seen = torch.ones(end - start, wide - low, dtype=torch.bool, device=q.device)
                    if left >= 0:
                        seen &= at >= place - left
                    if right >= 0:
                        seen &= at <= place + right
                    if kv_segments is not None:
                        kv = torch.nn.functional.pad(kv_segments[b, low:high], (0, wide - high), value=0)
                        asked = 0 if q_segments is None else q_segments[b, start:end, None]
                        seen &= kv == asked
                        if fault != "padding sees padding":
                            seen &= kv != -1
                    hidden = -1e30 if fault == "empty rows average" else -torch.inf
                    scores = scores.masked_fill(~seen, hidden)
                    grown = torch.maximum(top, scores.amax(-1, keepdim=True))
                    if fault == "overflows":
                        grown = top
                    safe = torch.where(grown == -torch.inf, 0.0, grown)
                    kept = torch.exp(top - safe)
                    weights = torch.exp(scores - safe)
                    total = total * kept + weights.sum(-1, keepdim=True)
                    if fault != "not rescaled":
                        summed = summed * kept
                    # Where nothing is seen nothing is added: 0 * inf would be NaN.
                    clean = torch.where(content.isfinite(), content, 0.0)
                    summed = summed + weights @ clean + _reached(seen, content, compute)
                    top = grown
                divisor = total if fault == "empty rows divide by zero" else torch.where(total == 0, 1.0, total)
                out[b, h, start:end] = (summed / divisor).to(q.dtype)
                natural = torch.where(total == 0, -torch.inf, top + total.log())[:, 0]
                if fault == "logarithm to base 2":
                    natural = natural / math.log(2)
                if fault == "log-sum-exp of empty rows":
                    natural = torch.where(total[:, 0] == 0, 0.0, natural)
                lse[b, h, start:end] = natural.float()
    return (out.double() if fault == "wrong dtype" else out), lse


def _whole(x: Tensor, low: int, block: int) -> Tensor:
    """``block`` rows of a [S, D] view from ``low`` on, also past its end, as far as there is memory; zeros there."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset() - (x.shape[1] - 1) * x.stride(1) - 1
    rows = min(block, room // max(1, x.stride(0)) + 1 - low)
    held = x.as_strided((rows, x.shape[1]), x.stride(), x.storage_offset() + low * x.stride(0))
    return torch.nn.functional.pad(held, (0, 0, 0, block - rows))


def _reached(seen: Tensor, content: Tensor, compute: torch.dtype) -> Tensor:
    """What infinite and NaN values add to the rows that see them: [rows, Dv], 0 where there are none."""
    if content.isfinite().all():
        return torch.zeros((), dtype=compute, device=content.device)
    sight = seen.to(compute)
    found = torch.zeros(seen.shape[0], content.shape[1], dtype=compute, device=content.device)
    for sign in (torch.inf, -torch.inf):
        count = sight @ ((content == sign) | content.isnan()).to(compute)
        found = found + torch.where(count > 0, sign, 0.0)
    return found
