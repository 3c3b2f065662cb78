"""How a vertical-slash or FlexPrefill selection is held against the eager reference, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.attend.reference import visible_pairs
from sparsepass.kernels.slash import api as slash
from sparsepass.kernels.slash import flex_prefill as flex
from sparsepass.kernels.slash.api import Estimate, Problem, Steps
from sparsepass.kernels.slash.reference import (
    best_reference,
    divergence_reference,
    estimate_reference,
    lists_reference,
    touched_reference,
    windows_reference,
)
from sparsepass.kernels.slash.windows import WINDOW, sample_windows
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing import Case, listed_blocks, poisoned_empty

BLOCK = 64
ROUNDING = 3e-5
"""Relative: of sums of float32 in another order, and of the pooled map's scores."""


@dataclass(frozen=True)
class Drawn:
    """A case as a selection sees it: blocks of 64, its tensors, its mask."""

    q: Tensor
    k: Tensor
    visible: Visible
    pairs: Tensor
    allowed: Tensor
    problem: Problem
    scale: float

    @classmethod
    def of(cls, case: Case, device: str) -> Drawn:
        inputs = case.tensors(device)
        mask = {name: inputs.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
        size = (case.q_len, case.kv_len)
        pairs = visible_pairs(*size, batch=case.batch, device=device, **mask).cpu()
        padded = torch.nn.functional.pad(pairs, (0, -case.kv_len % BLOCK, 0, -case.q_len % BLOCK))
        allowed = padded.unflatten(2, (-1, BLOCK)).any(3).unflatten(1, (-1, BLOCK)).any(2)
        problem = Problem(case.batch, case.heads, *size, case.left, case.right, case.offset, BLOCK)
        return cls(inputs.q, inputs.k, Visible(**mask), pairs, allowed, problem, case.scale)

    def windows(self, queries: int) -> list[list[list[int]]]:
        given = (self.visible.q_segments, self.visible.kv_segments)
        return windows_reference(queries, self.pairs, *given, self.visible.offset)

    def sample(self, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        return sample_windows(
            queries,
            batch=self.problem.batch,
            q_len=self.problem.q_len,
            kv_len=self.problem.kv_len,
            offset=self.problem.offset,
            q_segments=self.visible.q_segments,
            kv_segments=self.visible.kv_segments,
            device=self.q.device,
        )


def check_windows(drawn: Drawn, queries: int) -> None:
    starts, counts, first_key = (x.tolist() for x in drawn.sample(queries))
    for item, expected in enumerate(drawn.windows(queries)):
        got = [list(range(s, s + n)) for s, n in zip(starts[item], counts[item], strict=True) if n]
        assert got == expected
        assert max(map(len, got), default=0) <= WINDOW
        kv = drawn.visible.kv_segments
        real = list(range(drawn.problem.kv_len)) if kv is None else (kv[item] != -1).nonzero().flatten().tolist()
        assert first_key[item] == (real[0] if real else drawn.problem.kv_len)


def check_estimate(drawn: Drawn, queries: int, steps: Steps) -> Estimate:
    with poisoned_empty():
        found = slash.estimate(drawn.q, drawn.k, drawn.problem, drawn.visible, drawn.scale, queries, steps)
    columns, diagonals = estimate_reference(drawn.q, drawn.k, drawn.windows(queries), drawn.pairs, drawn.scale)
    first = drawn.problem.first_diagonal - (1 - drawn.problem.q_len)
    inner = torch.zeros(*diagonals.shape[:2], drawn.problem.diagonals, dtype=torch.float64)
    part = diagonals[..., max(0, first) : first + drawn.problem.diagonals]
    inner[..., max(0, -first) : max(0, -first) + part.shape[-1]] = part
    assert float(part.sum()) == math.fsum([float(diagonals.sum())]) or torch.isclose(part.sum(), diagonals.sum())
    torch.testing.assert_close(found.columns.cpu().double(), columns, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.diagonals.cpu().double(), inner, atol=2e-3, rtol=2e-3)
    return found


def check_lists(drawn: Drawn, lists: BlockLists, counter: Tensor | None = None) -> Tensor:
    """What every selection must keep to, whatever the data; returns the listed blocks, bool [B, H, nq, nkv]."""
    problem, allowed = drawn.problem, drawn.allowed[:, None]
    named = listed_blocks(lists.kv_num_blocks, lists.kv_indices, problem.blocks).cpu()
    assert not (named & ~allowed).any(), "a block without a visible pair"
    for row in range(problem.rows):
        diagonal = (min((row + 1) * BLOCK, problem.q_len) - 1 + problem.offset) // BLOCK
        always = drawn.allowed[:, row].cumsum(-1) == 1
        for block in (diagonal - 1, diagonal):
            if 0 <= block < problem.blocks:
                always[:, block] = True
        assert not (always & drawn.allowed[:, row])[:, None].logical_and(~named[:, :, row]).any(), "always kept"
    if lists.columns is not None:
        num, indices = lists.columns.num.cpu(), lists.columns.indices.cpu()
        assert num.shape == (problem.batch, problem.heads, 1)
        for item, head in product(range(problem.batch), range(problem.heads)):
            entries = indices[item, head, 0, : int(num[item, head, 0])].tolist()
            assert entries == sorted(set(entries))
            assert all(0 <= entry < problem.kv_len for entry in entries)
    if counter is not None:
        assert counter.tolist() == [0, 0, int(drawn.allowed.sum()) * problem.heads]
    return named


def check_cap(drawn: Drawn, lists: BlockLists, named: Tensor, item: int, head: int, share: float) -> None:
    """A head computes at most ``share`` of what the band shows; rows keep ``ALWAYS_KEPT`` blocks whatever it is.

    Columns count as the blocks that those outside a row's listed blocks would fill. The budget is in whole blocks per
    row. One block more is allowed: of the last row, which may end before its block does.
    """
    problem = drawn.problem
    band = [int(row.sum()) for row in flex.band_blocks(problem, drawn.q.device)]
    total, budget = sum(band), 0
    while budget < max(band, default=0) and sum(min(n, budget) for n in band) < share * total:
        budget += 1
    columns = torch.tensor(columns_of(lists, item, head), dtype=torch.int64)
    computed = 0
    for row in range(problem.rows):
        seen = drawn.pairs[item, row * BLOCK : (row + 1) * BLOCK].any(0)
        outside = seen[columns] & ~named[item, head, row][columns // BLOCK]
        computed += int(named[item, head, row].sum()) - int(-outside.sum() // BLOCK)
    assert computed <= sum(min(n, max(3, budget)) for n in band) + 1


def columns_of(lists: BlockLists, item: int, head: int) -> list[int]:
    if lists.columns is None:
        return []
    entries: list[int] = lists.columns.indices[item, head, 0, : int(lists.columns.num[item, head, 0])].tolist()
    return entries


def best_shifts(problem: Problem, diagonals: list[float], most: int, usable: set[int] | None) -> set[int]:
    """Diagonals of blocks to keep, by the reference; ``usable``: the token diagonals that may be chosen by."""
    by_diagonal = {problem.first_diagonal + i: value for i, value in enumerate(diagonals)}
    near = {problem.offset - i for i in range(slash.NEAR)} & set(by_diagonal)
    shifts = range(problem.first_shift, problem.first_shift + problem.shifts)
    values = [touched_reference(by_diagonal, shift, problem.block, near) for shift in shifts]
    kept = {problem.first_shift + i for i in best_reference(values, most, set())}
    if usable is None:
        return kept
    crossed = near | usable
    return {s for s in kept if any(s in (d // problem.block, -(-d // problem.block)) for d in crossed)}


def check_vertical_slash(
    drawn: Drawn, steps: Steps, density: float, dial: Tensor | None, columns: int | None, slashes: int | None
) -> None:
    """The selection against the reference's, both from the same estimate (sums differ by rounding otherwise)."""
    problem = drawn.problem
    counter = torch.zeros(3, dtype=torch.int64, device=drawn.q.device)
    options: dict[str, Any] = {"scale": drawn.scale, "visible": drawn.visible, "block": BLOCK, "queries": 64}
    with poisoned_empty():
        lists = slash.select_vertical_slash(
            drawn.q,
            drawn.k,
            **options,
            density=density,
            dial=dial,
            columns=columns,
            slashes=slashes,
            counter=counter,
            steps=steps,
        )
        found = slash.estimate(drawn.q, drawn.k, problem, drawn.visible, drawn.scale, 64, steps)
    named = check_lists(drawn, lists, counter)
    for item, head in product(range(problem.batch), range(problem.heads)):
        wanted = density
        if dial is not None:
            wanted = min(density, float(dial[item % dial.shape[0], head % dial.shape[1]]))
        budget = problem.budget(wanted)
        tokens = min(max(0, min(budget // 2, budget - 3)) * BLOCK, 1 << 30 if columns is None else columns)
        blocks = max(3, budget - -(-tokens // BLOCK))
        check_cap(drawn, lists, named, item, head, wanted)
        if wanted >= 1:
            assert torch.equal(named[item, head], drawn.allowed[item])
            assert not columns_of(lists, item, head)
            continue
        first = int(found.first_key[item])
        sink = {first + i for i in range(slash.SINK_TOKENS)} & set(range(problem.kv_len))
        expected = best_reference(found.columns[item, head].tolist(), tokens, sink)
        assert columns_of(lists, item, head) == expected
        diagonals = found.diagonals[item, head].tolist()
        usable = None
        if slashes is not None:
            usable = slash_floor(problem, diagonals, slashes)
        shifts = best_shifts(problem, diagonals, most_shifts(problem, blocks), usable)
        rows = lists_reference(shifts, drawn.allowed[item], problem.q_len, problem.offset, BLOCK)
        assert [x.nonzero().flatten().tolist() for x in named[item, head]] == rows


def most_shifts(problem: Problem, blocks: int) -> int:
    """Diagonals of blocks that fit into rows of ``blocks``: of the three that near ones touch, two are always kept."""
    return 0 if blocks == 3 and problem.offset % BLOCK else blocks - 1


def slash_floor(problem: Problem, diagonals: list[float], slashes: int) -> set[int]:
    """Token diagonals at least as good as the last of the best ``slashes``."""
    kept = best_reference(diagonals, slashes, set())
    least = min((diagonals[i] for i in kept), default=math.inf)
    return {problem.first_diagonal + i for i, value in enumerate(diagonals) if value >= least}


def check_flex(drawn: Drawn, steps: Steps, gamma: float, tau: float, min_budget: int) -> None:
    """Divergence against the reference; the sets and the map against the reference's from the same estimate.

    Where a sum comes near its goal, rounding decides on the last of a set: what is kept lies between the sets of goals
    a little under and over.
    """
    problem, most = drawn.problem, 0.6
    counter = torch.zeros(3, dtype=torch.int64, device=drawn.q.device)
    with poisoned_empty():
        lists = flex.select_flex_prefill(
            drawn.q,
            drawn.k,
            scale=drawn.scale,
            visible=drawn.visible,
            gamma=gamma,
            tau=tau,
            min_budget=min_budget,
            most=most,
            block=BLOCK,
            counter=counter,
            steps=steps,
        )
        found = slash.estimate(drawn.q, drawn.k, problem, drawn.visible, drawn.scale, 128, steps)
    named = check_lists(drawn, lists, counter)
    if gamma >= 1:
        assert torch.equal(named, drawn.allowed[:, None].expand_as(named))
        return
    keys = flex.block_means(drawn.k, BLOCK, drawn.visible.kv_segments)
    got = flex.divergence(drawn.q, keys, problem, drawn.visible, found, drawn.scale)
    expected = expected_divergence(drawn, found)
    torch.testing.assert_close(got.cpu().double(), expected, atol=2e-3, rtol=2e-3, equal_nan=True)
    most_blocks, most_columns = problem.split(problem.budget(most), None)
    most_kept = most_shifts(problem, most_blocks)
    least_kept = min(most_kept, -(-min_budget // BLOCK))
    least = min(min_budget, most_columns)
    kept_by_sets = 1 + max(least_kept, 3 if problem.offset % BLOCK else 2) + -(-least // BLOCK)
    room = slash.flattened_limit(problem, most, kept_by_sets)
    for item, head in product(range(problem.batch), range(problem.heads)):
        aware = tau > 0 and float(got[item, head]) < tau
        check_cap(drawn, lists, named, item, head, most)
        sink = {int(found.first_key[item]) + i for i in range(slash.SINK_TOKENS)} & set(range(problem.kv_len))
        sums, diagonals = found.columns[item, head].tolist(), found.diagonals[item, head].tolist()
        pooled = (set(), set()) if not aware else pooled_map(drawn, item, head, gamma, room)
        columns, rows = [], []
        for turn, slack in enumerate((-ROUNDING, ROUNDING)):
            share = 0.0 if aware else gamma * (1 + slack)
            columns.append(set(best_reference(sums, most_columns, sink, share, least)))
            kept = best_reference(diagonals, problem.diagonals, set(), share)
            shifts = best_shifts(problem, diagonals, least_kept, None)
            if kept:  # near diagonals are within the best; without a best there is none
                last = min(diagonals[i] for i in kept)
                usable = {problem.first_diagonal + i for i, value in enumerate(diagonals) if value >= last}
                shifts |= best_shifts(problem, diagonals, most_kept, usable)
            listed = lists_reference(shifts, drawn.allowed[item], problem.q_len, problem.offset, BLOCK)
            rows.append({(row, block) for row, blocks in enumerate(listed) for block in blocks} | pooled[turn])
        assert columns[0] <= set(columns_of(lists, item, head)) <= columns[1]
        assert rows[0] <= {(row, block) for row, block in named[item, head].nonzero().tolist()} <= rows[1]


def pooled_map(drawn: Drawn, item: int, head: int, gamma: float, room: int) -> tuple[set[Any], set[Any]]:
    """(row, block) pairs that a query-aware head takes from the pooled map: those it must, and those it may."""
    problem, kv = drawn.problem, drawn.visible.kv_segments
    q_segments = None if kv is None else drawn.visible.q_segments
    queries = means_of(drawn.q[item, head], None if q_segments is None else q_segments[item])
    keys = means_of(drawn.k[item, head * drawn.k.shape[1] // problem.heads], None if kv is None else kv[item])
    allowed = drawn.allowed[item]
    scores = (queries @ keys.T * drawn.scale).masked_fill(~allowed, -math.inf)
    shares = scores.softmax(-1).nan_to_num(nan=0.0).flatten().tolist()
    kept = [best_reference(shares, room, set(), gamma * (1 + slack)) for slack in (-ROUNDING, ROUNDING)]
    last = [min((shares[i] for i in found if shares[i] > 0), default=math.inf) for found in kept]
    must = {i for i, value in enumerate(shares) if value > last[0] * (1 + ROUNDING)}
    may = {i for i, value in enumerate(shares) if value > 0 and value >= last[1] * (1 - ROUNDING)}
    width = problem.blocks
    return {divmod(i, width) for i in must}, {divmod(i, width) for i in may}


def means_of(x: Tensor, segments: Tensor | None) -> Tensor:
    """Means of blocks of [S, D] without tokens of segment -1, float64; 0 where none is left."""
    parts = []
    for begin in range(0, x.shape[0], BLOCK):
        part = x[begin : begin + BLOCK].double().cpu()
        if segments is not None:
            part = part[(segments[begin : begin + BLOCK] != -1).cpu()]
        parts.append(part.mean(0) if len(part) else torch.zeros(x.shape[1], dtype=torch.float64))
    return torch.stack(parts)


def expected_divergence(drawn: Drawn, found: Estimate) -> Tensor:
    problem = drawn.problem
    result = torch.full((problem.batch, problem.heads), math.nan, dtype=torch.float64)
    windows = drawn.windows(128)
    kv = drawn.visible.kv_segments
    for item, head in product(range(problem.batch), range(problem.heads)):
        keys = drawn.k[item, head * drawn.k.shape[1] // problem.heads].double().cpu()
        sums = found.columns[item, head].double().cpu()
        true = [float(part.sum() / sums.sum()) for part in sums.split(BLOCK)]
        guess = torch.zeros(problem.blocks, dtype=torch.float64)
        total = sum(map(len, windows[item]))
        for rows in windows[item]:
            mean = drawn.q[item, head, rows].double().cpu().mean(0)
            position = torch.tensor(rows) + problem.offset
            key = torch.arange(problem.kv_len)
            seen = torch.ones(problem.kv_len, dtype=torch.bool)
            if problem.right >= 0:
                seen &= key <= position[-1] + problem.right
            if problem.left >= 0:
                seen &= key >= position[0] - problem.left
            if kv is not None:
                q_segments = drawn.visible.q_segments
                own = 0 if q_segments is None else int(q_segments[item, rows[0]])
                seen &= (kv[item] == own).cpu() & (kv[item] != -1).cpu()
            scores = []
            for block in range(problem.blocks):
                part = slice(block * BLOCK, (block + 1) * BLOCK)
                used = torch.ones_like(seen[part]) if kv is None else (kv[item, part] != -1).cpu()
                middle = keys[part][used].mean(0) if used.any() else torch.zeros_like(mean)
                scores.append(float(mean @ middle) * drawn.scale if seen[part].any() else -math.inf)
            if max(scores) > -math.inf:
                guess += torch.tensor(scores, dtype=torch.float64).softmax(0) * len(rows) / total
            else:
                guess += math.nan
        values = guess.tolist()
        if not any(map(math.isnan, [*true, *values])):
            result[item, head] = divergence_reference(true, values)
    return result
