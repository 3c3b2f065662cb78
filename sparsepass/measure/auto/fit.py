"""Fit a router: a logistic regression on the signals, and a threshold between missed failures and false alarms.

A row is one request under one budget. It counts if dense answers the request right, and is ``lost`` if the budget does
not. The regression learns from every budget, the threshold is set for the one that is to be used. Weights are 0 or
more, since every signal is larger where it is worse: so a fit on some tasks cannot turn a signal around for a task that
it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.records import THEN, Place, Records
from sparsepass.measure.auto.router import Term

RIDGE = 1e-2
"""Penalty on the weights' squares: where signals separate the rows perfectly, they would grow without end."""


@dataclass(frozen=True)
class Rows:
    """Requests that dense answers right: signals [N, K], lost [N], and the cell (a number) each belongs to [N].

    ``lost_again`` [N]: lost as well if it runs again; ``then``: what that costs, by cell, where dense is 1.
    """

    names: tuple[str, ...]
    values: torch.Tensor
    lost: torch.Tensor
    cell: torch.Tensor
    cells: tuple[Place, ...]
    lost_again: torch.Tensor
    then: tuple[float, ...]

    def missed(self, again: torch.Tensor) -> torch.Tensor:
        """Which are lost, bool [N], if those of ``again`` [N] run again."""
        return torch.where(again, self.lost_again, self.lost)

    def take(self, chosen: torch.Tensor) -> Rows:
        values, lost, again, cell = (x[chosen] for x in (self.values, self.lost, self.lost_again, self.cell))
        return replace(self, values=values, lost=lost, lost_again=again, cell=cell)


def rows_of(records: Records, places: Iterable[Place], names: Sequence[str], part: int | None = None) -> Rows:
    """The rows of ``places``. ``part``: 0 or 1 takes every second request, None all. Raises ``AutoError``."""
    values: list[list[float]] = []
    lost: list[bool] = []
    lost_again: list[bool] = []
    then: list[float] = []
    cell: list[int] = []
    cells: list[Place] = []
    for place in places:
        dense = records.like(place, "dense")
        if dense is None:
            raise AutoError(f"The records have no dense run of {place.task} at {place.length}; collect them again.")
        if missing := set(names) - set(place.signals):
            raise AutoError(f"The records have no signal {', '.join(sorted(missing))} of {place.budget}.")
        counts = [at for at, right in enumerate(dense.right) if right and (part is None or at % 2 == part)]
        columns = [place.signals[name] for name in names]
        values += [[column[at] for column in columns] for at in counts]
        lost += [not place.right[at] for at in counts]
        second = records.like(place, THEN) or dense
        lost_again += [not second.right[at] for at in counts]
        then.append(second.density)
        cell += [len(cells)] * len(counts)
        cells.append(place)
    return Rows(
        tuple(names),
        torch.tensor(values, dtype=torch.float64).view(len(lost), len(names)),
        torch.tensor(lost, dtype=torch.bool),
        torch.tensor(cell, dtype=torch.long),
        tuple(cells),
        torch.tensor(lost_again, dtype=torch.bool),
        tuple(then),
    )


def logistic(rows: Rows, ridge: float = RIDGE) -> tuple[dict[str, Term], float]:
    """Terms and bias of the log-odds that a row is lost. Lost and kept rows weigh alike in all, and so does each cell
    among its kind. Raises ``AutoError`` where there are none of either."""
    if not rows.lost.any() or rows.lost.all():
        kind = "lost" if rows.lost.all() else "kept"
        raise AutoError(f"Every one of {len(rows.lost)} rows is {kind}; a fit needs both: collect under other budgets.")
    mean = rows.values.mean(0)
    scale = rows.values.std(0).clamp_min(1e-6)
    inputs = (rows.values - mean) / scale
    weight = torch.zeros(len(rows.lost), dtype=torch.float64)
    for outcome in (rows.lost, ~rows.lost):
        sizes = torch.bincount(rows.cell[outcome], minlength=len(rows.cells)).double()
        each = 1.0 / sizes[rows.cell[outcome]]
        weight[outcome] = each / each.sum()
    target = rows.lost.double()

    # Weights are squares, so that they cannot fall under 0.
    root = torch.full((len(rows.names),), 0.5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([root, bias], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        odds = inputs @ root.square() + bias
        each = torch.nn.functional.binary_cross_entropy_with_logits(odds, target, reduction="none")
        total = (weight * each).sum() + ridge * root.pow(4).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    weights = root.detach().square().tolist()
    terms = {
        name: Term(float(one), float(other), part)
        for name, one, other, part in zip(rows.names, mean, scale, weights, strict=True)
    }
    return terms, float(bias.detach())


def scores(rows: Rows, terms: Mapping[str, Term], bias: float) -> torch.Tensor:
    """Log-odds [N] of rows."""
    weights = torch.tensor([terms[name].weight / terms[name].scale for name in rows.names], dtype=torch.float64)
    means = torch.tensor([terms[name].mean for name in rows.names], dtype=torch.float64)
    return (rows.values - means) @ weights + bias


def safe_threshold(rows: Rows, score: torch.Tensor, loss: float) -> float:
    """The largest threshold under which no task misses more than a share ``loss`` of its rows, over all lengths: rows
    under it are trusted."""
    limit = float("inf")
    tasks = [place.task for place in rows.cells]
    for task in dict.fromkeys(tasks):
        here = torch.tensor([one == task for one in tasks])[rows.cell]
        failed = score[here & rows.lost].sort().values
        allowed = int(loss * int(here.sum()))
        if len(failed) > allowed:
            limit = min(limit, float(failed[allowed]))
    return limit


def spare_threshold(rows: Rows, score: torch.Tensor, spare: float) -> float:
    """The smallest threshold at which no cell runs more than a share ``spare`` of its kept rows again for nothing: what
    can be afforded, spent on failures of a kind that was not seen. Cells that lose most of their rows do not count."""
    least = -float("inf")
    for cell in range(len(rows.cells)):
        here = rows.cell == cell
        kept = score[here & ~rows.lost].sort(descending=True).values
        if len(kept) and 2 * len(kept) >= int(here.sum()):
            least = max(least, float(kept[min(int(spare * len(kept)), len(kept) - 1)]) + 1e-9)
    return least


def threshold(rows: Rows, score: torch.Tensor, *, loss: float, spare: float) -> float:
    """Of both thresholds the smaller, for rows under the budget that is to be used. Half of ``loss`` is left to what a
    fit does not see."""
    return min(safe_threshold(rows, score, loss / 2), spare_threshold(rows, score, spare))
