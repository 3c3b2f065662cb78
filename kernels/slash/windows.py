"""Which queries are sampled to estimate attention: windows of consecutive ones at the ends of documents. Torch only.

Tensors stay on the device and have sizes that shapes alone decide; nothing synchronizes with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 64
"""Queries per window."""


def sample_windows(
    queries: int,
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """First row and length of each window, int32 [B, queries / 64], and each item's first real key, int32 [B].

    Without padding and packing the windows are the last ``queries`` rows. Otherwise a document is a run of neighboring
    real rows of one segment (a row is padding if its segment is -1, or if the key at its own position carries another
    one), and windows are cut from the ends of documents: first the last 64 rows of each, the longest document first,
    then the 64 before those, and so on until there are enough. A window without rows has length 0.
    """
    count = queries // WINDOW
    if kv_segments is None:
        end = q_len - WINDOW * torch.arange(count, device=device, dtype=torch.int32)
        starts = (end - WINDOW).clamp(min=0)
        return (
            starts.expand(batch, count).contiguous(),
            (end - starts).clamp(min=0).expand(batch, count).contiguous(),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )
    row = torch.arange(q_len, device=device)
    own = torch.zeros(batch, q_len, dtype=torch.int64, device=device) if q_segments is None else q_segments.long()
    position = row + offset
    keys = kv_segments.long()[:, position.clamp(0, kv_len - 1)]
    inside = (position >= 0) & (position < kv_len)
    real = (own != -1) & (~inside | (keys == own))
    same = (own[:, 1:] == own[:, :-1]) & real[:, 1:] & real[:, :-1]
    starts_here = torch.ones_like(real)
    starts_here[:, 1:] = ~same
    ends_here = torch.ones_like(real)
    ends_here[:, :-1] = ~same
    first_row = torch.where(starts_here, row, -1).cummax(1).values
    last_row = torch.where(ends_here, row, q_len).flip(1).cummin(1).values.flip(1)
    length, back = last_row - first_row + 1, last_row - row
    ends_window = real & (back % WINDOW == 0)
    # Earlier rounds first, then longer documents, then lower rows; what ends no window comes last.
    turn = (back // WINDOW) * (q_len + 1) + q_len - length
    turn = torch.where(ends_window, turn, (q_len + 1) * (q_len + 1))
    order = turn.sort(dim=1, stable=True).indices[:, :count]
    if order.shape[1] < count:  # fewer rows than windows
        order = torch.constant_pad_nd(order, (0, count - order.shape[1]), value=0)
        usable = torch.arange(count, device=device) < q_len
    else:
        usable = torch.ones(count, dtype=torch.bool, device=device)
    held = (order - first_row.gather(1, order) + 1).clamp(max=WINDOW)
    held = torch.where(ends_window.gather(1, order) & usable, held, 0)
    starts = torch.where(held > 0, order - held + 1, 0)
    key = torch.arange(kv_len, device=device)
    first_key = torch.where(kv_segments != -1, key, kv_len).amin(1)
    return starts.int().contiguous(), held.int().contiguous(), first_key.int().contiguous()
