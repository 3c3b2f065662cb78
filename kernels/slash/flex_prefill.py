"""FlexPrefill (arXiv 2502.20766): vertical-slash, and pooled blocks where a head's attention follows the query.

A head is query-aware if block averages predict what the sampled queries attend to: the square root of the
Jensen-Shannon divergence between the two distributions over blocks is under ``tau``. Torch only, for every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.arguments import check_counter
from sparsepass.kernels.attend.api import empty_lists, is_empty, with_head_size
from sparsepass.kernels.blocks import ceil_div
from sparsepass.kernels.scores import HIDDEN
from sparsepass.kernels.slash.api import (
    SINK_TOKENS,
    Estimate,
    Problem,
    Steps,
    check_dial,
    estimate,
    flattened_limit,
    keep_diagonals,
    list_arguments,
    problem_of,
    steps_of,
)
from sparsepass.kernels.types import BlockLists, Columns, Visible


def select_flex_prefill(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    visible: Visible,
    gamma: float,
    tau: float = 0.1,
    min_budget: int = 512,
    most: float = 0.5,
    queries: int = 128,
    block: int | None = None,
    dial: Tensor | None = None,
    counter: Tensor | None = None,
    steps: Steps | None = None,
) -> BlockLists:
    """FlexPrefill for query [B, H, Sq, D] and key [B, Hkv, Skv, D], as block lists with columns.

    ``gamma``: share of the estimated attention that the kept sets cover; 1: every block. ``tau``: a head whose
    divergence is under it adds blocks of the pooled map, by flattened cumulative mass ``gamma``, to the least sets;
    0: none does. ``min_budget``: tokens that the columns, and the diagonals of blocks, hold at least. ``most``: share
    of the visible area that a head computes at most, sets and map together: it sizes the buffers. ``queries``: how many
    are sampled, a multiple of 64. ``dial``: float32 [B or 1, H or 1] in place of ``gamma``, which is their cap.
    ``counter``: int64 [3]; [2] += visible blocks. Raises ``KernelInputError``.
    """
    if not 0 < most <= 1:
        raise KernelInputError(f"most is {most!r}; accepted is a share above 0 and at most 1.")
    problem = problem_of(query, key, visible, block)
    check_dial(dial, query)
    check_counter(counter, query)
    if is_empty(query, key):
        return empty_lists(query, problem.block)
    query, key = with_head_size(query, key)
    run = steps_of(query.device) if steps is None else steps
    found = estimate(query, key, problem, visible, scale, queries, run)

    shape = (problem.batch, problem.heads)
    wanted = torch.full(shape, float(gamma), device=query.device)
    if dial is not None:  # NaN asks for the cap
        wanted = torch.where(dial < gamma, dial, wanted).contiguous()
    everything = wanted >= 1
    aware = None
    sets = wanted
    extra = None
    most_blocks, most_columns = problem.split(problem.budget(most), None)
    most_diagonals = problem.diagonals_within(most_blocks)
    least_diagonals = min(most_diagonals, ceil_div(min_budget, problem.block))
    least_columns = min(min_budget, most_columns)
    width = problem.blocks if gamma >= 1 or tau > 0 else min(problem.blocks, most_blocks + 2)
    if tau > 0:
        allowed = allowed_map(run, problem, visible, query.device)
        key_means = block_means(key, problem.block, visible.kv_segments)
        aware = divergence(query, key_means, problem, visible, found, scale) < tau
        sets = torch.where(aware, 0.0, wanted)
        taken = problem.listed_by(least_diagonals) + ceil_div(least_columns, problem.block)  # by an aware head's sets
        room = flattened_limit(problem, most, taken)
        extra = pooled_blocks(query, key_means, allowed, problem, visible, scale, wanted, aware, room, run)

    def each(number: int) -> Tensor:
        return torch.full(shape, number, dtype=torch.int32, device=query.device)

    slashes = run.keep_best(found.diagonals, most=problem.diagonals, width=0, share=sets, least=each(0))
    chosen = keep_diagonals(run, problem, found, most_diagonals, slashes.rank).flags
    chosen = chosen | keep_diagonals(run, problem, found, least_diagonals, None).flags
    chosen = chosen | everything[..., None].to(torch.int8)
    lists = run.lists(
        chosen, extra, first_shift=problem.first_shift, **list_arguments(problem, visible, width, counter)
    )
    single = None
    if most_columns:
        tokens = torch.where(everything, 0, each(most_columns)).int()
        best = run.keep_best(
            found.columns,
            most=tokens,
            width=most_columns,
            share=sets,
            least=each(least_columns),
            first=found.first_key,
            forced=SINK_TOKENS,
        )
        single = Columns(best.num[:, :, None], best.indices[:, :, None])
    return BlockLists(*lists, problem.block, problem.block, single)


def allowed_map(run: Steps, problem: Problem, visible: Visible, device: torch.device) -> Tensor:
    """Bool [B or 1, H or 1, nq, nkv]: blocks with a visible pair."""
    if visible.blocks is not None:
        return band_blocks(problem, device) & (visible.blocks != HIDDEN)
    if visible.kv_segments is not None:
        return run.allowed(problem, visible).bool()
    return band_blocks(problem, device)[None, None]


def band_blocks(problem: Problem, device: torch.device) -> Tensor:
    """Bool [nq, nkv]: blocks with a pair visible through the band."""
    first = torch.arange(0, problem.q_len, problem.block, device=device)[:, None]
    last = (first + problem.block).clamp(max=problem.q_len) - 1 + problem.offset
    first = first + problem.offset
    begin = torch.arange(0, problem.kv_len, problem.block, device=device)[None, :]
    end = (begin + problem.block).clamp(max=problem.kv_len) - 1
    allowed = torch.ones(first.shape[0], begin.shape[1], dtype=torch.bool, device=device)
    if problem.right >= 0:
        allowed &= begin <= last + problem.right
    if problem.left >= 0:
        allowed &= end >= first - problem.left
    return allowed


def block_means(x: Tensor, block: int, segments: Tensor | None) -> Tensor:
    """Means over blocks of tokens, float32 [B, H, blocks, D], without tokens of segment -1 (0 if none is left)."""
    length = x.shape[2]
    whole = length // block * block
    weight = None
    if segments is not None:
        used = segments != -1
        x = torch.where(used[:, None, :, None], x, 0)
        counts = [used[:, :whole].unflatten(1, (-1, block)).sum(2)] if whole else []
        if whole < length:
            counts.append(used[:, whole:].sum(1, keepdim=True))
        weight = torch.cat(counts, 1).clamp(min=1)[:, None, :, None]
    parts = []
    if whole:
        parts.append(x[:, :, :whole].unflatten(2, (-1, block)).sum(3, dtype=torch.float32))
    if whole < length:
        parts.append(x[:, :, whole:].sum(2, keepdim=True, dtype=torch.float32))
    sums = torch.cat(parts, 2)
    if weight is not None:
        return sums / weight
    # Computed on the device: a CUDA graph takes no number from the host.
    sizes = (length - block * torch.arange(sums.shape[2], device=x.device)).clamp(max=block)
    return sums / sizes[:, None]


def divergence(
    query: Tensor, key_means: Tensor, problem: Problem, visible: Visible, found: Estimate, scale: float
) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) per head, float32 [B, H].

    Between the sampled queries' attention summed by block, and the softmax of mean query by mean key, over the blocks
    that a window sees any of; windows are averaged by their queries. NaN where nothing was sampled.
    """
    batch, heads, block = problem.batch, problem.heads, problem.block
    kv_heads = key_means.shape[1]
    ends = problem.blocks * block - problem.kv_len
    true = torch.constant_pad_nd(found.columns, (0, ends)).unflatten(2, (-1, block)).sum(3)
    true = true / true.sum(-1, keepdim=True)

    windows = found.starts.shape[1]
    lane = torch.arange(64, device=query.device)
    rows = (found.starts.long()[:, :, None] + lane).clamp(max=problem.q_len - 1)  # [B, W, 64]
    valid = lane < found.counts[:, :, None]
    where = rows.view(batch, 1, -1, 1).expand(-1, heads, -1, query.shape[3])
    sampled = query.gather(2, where).float().unflatten(2, (windows, 64))
    sampled = torch.where(valid[:, None, :, :, None], sampled, 0.0).sum(3)
    means = sampled / found.counts.clamp(min=1)[:, None, :, None]
    grouped = means.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    scores = torch.matmul(grouped, key_means.transpose(2, 3)) * scale
    scores = scores.view(batch, heads, windows, problem.blocks)

    first = found.starts.long()[:, :, None] + problem.offset
    last = first + found.counts[:, :, None] - 1
    key = torch.arange(problem.kv_len, device=query.device)
    seen = torch.ones(batch, windows, problem.kv_len, dtype=torch.bool, device=query.device)
    if problem.right >= 0:
        seen &= key <= last + problem.right
    if problem.left >= 0:
        seen &= key >= first - problem.left
    if visible.kv_segments is not None:
        own = found.starts.new_zeros(batch, windows)
        if visible.q_segments is not None:
            own = visible.q_segments.gather(1, found.starts.long())
        seen &= (visible.kv_segments[:, None] == own[:, :, None]) & (visible.kv_segments != -1)[:, None]
    seen = torch.constant_pad_nd(seen, (0, ends)).unflatten(2, (-1, block)).any(3)
    guess = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    share = found.counts / found.counts.sum(-1, keepdim=True)
    guess = (torch.where(found.counts[:, None, :, None] > 0, guess, 0.0) * share[:, None, :, None]).sum(2)

    middle = (true + guess) / 2

    def relative_entropy(p: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p / middle).log(), p * 0).sum(-1)

    return ((relative_entropy(true) + relative_entropy(guess)) / 2).clamp(min=0).sqrt()


