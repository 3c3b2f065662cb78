"""Whether a result is right: sampled rows of it against float64, with a tolerance from the rounding of its dtype.

Shares no code with the kernels or with their references.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench.problem import Problem

ROOT_MEAN_SQUARE_FACTOR, LARGEST_FACTOR = 2.5, 5.0
"""How many times the error of a step-by-step rounded computation a kernel may make."""


@dataclass(frozen=True, slots=True)
class Check:
    """Errors of one output at the sampled rows. ``error`` is relative: root mean square over that of the reference."""

    error: float
    max_error: float
    allowed: float
    correct: bool
    why: str = ""
    """What is wrong, empty if nothing is."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Float64 results [rows, D] at the sampled rows, and the errors that rounding alone makes."""

    out: Tensor
    mass: float
    """Mean share of the true attention mass that the computed blocks hold."""
    rounding: float
    largest_rounding: float


@dataclass(slots=True)
class Sample:
    """Rows of a problem: some (batch, head) pairs, and in each the same query rows. float64 throughout."""

    problem: Problem
    seed: int = 0
    pairs: int = 6
    rows: int = 12
    _dense: Expected | None = field(default=None, init=False)

    def places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """(batch, head) pairs, and query rows int64 [rows]: the first, the last, block edges, then random ones."""
        shape = self.problem.shape
        generator = torch.Generator().manual_seed(self.seed)
        every = [(b, h) for b in range(shape.batch) for h in range(shape.heads)]
        picked = torch.randperm(len(every), generator=generator)[: self.pairs].tolist()
        edges = [0, shape.length - 1, shape.length // 2, 127, 128, shape.length - 129]
        drawn = torch.randint(shape.length, (self.rows,), generator=generator).tolist()
        rows = dict.fromkeys(row for row in edges + drawn if 0 <= row < shape.length)
        return [every[i] for i in picked], torch.tensor(sorted(rows), device=self.problem.device)

    def dense(self) -> Expected:
        """What dense attention gives."""
        if self._dense is None:
            self._dense = self.expected(None)
        return self._dense

    def expected(self, lists: BlockLists | None) -> Expected:
        """What attention over the lists gives, or dense attention."""
        shape, problem = self.problem.shape, self.problem
        pairs, rows = self.places()
        position = torch.arange(shape.length, device=rows.device)
        causal = position <= rows[:, None]
        exact, rounded, masses = [], [], []
        for b, h in pairs:
            kv = h // (shape.heads // shape.kv_heads)
            query, key, value = (
                x.double() for x in (problem.query[b, h, rows], problem.key[b, kv], problem.value[b, kv])
            )
            scores = (query @ key.T) * shape.scale
            seen = causal if lists is None else causal & _listed(lists, b, h, rows, shape.length)
            weights = torch.softmax(scores.masked_fill(~causal, -math.inf), -1)
            masses.append(float(torch.where(seen, weights, 0.0).sum(-1).mean()))
            scores = scores.masked_fill(~seen, -math.inf)
            top = scores.amax(-1, keepdim=True).clamp(min=-1e300)  # a row that sees nothing
            weights = torch.exp(scores - top)
            total = weights.sum(-1, keepdim=True).clamp(min=1e-300)
            exact.append(weights @ value / total)
            # What a kernel rounds: the scores' products to float32, the weights and the result to its dtype.
            coarse = torch.exp(scores.float() - top.float()).to(shape.torch_dtype)
            rounded.append(((coarse.double() @ value) / total).to(shape.torch_dtype).double())
        out = torch.cat(exact)
        off = torch.cat(rounded) - out
        return Expected(out, sum(masses) / len(masses), _relative(off, out), float(off.abs().max()))

    def take(self, out: Tensor) -> Tensor:
        """The sampled rows of an output [B, H, S, D], as float64 [rows, D]."""
        pairs, rows = self.places()
        return torch.cat([out[b, h, rows].double() for b, h in pairs])

    def compare(self, out: Tensor, expected: Expected) -> Check:
        """Whether an output [B, H, S, D] is what it has to be."""
        shape = self.problem.shape
        if tuple(out.shape) != (shape.batch, shape.heads, shape.length, shape.head_dim):
            return Check(math.nan, math.nan, math.nan, False, f"the output has shape {tuple(out.shape)}")
        taken = self.take(out)
        if not bool(torch.isfinite(out).all()):
            return Check(math.nan, math.nan, math.nan, False, "the output holds values that are not finite")
        error, largest = _relative(taken - expected.out, expected.out), float((taken - expected.out).abs().max())
        unit = torch.finfo(shape.torch_dtype).eps
        # float32 kernels multiply in parts or in another order: their error has a floor that the emulation has not.
        floor = 8 * unit if shape.dtype == "fp32" else unit / 4
        allowed = ROOT_MEAN_SQUARE_FACTOR * max(expected.rounding, floor)
        most = LARGEST_FACTOR * max(expected.largest_rounding, floor * float(expected.out.abs().max()))
        why = ""
        if not error <= allowed:
            why = f"relative error {error:.2e}, of at most {allowed:.2e} by rounding"
        elif not largest <= most:
            why = f"largest error {largest:.2e}, of at most {most:.2e} by rounding"
        return Check(error, largest, allowed, not why, why)


def _listed(lists: BlockLists, b: int, h: int, rows: Tensor, length: int) -> Tensor:
    """bool [rows, length]: keys in the listed blocks and columns of each row."""
    b, h = min(b, lists.kv_num_blocks.shape[0] - 1), min(h, lists.kv_num_blocks.shape[1] - 1)
    block_row = rows // lists.q_block
    blocks = -(-length // lists.kv_block)
    held = _spread(lists.kv_num_blocks[b, h, block_row], lists.kv_indices[b, h, block_row], blocks)
    keys = held.repeat_interleave(lists.kv_block, 1)[:, :length]
    columns = getattr(lists, "columns", None)
    if columns is not None:
        b, h = min(b, columns.num.shape[0] - 1), min(h, columns.num.shape[1] - 1)
        place = block_row.clamp(max=columns.num.shape[2] - 1)
        keys = keys | _spread(columns.num[b, h, place], columns.indices[b, h, place], length)
    return keys


def _spread(num: Tensor, indices: Tensor, size: int) -> Tensor:
    """bool [rows, size]: which indices the first ``num`` entries of each row name."""
    used = torch.arange(indices.shape[1], device=indices.device) < num[:, None]
    held = torch.zeros(indices.shape[0], size + 1, dtype=torch.bool, device=indices.device)
    return held.scatter_(1, torch.where(used, indices.long(), size), True)[:, :size]


def _relative(off: Tensor, to: Tensor) -> float:
    return float(off.norm() / to.norm().clamp(min=1e-300))


def invalid_lists(lists: BlockLists, problem: Problem) -> str:
    """What is wrong with block lists of a causal problem, empty if nothing is. Waits for the device."""
    num, indices = lists.kv_num_blocks, lists.kv_indices
    rows, width = num.shape[2], indices.shape[3]
    if rows != -(-problem.shape.length // lists.q_block):
        return f"{rows} rows of lists for {problem.shape.length} tokens in blocks of {lists.q_block}"
    if int(num.min()) < 0 or int(num.max()) > width:
        return f"counts from {int(num.min())} to {int(num.max())}, of lists {width} wide"
    last = (torch.arange(rows, device=num.device) * lists.q_block + lists.q_block - 1) // lists.kv_block
    entry = torch.arange(width, device=num.device)
    for one in range(num.shape[0]):
        for head in range(num.shape[1]):  # one at a time: room
            used = entry < num[one, head][:, None]
            here = indices[one, head]
            if bool((used & ((here < 0) | (here > last[:, None]))).any()):
                return f"head {head} lists blocks that no query of their row sees"
            if bool((used[:, 1:] & (here[:, 1:] <= here[:, :-1])).any()):
                return f"the lists of head {head} do not ascend"
    columns = getattr(lists, "columns", None)
    if columns is not None:
        used = torch.arange(columns.indices.shape[-1], device=num.device) < columns.num[..., None]
        if bool((used & ((columns.indices < 0) | (columns.indices >= problem.shape.length))).any()):
            return "columns outside the keys"
        if bool((used[..., 1:] & (columns.indices[..., 1:] <= columns.indices[..., :-1])).any()):
            return "the columns do not ascend"
    return ""
