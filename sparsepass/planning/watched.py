"""What a compiled graph tells a monitor: its sampled sites with the policy's floors, and what each class computes."""

from __future__ import annotations

from collections.abc import Sequence

from sparsepass.methods import decode_budget, make_method
from sparsepass.methods.rows import decode_rows, is_row_text
from sparsepass.planning.plan import GraphPlan
from sparsepass.planning.site import Settings, budget_text
from sparsepass.request.observer import WatchedGraph, WatchedSite
from sparsepass.sites import Findings, FoundSite
from sparsepass.types import TASKS, PlanEntry, TaskClass

USUAL_LENGTH = 16384
"""Tokens at which methods whose density follows the length are compared where the length varies."""


def watched_graph(sites: Sequence[int], findings: Findings, plan: GraphPlan, settings: Settings) -> WatchedGraph:
    """``sites``: indexes of those that sample rows, in the order of the graph's added outputs."""
    costs = {}
    for task in TASKS:
        shares = [_share(entry) for entry in plan.plans[task].entries if entry.site.index in sites]
        costs[task] = sum(shares) / len(shares)
    watched = [_site(findings.sites[index], plan, settings) for index in sites]
    return WatchedGraph(tuple(watched), costs)


def _site(found: FoundSite, plan: GraphPlan, settings: Settings) -> WatchedSite:
    bucket = plan.current.bucket
    # Where the op decides by the real length, the strictest floor of any length holds.
    buckets = settings.policy.buckets if bucket is None else settings.policy.within(bucket)
    floors: dict[TaskClass, float] = {}
    for task in TASKS:
        known = [settings.policy.floor(task, one, found.layer) for one in buckets]
        if given := [floor for floor in known if floor is not None]:
            floors[task] = max(given)
    layer = None if found.layer_shared else found.layer
    return WatchedSite(found.site.module or found.site.name, layer, floors, own_hint=found.hint is not None)


def _share(entry: PlanEntry) -> float:
    """Share of the visible blocks that an entry computes; the mean over the lengths where it differs by length."""
    text = budget_text(entry.budget)
    length = entry.site.kv_len if isinstance(entry.site.kv_len, int) else USUAL_LENGTH
    shares = []
    for one in [part.split("=", 1)[1] for part in text.split(";")] if ";" in text else [text]:
        method = make_method(decode_rows(one).cap if is_row_text(one) else decode_budget(one))
        shares.append(1.0 if method.computes_all else method.density_at(length))
    return sum(shares) / len(shares)