def pooled_blocks(
    query: Tensor,
    key_means: Tensor,
    allowed: Tensor,
    problem: Problem,
    visible: Visible,
    scale: float,
    wanted: Tensor,
    aware: Tensor,
    room: int,
    run: Steps,
) -> Tensor:
    """int8 [B, H, nq, nkv]: of query-aware heads, the fewest blocks of the pooled map that cover ``wanted`` of it.

    ``room``: at most so many of a head, all rows together.
    """
    heads, kv_heads = query.shape[1], key_means.shape[1]
    means = block_means(query, problem.block, None if visible.kv_segments is None else visible.q_segments)
    grouped = means.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    scores = (torch.matmul(grouped, key_means.transpose(2, 3)) * scale).view(problem.batch, heads, problem.rows, -1)
    scores = torch.where(scores.isnan(), -torch.inf, scores).masked_fill_(~allowed, -torch.inf)
    share = torch.nan_to_num_(scores.softmax(-1), nan=0.0)
    limit = torch.where(aware, room, 0).int().contiguous()
    kept = run.keep_best(
        share.flatten(2).contiguous(), most=limit, width=0, share=wanted.contiguous(), least=torch.zeros_like(limit)
    )
    return kept.flags.view(problem.batch, heads, problem.rows, problem.blocks)
