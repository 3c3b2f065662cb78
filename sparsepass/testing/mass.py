"""What a selection of blocks is worth: the true attention mass of every block, what lists keep of it, output errors."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.types import BlockLists, Visible

_CHUNK_BYTES = {"cuda": 1 << 30}
_CHUNK_BYTES_CPU = 1 << 26


def block_mass(query: Tensor, key: Tensor, *, scale: float, visible: Visible, block: int) -> Tensor:
    """True attention mass per block, float32 [B, H, nq, nkv]: the mean over a query block's rows of their softmax.

    query [B, H, Sq, D] and key [B, Hkv, Skv, D] of any floating dtype; computed in float64 for float64, else in
    float32. ``block``: tokens per block. Rows that see nothing are left out of the mean, so that a row of blocks sums
    to 1, or to 0 where nothing in it sees anything. Works on a part of one head at a time: at 131072 tokens some 4 GiB
    at once on a GPU, and the result takes 4 MiB per head at block 128. Raises ``KernelInputError``.
    """
    if query.dim() != 4 or key.dim() != 4 or query.shape[1] % key.shape[1] or block < 1:
        raise KernelInputError(
            f"query has shape {tuple(query.shape)}, key {tuple(key.shape)} and block is {block}; accepted are "
            "[B, H, Sq, D] and [B, Hkv, Skv, D] with H a multiple of Hkv, and a number of tokens."
        )
    batch, heads, q_len, _ = query.shape
    kv_len, group = key.shape[2], heads // key.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    limit = _CHUNK_BYTES.get(query.device.type, _CHUNK_BYTES_CPU)
    rows = max(1, limit // (compute.itemsize * kv_len * block)) * block
    mass = torch.zeros(batch, heads, -(-q_len // block), -(-kv_len // block), device=query.device)
    for item in range(batch):
        for head in range(heads):
            keys = key[item, head // group].to(compute)
            for start in range(0, q_len, rows):
                part = query[item, head, start : start + rows].to(compute)
                low, high = _reach(visible, start, part.shape[0], kv_len, block)
                if low >= high:
                    continue
                scores = (part @ keys[low:high].T).mul_(scale)
                scores.masked_fill_(~_seen(visible, item, start, part.shape[0], low, high, query.device), -torch.inf)
                tile = _per_block(scores, block)
                mass[item, head, start // block :, low // block :][: tile.shape[0], : tile.shape[1]] = tile
    return mass


def _reach(visible: Visible, start: int, rows: int, kv_len: int, block: int) -> tuple[int, int]:
    """The range of keys, from a block's start, that the band lets any of the rows see."""
    first, last = start + visible.offset, start + rows - 1 + visible.offset
    low = 0 if visible.left < 0 else max(0, first - visible.left)
    high = kv_len if visible.right < 0 else min(kv_len, last + visible.right + 1)
    return low // block * block, high


def _seen(visible: Visible, item: int, start: int, rows: int, low: int, high: int, device: torch.device) -> Tensor:
    """Bool [rows, high - low]: pairs that band and segments allow."""
    place = torch.arange(start, start + rows, device=device)[:, None] + visible.offset
    keys = torch.arange(low, high, device=device)
    seen = torch.ones(rows, high - low, dtype=torch.bool, device=device)
    if visible.left >= 0:
        seen &= keys >= place - visible.left
    if visible.right >= 0:
        seen &= keys <= place + visible.right
    if visible.kv_segments is not None:
        kv = visible.kv_segments[item, low:high]
        mine = 0 if visible.q_segments is None else visible.q_segments[item, start : start + rows, None]
        seen &= (kv == mine) & (kv != -1)
    return seen


def _per_block(scores: Tensor, block: int) -> Tensor:
    """Mean softmax mass [ceil(rows / block), ceil(keys / block)] of masked scores, in place of them."""
    rows, keys = scores.shape
    top = scores.amax(-1, keepdim=True)
    sees = top != -torch.inf
    scores.sub_(torch.where(sees, top, 0.0)).exp_()
    wide = torch.nn.functional.pad(scores, (0, -keys % block))
    sums = wide.view(rows, -1, block).sum(-1)
    sums /= torch.where(sees, sums.sum(-1, keepdim=True), 1.0)
    short = -rows % block
    sums, counted = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (sums, sees.to(sums.dtype)))
    total, count = (x.view(-1, block, x.shape[-1]).sum(1) for x in (sums, counted))
    return (total / count.clamp(min=1)).float()


def kept_mass(mass: Tensor, lists: BlockLists) -> Tensor:
    """Share of the attention mass that block lists keep, float32 [B, H]: the mean over query blocks that see anything.

    ``mass`` is ``block_mass`` for the same block size, [B, H, nq, nkv]. Token columns beside the blocks, where a
    method has them, are not counted. Raises ``KernelInputError`` where the lists are of another size.
    """
    num, indices = lists.kv_num_blocks, lists.kv_indices
    if num.shape[-1] != mass.shape[2] or num.dim() != 3:
        raise KernelInputError(
            f"kv_num_blocks has shape {tuple(num.shape)} and mass {tuple(mass.shape)}; the lists must have one entry "
            "per query block of the mass: use the same block size for both."
        )
    indices = indices.expand(*mass.shape[:3], indices.shape[-1])
    used = torch.arange(indices.shape[-1], device=mass.device) < num.expand(mass.shape[:3])[..., None]
    kept = mass.gather(-1, torch.where(used, indices, 0).long()).masked_fill(~used, 0.0).sum(-1)
    sees = mass.sum(-1) > 0
    return kept.sum(-1) / sees.sum(-1).clamp(min=1)


def attention_error(out: Tensor, reference: Tensor) -> float:
    """Relative error of an attention output: the Euclidean norm of the difference over that of ``reference``.

    Both [B, H, S, D], of any floating dtype. Accumulated in float64, one head at a time. Waits for the device. NaN
    where ``out`` holds one. Raises ``KernelInputError`` for different shapes.
    """
    if out.shape != reference.shape:
        raise KernelInputError(
            f"out has shape {tuple(out.shape)} and reference {tuple(reference.shape)}; they must be the same."
        )
    difference, size = 0.0, 0.0
    for mine, theirs in zip(out.flatten(0, -3), reference.flatten(0, -3), strict=True):
        wide = theirs.double()
        difference += float((mine.double() - wide).square().sum())
        size += float(wide.square().sum())
    return float((difference / size) ** 0.5) if size else float(difference > 0)
