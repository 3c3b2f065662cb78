"""Block lists to time the attention kernel on: causal, one list per query head, blocks of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.errors import OptionError, close_names
from sparsepass.kernels.blocks import ceil_div
from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench.problem import Problem
from sparsepass.methods import PooledTopK

KINDS = {
    "random": "the first block, the diagonal one and random ones, about as many in every row",
    "uneven": "the same, but the counts of a head's rows differ tenfold, in random order",
    "pooled": "chosen by pooled block top-k",
    "full": "every visible block, whatever the density",
}
SPREAD = 10.0
"""Largest over smallest count of uneven rows, before the diagonal cuts the early rows short."""


def make_lists(kind: str, problem: Problem, density: float, block: int, seed: int) -> BlockLists:
    """Lists of a kind at a density (computed share of the visible blocks). Raises ``OptionError`` for the kind."""
    shape = problem.shape
    if kind == "pooled":
        return PooledTopK(density, block).select(
            problem.query, problem.key, scale=shape.scale, visible=problem.visible, counter=None
        )
    if kind not in KINDS:
        raise OptionError(f"Unknown kind of lists {kind!r}. {close_names(kind, KINDS)}")
    generator = torch.Generator(device=problem.device).manual_seed(seed)
    rows = ceil_div(shape.length, block)
    every = torch.full((rows,), rows, device=problem.device)
    # One more block in a share of the rows, so that the density is met between whole counts too.
    more = torch.arange(rows, device=problem.device) * 0.6180339887 % 1.0
    even = _reaching(torch.ones(rows, device=problem.device), more, density)
    counts, indices = [], []
    for _ in range(shape.batch * shape.heads):  # one at a time: the draw is [rows, rows]
        wanted = every if kind == "full" else even
        if kind == "uneven":
            factor = SPREAD ** torch.rand(rows, generator=generator, device=problem.device)
            wanted = _reaching(factor, more, density)
        count, chosen = _draw(wanted, rows, generator)
        counts.append(count)
        indices.append(chosen)
    width = max(chosen.shape[1] for chosen in indices)
    padded = [torch.nn.functional.pad(chosen, (0, width - chosen.shape[1])) for chosen in indices]
    sizes = (shape.batch, shape.heads, rows)
    return BlockLists(torch.stack(counts).view(sizes), torch.stack(padded).view(*sizes, width), block, block)


def _draw(wanted: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Counts int32 [rows] and indices int32 [rows, width]: ``wanted`` blocks of each row, or all that it sees."""
    device = wanted.device
    row = torch.arange(rows, device=device)
    order = torch.rand(rows, rows, generator=generator, device=device)
    order[:, 0] = 2.0
    order[row, row] = 3.0
    order.masked_fill_(row[None, :] > row[:, None], -1.0)
    count = torch.minimum(wanted, row + 1).clamp(min=1)
    width = int(count.max())
    best = order.topk(width, dim=1).indices
    best.masked_fill_(torch.arange(width, device=device) >= count[:, None], rows)  # sorts behind what is listed
    best = best.sort(dim=1).values
    return count.to(torch.int32), torch.where(best < rows, best, 0).to(torch.int32)


def _reaching(factor: Tensor, more: Tensor, density: float) -> Tensor:
    """Blocks wanted per row, int64 [rows], proportional to ``factor`` and reaching the density together."""
    rows = factor.shape[0]
    seen = torch.arange(1, rows + 1, device=factor.device)
    target = density * float(seen.sum())
    low, high = 0.0, float(rows)
    for _ in range(30):
        middle = (low + high) / 2
        total = float(torch.minimum((factor * middle + more).floor().clamp(min=1), seen).sum())
        low, high = (middle, high) if total < target else (low, middle)
    return (factor * high + more).floor().clamp(min=1).to(torch.int64)
