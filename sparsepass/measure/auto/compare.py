"""Which sign of a request predicts that a cheap budget is safe: every signal, on requests that it was not fitted on.

Three ways of holding out, from the mildest: other requests of the same tasks; another template of the question; another
task, each in turn. A score is fitted on the one part, with its threshold, and judged on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.fit import Rows, logistic, rows_of, safe_threshold, scores, threshold
from sparsepass.measure.auto.judge import Verdict, auc, interval, judge, known_before, not_worth_trying, resampled
from sparsepass.measure.auto.probe import SIGNALS, Probe
from sparsepass.measure.auto.records import TOLD, Place, Records
from sparsepass.measure.auto.router import Term

RESAMPLES = 200
"""Of the requests, within each cell, for the intervals."""


@dataclass(frozen=True)
class Goal:
    """``loss``: share of the dense accuracy that may be lost. ``confidence``: of bounds. ``spare``: share of a
    cell's requests that may run again for nothing, spent on failures of a kind that was not seen."""

    loss: float = 0.01
    confidence: float = 0.95
    spare: float = 0.015

    def __post_init__(self) -> None:
        for name, low, high in (("loss", 0, 1), ("confidence", 0, 1), ("spare", -1e-9, 1)):
            if not low < getattr(self, name) < high:
                raise AutoError(f"{name} is {getattr(self, name)}; accepted is a share between 0 and 1.")


@dataclass(frozen=True)
class Candidate:
    """A way to decide. ``signals``: what a fit reads; none: what is known before anything ran, ``key`` of a place."""

    name: str
    signals: tuple[str, ...] = ()
    key: Callable[[Place], object] | None = None
    rows: bool = False
    """Whether it needs rows run again."""
    step: bool = False
    """Whether it needs the last token run again."""

    def probe_cost(self, length: int, settings: Probe) -> float:
        if self.rows:
            return settings.cost(length)
        return Probe(0).cost(length) if self.step else 0.0


CANDIDATES = (
    Candidate("length alone", key=lambda place: place.length),
    Candidate("hint alone", key=lambda place: place.task_class),
    Candidate("length and hint", key=lambda place: (place.task_class, place.length)),
    Candidate("uncertainty", ("entropy",)),
    Candidate("spread of attention", ("spread",), step=True),
    Candidate("activation sparsity", ("activation",), step=True),
    Candidate("recheck", ("shift",), rows=True, step=True),
    Candidate("router without recheck", ("entropy", "margin", "spread", "activation"), step=True),
    Candidate("router", SIGNALS, rows=True, step=True),
)
REFERENCE = CANDIDATES[2]
"""What a calibrated policy does: it is told the class, and knows the length."""


@dataclass(frozen=True)
class Found:
    """One candidate under one way of holding out. ``auc`` and ``at_best`` have 95% intervals: the latter is the share
    of the reference's saving with the best threshold for the held-out rows themselves. ``verdict``: with the threshold
    that the fit had chosen, at the lengths where it had found that trying pays; ``saving`` is that one's share."""

    candidate: str
    held_out: str
    auc: tuple[float, float, float]
    at_best: tuple[float, float, float]
    verdict: Verdict
    saving: float


@dataclass(frozen=True)
class Part:
    """Rows that a score is fitted on, and under the cheap budget those that it is judged on."""

    train: Rows
    test: Rows


@dataclass(frozen=True)
class Comparison:
    """``reference``: cost of the calibrated policy on the same cells, where dense everywhere is 1."""

    found: tuple[Found, ...]
    reference: float
    cheap: str
    goal: Goal

    def of(self, candidate: str, held_out: str) -> Found:
        return next(one for one in self.found if (one.candidate, one.held_out) == (candidate, held_out))


HELD_OUT = ("requests", "template", "task")


