"""Vertical-slash selection on the CPU in torch operations: the steps of ``kernels/slash/triton/estimate.py`` and
``kernels/slash/triton/best.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu.visible import Visibility
from sparsepass.kernels.select.cpu.topk import allowed_blocks
from sparsepass.kernels.slash.best import Best


def _ranks(values: Tensor) -> Tensor:
    """int32 in the order of float32 values; NaN as -inf."""
    ordered = torch.where(values.isnan(), -torch.inf, values) + 0.0  # -0.0 becomes 0.0
    bits = ordered.view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@torch.no_grad()
def estimate_cpu(
    q: Tensor,
    k: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    first_diagonal: int,
    diagonals: int,
) -> tuple[Tensor, Tensor]:
    """As ``estimate_triton.estimate_cuda``."""
    batch, heads, _, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    columns = torch.zeros(batch, heads, kv_len)
    sums = torch.zeros(batch, heads, diagonals)
    key = torch.arange(kv_len)
    for item in range(batch):
        keys = k[item].float()
        for start, count in zip(starts[item].tolist(), counts[item].tolist(), strict=True):
            if not count:
                continue
            row = torch.arange(start, start + count)
            position = row[:, None] + offset
            seen = torch.ones(count, kv_len, dtype=torch.bool)
            if right >= 0:
                seen &= key <= position + right
            if left >= 0:
                seen &= key >= position - left
            if kv_segments is not None:
                own = torch.zeros(count, dtype=torch.int32) if q_segments is None else q_segments[item, row]
                seen &= (kv_segments[item] == own[:, None]) & (kv_segments[item] != -1)
            queries = q[item, :, row].float().view(kv_heads, heads // kv_heads * count, -1)
            scores = (queries @ keys.transpose(1, 2) * scale).view(heads, count, kv_len)
            scores = scores.masked_fill(~seen, -torch.inf)
            sound = scores.logsumexp(-1, keepdim=True).isfinite()
            weights = torch.where(sound, scores.softmax(-1), 0.0)
            columns[item] += weights.sum(1)
            place = key[None, :] - row[:, None] - first_diagonal
            for index in range(count):
                low, high = (place[index] >= 0).nonzero(), (place[index] < diagonals).nonzero()
                if len(low) and len(high):
                    begin, end = int(low[0]), int(high[-1]) + 1
                    sums[item, :, int(place[index, begin]) : int(place[index, begin]) + end - begin] += weights[
                        :, index, begin:end
                    ]
    return columns, sums


@torch.no_grad()
def keep_best_cpu(
    values: Tensor,
    *,
    most: int | Tensor,
    width: int,
    share: Tensor | None = None,
    least: Tensor | None = None,
    first: Tensor | None = None,
    forced: int = 0,
    floor: Tensor | None = None,
) -> Best:
    """As ``best_triton.keep_best_cuda``."""
    batch, heads, size = values.shape
    index = torch.arange(size)
    rank = _ranks(values).long()
    there = torch.ones_like(rank, dtype=torch.bool) if floor is None else rank >= floor[..., None]
    if forced:
        begin = torch.zeros(batch, dtype=torch.int64) if first is None else first.long()
        rank = torch.where(((index >= begin[:, None]) & (index < begin[:, None] + forced))[:, None], 0x7FFFFFFF, rank)
    rank = torch.where(there, rank, -0x80000000)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    ordered = rank.gather(-1, order)
    limit = torch.as_tensor(most).expand(batch, heads)[..., None]
    place = torch.arange(size)
    kept = place < limit
    if share is not None:
        mass = torch.where((values > 0) & values.isfinite() & there, values, 0.0).gather(-1, order)
        before = mass.cumsum(-1) - mass
        goal = mass.sum(-1, keepdim=True) * share[..., None]
        floor_count = 0 if least is None else least[..., None]
        # Rounding may keep the sum under the goal to the end: what has no mass is still not needed.
        kept = kept & (((before < goal) & (mass > 0)) | (place < floor_count) | (ordered == 0x7FFFFFFF))
    kept = kept & (ordered != -0x80000000)
    if width:
        kept = kept & (place < width)
    flags = torch.zeros_like(rank, dtype=torch.int8).scatter_(-1, order, kept.to(torch.int8))
    num = kept.sum(-1)
    last = ordered.gather(-1, (num - 1).clamp(min=0)[..., None])[..., 0]
    threshold = torch.where(num > 0, last, 0x7FFFFFFF)
    indices = torch.where(flags.bool(), index, size).sort(-1).values[..., : max(1, width)]
    indices = torch.where(indices < size, indices, 0).int()
    if indices.shape[-1] < width:
        indices = torch.constant_pad_nd(indices, (0, width - indices.shape[-1]))
    return Best(flags, num.int(), indices, threshold.int())


@torch.no_grad()
def touched_cpu(
    diagonals: Tensor, *, first_diagonal: int, shifts: int, first_shift: int, offset: int, near: int, block: int
) -> Tensor:
    """As ``best_triton.touched_cuda``."""
    diagonal = first_diagonal + torch.arange(diagonals.shape[-1])
    values = torch.where(diagonals.isnan(), 0.0, diagonals)
    values = torch.where((diagonal <= offset) & (diagonal > offset - near), torch.inf, values)
    low = (first_shift - 1) * block + 1
    length = (shifts + 1) * block  # the last window begins at (shifts - 1) * block and holds 2 * block - 1
    padded = torch.zeros(*diagonals.shape[:2], length)
    begin = first_diagonal - low
    source = slice(max(0, -begin), max(0, min(diagonals.shape[-1], length - begin)))
    padded[..., source.start + begin : source.stop + begin] = values[..., source]
    return padded.unfold(-1, 2 * block - 1, block)[..., :shifts, :].amax(-1)


@torch.no_grad()
def diagonal_lists_cpu(
    flags: Tensor,
    extra: Tensor | None,
    *,
    first_shift: int,
    q_len: int,
    kv_len: int,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    block: int,
    width: int,
    blocks: Tensor | None,
    counter: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``best_triton.diagonal_lists_cuda``."""
    batch, heads, shifts = flags.shape
    mask = Visibility(q_len, kv_len, block, block, left, right, offset, q_segments, kv_segments, blocks)
    allowed = allowed_blocks(mask, batch)
    row, column = torch.arange(mask.q_blocks)[:, None], torch.arange(mask.kv_blocks)[None, :]
    shift = column - row - first_shift
    chosen = flags[..., shift.clamp(0, shifts - 1)].bool() & (shift >= 0) & (shift < shifts)
    if extra is not None:
        chosen = chosen | extra.bool()
    last = ((row + 1) * block).clamp(max=q_len) - 1 + offset
    diagonal = torch.div(last, block, rounding_mode="floor")
    forced = (column == diagonal) | (column == diagonal - 1)
    chosen = (chosen | forced | (allowed.cumsum(-1) == 1)) & allowed
    count = chosen.sum(-1).clamp(max=width)
    lists = torch.where(chosen, column, mask.kv_blocks).sort(-1).values[..., :width]
    if counter is not None:
        counter[2] += allowed.expand(batch, heads, -1, -1).sum()
    filled = torch.arange(width) < count[..., None]
    return count.int(), torch.where(filled, lists, 0).int()
