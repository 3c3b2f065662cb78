"""Vertical-slash (MInference, arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766): lists and columns. Torch only.

Both sample a few queries, add up their attention per key ("verticals") and per diagonal ("slashes"), and keep the best
of each: verticals as gathered columns, slashes as the blocks they touch. This module says what is kept; the kernels of
the tensors' device find it. All sizes follow from shapes and caps: nothing synchronizes with the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.arguments import check_counter
from sparsepass.kernels.attend.api import check_inputs, check_visible, empty_lists, is_empty, with_head_size
from sparsepass.kernels.blocks import ALWAYS_KEPT, blocks_per_row, ceil_div, cumulative_kept_blocks
from sparsepass.kernels.scores import check_blocks
from sparsepass.kernels.slash.best import Best
from sparsepass.kernels.slash.windows import WINDOW, sample_windows
from sparsepass.kernels.support import default_block
from sparsepass.kernels.types import BlockLists, Columns, Visible

SINK_TOKENS = 4
"""First keys that are always columns."""
NEAR = 64
"""Last offsets (query minus key position) whose diagonals are always kept."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One selection's shapes. A token diagonal is key index minus query row, a shift key block minus query block."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    left: int
    right: int
    offset: int
    block: int

    @property
    def rows(self) -> int:
        return ceil_div(self.q_len, self.block)

    @property
    def blocks(self) -> int:
        return ceil_div(self.kv_len, self.block)

    @property
    def first_diagonal(self) -> int:
        low = 1 - self.q_len
        return low if self.left < 0 else max(low, self.offset - self.left)

    @property
    def diagonals(self) -> int:
        """Diagonals that the band may show, at least 1."""
        high = self.kv_len - 1
        if self.right >= 0:
            high = min(high, self.offset + self.right)
        return max(1, high - self.first_diagonal + 1)

    @property
    def first_shift(self) -> int:
        return self.first_diagonal // self.block

    @property
    def shifts(self) -> int:
        """Diagonals of blocks that a token diagonal touches."""
        return (self.first_diagonal + self.diagonals - 1) // self.block + 2 - self.first_shift

    def budget(self, density: float) -> int:
        """Key blocks per row that ``density`` allows, as for pooled top-k."""
        shape = (self.q_len, self.kv_len, self.left, self.right, self.offset, self.block, self.block)
        return blocks_per_row(*shape, density)

    def budgets(self, dial: Tensor, most: int) -> Tensor:
        """``budget`` of densities float32 [B or 1, H or 1] on their device: int32 [B, H], at most ``most``."""
        device = dial.device
        first = torch.arange(0, self.q_len, self.block, device=device)
        last = (first + self.block).clamp(max=self.q_len) - 1
        low = torch.zeros_like(first) if self.left < 0 else (first + self.offset - self.left).clamp(min=0)
        high = torch.full_like(first, self.kv_len - 1)
        if self.right >= 0:
            high = torch.minimum(high, last + self.offset + self.right)
        counts = torch.where(low <= high, high.clamp(min=0) // self.block - low // self.block + 1, 0)
        kept = torch.minimum(counts[:, None], torch.arange(self.blocks + 1, device=device)).sum(0)
        # NaN asks for all: more, never less.
        wanted = torch.where(dial < 1.0, dial, 1.0).double() * kept[-1]
        budget = torch.searchsorted(kept.double(), wanted.contiguous())
        return budget.clamp(max=most).int().expand(self.batch, self.heads).contiguous()

    def split(self, budget: int, columns: int | None) -> tuple[int, int]:
        """A row's budget of blocks as (listed blocks, columns): half each, blocks getting what columns may not use.

        Together they are within the budget, or ``ALWAYS_KEPT`` blocks where that is more.
        """
        tokens = max(0, min(budget // 2, budget - ALWAYS_KEPT)) * self.block
        if columns is not None:
            tokens = min(tokens, columns)
        return max(ALWAYS_KEPT, budget - ceil_div(tokens, self.block)), tokens

    def split_each(self, budget: Tensor, columns: int | None) -> tuple[Tensor, Tensor]:
        """``split`` of int32 [B, H]."""
        tokens = torch.minimum(budget // 2, budget - ALWAYS_KEPT).clamp(min=0) * self.block
        if columns is not None:
            tokens = tokens.clamp(max=columns)
        return (budget - (tokens + self.block - 1) // self.block).clamp(min=ALWAYS_KEPT), tokens

    @property
    def near(self) -> int:
        """Diagonals of blocks that near token diagonals touch at most; rows always keep two of them."""
        return 2 if self.offset % self.block == 0 else 3

    def listed_by(self, diagonals: int) -> int:
        """Blocks that a row lists at most with ``diagonals`` kept, its first and the always-kept ones included."""
        return 1 + max(diagonals, self.near)

    def diagonals_within(self, listed: int) -> int:
        """How many diagonals of blocks leave rows at most ``listed`` blocks, with what is always kept."""
        return listed - 1 if listed > self.near else 0

    def diagonals_within_each(self, listed: Tensor) -> Tensor:
        """``diagonals_within`` of int32 [B, H]."""
        return torch.where(listed > self.near, listed - 1, 0).int().contiguous()


@dataclass(frozen=True, slots=True)
class Steps:
    """The kernels of one device; ``kernels/slash/triton/best.py`` and ``kernels/slash/triton/estimate.py`` describe
    them."""

    estimate: Callable[..., tuple[Tensor, Tensor]]
    keep_best: Callable[..., Best]
    touched: Callable[..., Tensor]
    lists: Callable[..., tuple[Tensor, Tensor]]
    allowed: Callable[[Problem, Visible], Tensor]


def steps_of(device: torch.device) -> Steps:
    if device.type == "cuda":
        return triton_steps()
    from sparsepass.kernels.attend.cpu.visible import Visibility
    from sparsepass.kernels.select.cpu.topk import allowed_blocks
    from sparsepass.kernels.slash import cpu as slash_cpu

    def allowed(problem: Problem, visible: Visible) -> Tensor:
        size = (problem.q_len, problem.kv_len, problem.block, problem.block)
        return allowed_blocks(Visibility(*size, **visible.arguments(), blocks=visible.blocks), problem.batch)

    return Steps(
        slash_cpu.estimate_cpu, slash_cpu.keep_best_cpu, slash_cpu.touched_cpu, slash_cpu.diagonal_lists_cpu, allowed
    )


def triton_steps() -> Steps:
    """The Triton kernels, on a GPU or under the interpreter."""
    from sparsepass.kernels.slash.triton import best as best_triton
    from sparsepass.kernels.slash.triton.estimate import estimate_cuda

    def allowed(problem: Problem, visible: Visible) -> Tensor:
        shape = (problem.q_len, problem.kv_len, visible.left, visible.right, visible.offset)
        return best_triton.allowed_cuda(visible.q_segments, visible.kv_segments, shape, problem.block)

    return Steps(
        estimate_cuda,
        best_triton.keep_best_cuda,
        best_triton.touched_cuda,
        best_triton.diagonal_lists_cuda,
        allowed,
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the sampled queries attend to: sums per key [B, H, Skv] and per diagonal [B, H, diagonals], float32."""

    columns: Tensor
    diagonals: Tensor
    starts: Tensor
    counts: Tensor
    first_key: Tensor


def problem_of(query: Tensor, key: Tensor, visible: Visible, block: int | None) -> Problem:
    """The shapes of a selection. Raises ``KernelInputError`` for inputs that no kernel takes."""
    check_inputs(query, key, key)
    check_visible(query, key, visible)
    size = default_block(query.device) if block is None else block
    if size not in (64, 128):
        raise KernelInputError(f"block is {size!r}; accepted are 64 and 128.")
    check_blocks(visible.blocks, query, key, size, size)
    batch, heads, q_len, _ = query.shape
    return Problem(batch, heads, q_len, key.shape[2], visible.left, visible.right, visible.offset, size)


def check_queries(queries: int) -> None:
    if not WINDOW <= queries <= 1024 or queries % WINDOW:
        raise KernelInputError(f"queries is {queries!r}; accepted are multiples of {WINDOW} up to 1024.")


def estimate(
    query: Tensor, key: Tensor, problem: Problem, visible: Visible, scale: float, queries: int, steps: Steps
) -> Estimate:
    """Attention of the sampled queries, summed along columns and diagonals."""
    check_queries(queries)
    starts, counts, first_key = sample_windows(
        queries,
        batch=problem.batch,
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        offset=problem.offset,
        q_segments=visible.q_segments,
        kv_segments=visible.kv_segments,
        device=query.device,
    )
    columns, diagonals = steps.estimate(
        query,
        key,
        starts,
        counts,
        scale=scale,
        **visible.arguments(),
        first_diagonal=problem.first_diagonal,
        diagonals=problem.diagonals,
    )
    return Estimate(columns, diagonals, starts, counts, first_key)


def check_dial(dial: Tensor | None, query: Tensor) -> None:
    """Raises ``KernelInputError`` unless the dial is None or float32 [B or 1, H or 1] on the query's device."""
    batch, heads = query.shape[:2]
    if dial is None:
        return
    fits = dial.dim() == 2 and dial.shape[0] in (1, batch) and dial.shape[1] in (1, heads)
    if not fits or dial.dtype != torch.float32 or dial.device != query.device:
        raise KernelInputError(
            f"dial is {dial.dtype} {tuple(dial.shape)} on {dial.device}; accepted is float32 "
            f"[{batch} or 1, {heads} or 1] on {query.device}."
        )


def select_vertical_slash(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    visible: Visible,
    density: float,
    columns: int | None = None,
    slashes: int | None = None,
    queries: int = 256,
    block: int | None = None,
    dial: Tensor | None = None,
    counter: Tensor | None = None,
    steps: Steps | None = None,
) -> BlockLists:
    """Vertical-slash for query [B, H, Sq, D] and key [B, Hkv, Skv, D], as block lists with columns.

    ``density``: share of the visible area to compute at most, half as columns and half as blocks; 1: every block.
    ``columns``, ``slashes``: at most so many columns and token diagonals. ``queries``: how many are sampled, a multiple
    of 64. ``dial``: float32 [B or 1, H or 1], densities in place of ``density``, which is their cap. ``counter``: int64
    [3]; [2] += visible blocks. Every row keeps its first visible block, the one at its last query's position and the
    one before. Raises ``KernelInputError``.
    """
    problem = problem_of(query, key, visible, block)
    check_dial(dial, query)
    check_counter(counter, query)
    if is_empty(query, key):
        return empty_lists(query, problem.block)
    query, key = with_head_size(query, key)
    run = steps_of(query.device) if steps is None else steps
    found = estimate(query, key, problem, visible, scale, queries, run)

    budget = problem.budget(density)
    most_blocks, most_columns = problem.split(budget, columns)
    blocks: int | Tensor = problem.diagonals_within(most_blocks)
    tokens: int | Tensor = most_columns
    width = min(problem.blocks, most_blocks + 2)
    if dial is not None:
        listed, tokens = problem.split_each(problem.budgets(dial, budget), columns)
        blocks = problem.diagonals_within_each(listed)
    if density >= 1:
        width = problem.blocks
        if dial is None:
            blocks, tokens, most_columns = problem.shifts, 0, 0
        else:
            everything = torch.where(dial < 1.0, dial, 1.0) >= 1
            blocks = torch.where(everything, problem.shifts, blocks).int().contiguous()
            tokens = torch.where(everything, 0, tokens).int().contiguous()

    floor = None
    if slashes is not None:
        floor = run.keep_best(found.diagonals, most=slashes, width=0).rank
        if density >= 1 and dial is not None:
            floor = torch.where(everything, -0x7FFFFFFF, floor).int().contiguous()
        elif density >= 1:
            floor = None
    kept = keep_diagonals(run, problem, found, blocks, floor)
    lists = run.lists(
        kept.flags, None, first_shift=problem.first_shift, **list_arguments(problem, visible, width, counter)
    )
    single = None
    if most_columns:
        chosen = run.keep_best(
            found.columns, most=tokens, width=most_columns, first=found.first_key, forced=SINK_TOKENS
        )
        single = Columns(chosen.num[:, :, None], chosen.indices[:, :, None])
    return BlockLists(*lists, problem.block, problem.block, single)


def keep_diagonals(run: Steps, problem: Problem, found: Estimate, most: int | Tensor, floor: Tensor | None) -> Best:
    """The best ``most`` diagonals of blocks, each as good as the best token diagonal that touches it."""
    best = run.touched(
        found.diagonals,
        first_diagonal=problem.first_diagonal,
        shifts=problem.shifts,
        first_shift=problem.first_shift,
        offset=problem.offset,
        near=NEAR,
        block=problem.block,
    )
    return run.keep_best(best, most=most, width=0, floor=floor)


def list_arguments(problem: Problem, visible: Visible, width: int, counter: Tensor | None) -> dict[str, Any]:
    return {
        "q_len": problem.q_len,
        "kv_len": problem.kv_len,
        **visible.arguments(),
        "block": problem.block,
        "blocks": visible.blocks,
        "width": max(1, width),
        "counter": counter,
    }


def flattened_limit(problem: Problem, density: float, taken: int = 0) -> int:
    """Blocks that ``density`` allows over all rows of one head, whose rows may have ``taken`` each already."""
    shape = (problem.q_len, problem.kv_len, problem.left, problem.right, problem.offset, problem.block, problem.block)
    kept = cumulative_kept_blocks(*shape)
    return max(0, kept[min(problem.budget(density), len(kept) - 1)] - kept[min(taken, len(kept) - 1)])