def compare(
    records: Records,
    cheap: str,
    goal: Goal,
    candidates: Iterable[Candidate] = CANDIDATES,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Judge every candidate on every way of holding out. ``cheap``: text of the budget that is tried first; the other
    budgets of the records only teach what failing looks like. Raises ``AutoError``."""
    budgets = set(records.tried())
    if cheap not in budgets:
        raise AutoError(f"The records have no budget {cheap!r}; they have {', '.join(sorted(budgets))}.")
    settings = Probe(**records.about["probe"])
    generator = torch.Generator().manual_seed(seed)
    found, cost = [], reference(records, cheap, goal)
    for candidate in candidates:
        for held_out in HELD_OUT:
            parts = split(records, cheap, held_out, candidate)
            if parts:
                rows = together([part.test for part in parts])
                draws = [resampled(rows, generator) for _ in range(resamples)]
                found.append(_judged(candidate, held_out, parts, cheap, settings, goal, cost, draws))
    return Comparison(tuple(found), cost, cheap, goal)


def reference(records: Records, cheap: str, goal: Goal) -> float:
    """Cost of the policy that is told the class: what ran under it, if that was collected; else the cheap budget in
    cells where it loses no more than tolerated."""
    told = [place.density for place in records.of(template=0, budget=TOLD)]
    if told:
        return sum(told) / len(told)
    rows = rows_of(records, records.of(template=0, budget=cheap), ())
    return known_before(rows, rates(rows, rows, REFERENCE), goal.loss + 1e-9, 1 - goal.confidence).cost


def split(records: Records, cheap: str, held_out: str, candidate: Candidate) -> list[Part]:
    """What is fitted on and what is judged on; several parts where tasks take turns."""
    names, tried = candidate.signals, set(records.tried())
    if candidate.key is not None:
        tried = {cheap}
    of = records.of
    if held_out == "requests":
        return [
            Part(
                rows_of(records, of(template=0, budget=tried), names, 0),
                rows_of(records, of(template=0, budget=cheap), names, 1),
            )
        ]
    if held_out == "template":
        others = list(of(template={place.template for place in records.places} - {0}, budget=cheap))
        if not others:
            return []
        return [Part(rows_of(records, of(template=0, budget=tried), names), rows_of(records, others, names))]
    tasks = records.tasks()
    return [
        Part(
            rows_of(records, of(template=0, budget=tried, task=set(tasks) - {task}), names),
            rows_of(records, of(template=0, budget=cheap, task=task), names),
        )
        for task in tasks
        if len(tasks) > 1
    ]


def rates(train: Rows, test: Rows, candidate: Candidate) -> torch.Tensor:
    """The score of a candidate that knows nothing of the run: the share lost of the rows with the same key; infinite
    for a key that was not seen."""
    assert candidate.key is not None  # such a candidate has one
    keys = [candidate.key(place) for place in train.cells]
    share: dict[object, float] = {}
    for key in dict.fromkeys(keys):
        here = torch.tensor([one == key for one in keys])[train.cell]
        if here.any():
            share[key] = float(train.lost[here].double().mean())
    by_cell = torch.tensor([share.get(candidate.key(place), float("inf")) for place in test.cells], dtype=torch.float64)
    return by_cell[test.cell]


def _judged(
    candidate: Candidate,
    held_out: str,
    parts: Sequence[Part],
    cheap: str,
    settings: Probe,
    goal: Goal,
    cost: float,
    draws: Sequence[torch.Tensor],
) -> Found:
    verdicts, ranked = [], []
    probes = {place.length: candidate.probe_cost(place.length, settings) for part in parts for place in part.test.cells}
    error = 1 - goal.confidence
    for part in parts:
        if candidate.key is not None:
            score = rates(part.train, part.test, candidate)
            verdicts.append(known_before(part.test, score, goal.loss + 1e-9, error))
            score = score.clamp_max(1.0)
        else:
            fit = fitted(part.train, cheap, goal, probes)
            score = fit.score(part.test)
            verdicts.append(judge(part.test, score, fit.limit, probes, error, fit.untried))
            score = score - fit.limit  # so that parts with scores of their own can be ranked together
        ranked.append(score)
    verdict = Verdict(tuple(cell for one in verdicts for cell in one.cells))
    rows, score = together([part.test for part in parts]), torch.cat(ranked)

    def best(some: Rows, held: torch.Tensor) -> float:
        limit = safe_threshold(some, held, goal.loss)
        if candidate.key is not None:
            return share_saved(known_before(some, held, limit, error).cost, cost)
        untried = not_worth_trying(some, held, limit, probes)
        return share_saved(judge(some, held, limit, probes, error, untried).cost, cost)

    areas = [auc(score[one], rows.lost[one]) for one in draws]
    bests = [best(rows.take(one), score[one]) for one in draws]
    return Found(
        candidate.name,
        held_out,
        (auc(score, rows.lost), *interval(areas)),
        (best(rows, score), *interval(bests)),
        verdict,
        share_saved(verdict.cost, cost),
    )


@dataclass(frozen=True)
class Fitted:
    """What rows teach: log-odds, the threshold for the budget to be tried, lengths at which trying does not pay."""

    terms: dict[str, Term]
    bias: float
    limit: float
    untried: set[int]

    def score(self, rows: Rows) -> torch.Tensor:
        return scores(rows, self.terms, self.bias)


def fitted(train: Rows, cheap: str, goal: Goal, probes: Mapping[int, float]) -> Fitted:
    """Fit on every row; the threshold and the lengths are those for the rows under ``cheap``. ``probes``: the probe's
    cost by length. Raises ``AutoError``."""
    terms, bias = logistic(train)
    tried = train.take(torch.tensor([place.budget == cheap for place in train.cells])[train.cell])
    score = scores(tried, terms, bias)
    limit = threshold(tried, score, loss=goal.loss, spare=goal.spare)
    return Fitted(terms, bias, limit, not_worth_trying(tried, score, limit, probes))


def share_saved(cost: float, reference_cost: float) -> float:
    """Of what the calibrated policy saves over dense."""
    return (1 - cost) / (1 - reference_cost) if reference_cost < 1 else float("nan")


def together(rows: Sequence[Rows]) -> Rows:
    """Rows of several parts as one, each part's cells after those before."""
    offset, cell = 0, []
    for one in rows:
        cell.append(one.cell + offset)
        offset += len(one.cells)
    return replace(
        rows[0],
        values=torch.cat([one.values for one in rows]),
        lost=torch.cat([one.lost for one in rows]),
        cell=torch.cat(cell),
        cells=tuple(place for one in rows for place in one.cells),
        lost_again=torch.cat([one.lost_again for one in rows]),
        then=tuple(cost for one in rows for cost in one.then),
    )
