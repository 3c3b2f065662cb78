"""Eager definitions of vertical-slash and FlexPrefill selection: slow, plain, sharing no code with the kernels.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``. A token diagonal is key index minus
query row, a diagonal of blocks key block minus query block.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor


def windows_reference(
    queries: int, visible: Tensor, q_segments: Tensor | None, kv_segments: Tensor | None, offset: int
) -> list[list[list[int]]]:
    """Rows of each window of 64 sampled queries, per batch item; ``visible`` bool [B, Sq, Skv] gives the shapes.

    Windows are cut from the ends of documents (runs of real rows of one segment): the last 64 rows of each, longest
    document first, then those before. Without segments all rows are one document.
    """
    batch, q_len, kv_len = visible.shape
    found = []
    for item in range(batch):
        runs: list[list[int]] = []
        before: int | None = None
        for row in range(q_len):
            segment = 0 if q_segments is None else int(q_segments[item, row])
            real = kv_segments is None or segment != -1
            if kv_segments is not None and 0 <= row + offset < kv_len:
                real = real and int(kv_segments[item, row + offset]) == segment
            if real and before == segment:
                runs[-1].append(row)
            elif real:
                runs.append([row])
            before = segment if real else None
        cut = []
        for run in runs:
            for turn, end in enumerate(range(len(run), 0, -64)):
                cut.append((turn, -len(run), run[end - 1], run[max(0, end - 64) : end]))
        cut.sort(key=lambda one: one[:3])
        found.append([rows for *_, rows in cut[: queries // 64]])
    return found


def estimate_reference(
    q: Tensor, k: Tensor, windows: list[list[list[int]]], visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The sampled queries' softmax weights, float64: summed per key [B, H, Skv] and per diagonal [B, H, Sq + Skv - 1].

    The first diagonal is ``1 - Sq``. A query that sees nothing, or whose scores are not finite, adds nothing.
    """
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    columns = torch.zeros(batch, heads, kv_len, dtype=torch.float64)
    diagonals = torch.zeros(batch, heads, q_len + kv_len - 1, dtype=torch.float64)
    for item, head in product(range(batch), range(heads)):
        keys = k[item, head * k.shape[1] // heads].double().cpu()
        for row in (row for rows in windows[item] for row in rows):
            seen = visible[item, row].cpu()
            scores = (keys @ q[item, head, row].double().cpu()) * scale
            if not seen.any() or not math.isfinite(float(scores[seen].logsumexp(0))):
                continue
            weights = torch.zeros(kv_len, dtype=torch.float64)
            weights[seen] = scores[seen].softmax(0)
            columns[item, head] += weights
            first = q_len - 1 - row
            diagonals[item, head, first : first + kv_len] += weights
    return columns, diagonals


def best_reference(
    values: list[float], most: int, forced: set[int], share: float | None = None, least: int = 0
) -> list[int]:
    """Indices of the best ``most`` values; with ``share`` of the fewest that sum to it, but ``least``. Ascending.

    Forced ones come first, ties go to the lower index, NaN last. Only positive finite values have mass.
    """
    rank = sorted(
        range(len(values)),
        key=lambda i: (i not in forced, -values[i] if values[i] == values[i] else math.inf, i),
    )
    mass = [x if 0 < x < math.inf else 0.0 for x in values]
    goal = math.inf if share is None else share * math.fsum(mass)
    kept: list[int] = []
    for index in rank:
        if len(kept) >= most:
            break
        enough = share is not None and math.fsum(mass[i] for i in kept) >= goal and len(kept) >= least
        if enough and index not in forced:
            break
        kept.append(index)
    return sorted(kept)


def touched_reference(diagonals: dict[int, float], shift: int, block: int, near: set[int]) -> float:
    """How good a diagonal of blocks is: as the best token diagonal that crosses it; infinite for a near one."""
    best = 0.0
    for diagonal, value in diagonals.items():
        # Row r of a query block meets key r + diagonal: block shifts floor and ceiling of diagonal / block.
        if shift in (diagonal // block, -(-diagonal // block)):
            best = math.inf if diagonal in near else max(best, value if value == value else 0.0)
    return best


def lists_reference(shifts: set[int], allowed: Tensor, q_len: int, offset: int, block: int) -> list[list[int]]:
    """Listed blocks of each row of ``allowed`` bool [nq, nkv]: on kept diagonals, and those that are always kept."""
    rows = []
    for row in range(allowed.shape[0]):
        seen = allowed[row].nonzero().flatten().tolist()
        diagonal = (min((row + 1) * block, q_len) - 1 + offset) // block
        always = {diagonal, diagonal - 1} | set(seen[:1])
        rows.append([b for b in seen if b - row in shifts or b in always])
    return rows


def divergence_reference(true: list[float], guess: list[float]) -> float:
    """Square root of the Jensen-Shannon divergence, natural logarithm."""
    total = 0.0
    for p, q in ((true, guess), (guess, true)):
        total += 0.5 * sum(a * math.log(2 * a / (a + b)) for a, b in zip(p, q, strict=True) if a > 0)
    return math.sqrt(max(0.0, total))
