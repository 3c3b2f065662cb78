"""From records to a router: fitted on every second request, held against the others."""

from __future__ import annotations

import torch

from sparsepass.auto.compare import CANDIDATES, Goal
from sparsepass.auto.error import AutoError
from sparsepass.auto.fit import logistic, rows_of, scores, threshold
from sparsepass.auto.judge import Verdict, judge, not_worth_trying
from sparsepass.auto.probe import Probe
from sparsepass.auto.records import Records
from sparsepass.auto.router import Router
from sparsepass.calibrate.bounds import upper_bound

LARGEST = 1e6
"""Threshold of a router that trusts everything: JSON has no infinity."""


def fit_router(
    records: Records, cheap: str, goal: Goal, *, candidate: str = "router", name: str = "unnamed"
) -> tuple[Router, Verdict]:
    """The router over the signals of one of ``compare.CANDIDATES``, and what it does on requests not fitted on.

    Its lengths are those of the records, and what lies between, but for short ones at which trying does not pay. Raises
    ``AutoError``.
    """
    chosen = next((one for one in CANDIDATES if one.name == candidate and one.signals), None)
    if chosen is None:
        known = ", ".join(repr(one.name) for one in CANDIDATES if one.signals)
        raise AutoError(f"No router reads {candidate!r}; accepted are {known}.")
    settings = Probe(**records.about["probe"])
    tried = set(records.tried())
    train = rows_of(records, records.of(budget=tried), chosen.signals, 0)
    held = rows_of(records, records.of(budget=cheap), chosen.signals, 1)
    terms, bias = logistic(train)
    mine = scores(train, terms, bias)
    is_cheap = torch.tensor([place.budget == cheap for place in train.cells])[train.cell]
    limit = min(LARGEST, threshold(train.take(is_cheap), mine[is_cheap], loss=goal.loss, spare=goal.spare))
    probes = {length: chosen.probe_cost(length, settings) for length in records.lengths()}
    untried = not_worth_trying(train.take(is_cheap), mine[is_cheap], limit, probes)
    lengths = [length for length in records.lengths() if length not in untried]
    if not lengths:
        raise AutoError(
            f"Trying {cheap} first costs as much at every length as what runs again: without a hint that runs at once."
        )
    verdict = judge(held, scores(held, terms, bias), limit, probes, 1 - goal.confidence, untried)
    about = {key: value for key, value in records.about.items() if key != "probe"}
    router = Router(
        terms,
        bias,
        limit,
        settings if chosen.rows else Probe(0),
        above=max([lengths[0] - lengths[0] // 8 - 1, *untried]),
        up_to=lengths[-1],
        name=name,
        budgets=(cheap,),
        calibrated=about,
        shown=shown(verdict, goal),
    )
    return router, verdict


def shown(verdict: Verdict, goal: Goal) -> dict[str, object]:
    """What held-out requests say, as plain JSON: by task what was missed, with its bound, and the cost."""
    return {
        "loss": goal.loss,
        "confidence": goal.confidence,
        "cost": round(verdict.cost, 4),
        "kept": round(verdict.kept, 5),
        "tasks": {
            task: {
                "missed": missed,
                "questions": count,
                "upper": round(upper_bound(missed, count, 1 - goal.confidence), 5),
            }
            for task, (missed, count) in verdict.tasks.items()
        },
    }
