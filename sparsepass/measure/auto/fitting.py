"""From records to a router: fitted on every second request, held against the others."""

from __future__ import annotations

from sparsepass.measure.auto.compare import CANDIDATES, Goal, fitted
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.fit import rows_of
from sparsepass.measure.auto.judge import Verdict, judge
from sparsepass.measure.auto.probe import Probe
from sparsepass.measure.auto.records import Records
from sparsepass.measure.auto.router import Router
from sparsepass.measure.calibrate.bounds import upper_bound

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
    probes = {length: chosen.probe_cost(length, settings) for length in records.lengths()}
    fit = fitted(train, cheap, goal, probes)
    limit = min(LARGEST, fit.limit)
    lengths = [length for length in records.lengths() if length not in fit.untried]
    if not lengths:
        raise AutoError(
            f"Trying {cheap} first costs as much at every length as what runs again: without a hint that runs at once."
        )
    verdict = judge(held, fit.score(held), limit, probes, 1 - goal.confidence, fit.untried)
    about = {key: value for key, value in records.about.items() if key != "probe"}
    router = Router(
        fit.terms,
        fit.bias,
        limit,
        settings if chosen.rows else Probe(0),
        above=max([lengths[0] - lengths[0] // 8 - 1, *fit.untried]),
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
