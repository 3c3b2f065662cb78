"""Decide what happens to every site, for every task class, before any of it is done.

One captured graph gets one plan per task class, and one for the rows of a mixed batch where the hint is a list. Plans
with equal keys share a compiled graph; where all are equal the graph needs no hint guard. Adjacent length buckets with
equal plans are merged, so dense lengths compile once.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sparsepass.graph import torch_private
from sparsepass.planning.lengths import Range, length_ranges
from sparsepass.planning.mix import BucketClasses, MixTable, SiteClasses
from sparsepass.planning.site import (
    Settings,
    budget_text,
    entry_for,
    entry_of_text,
    equivalent_length,
    limit_for,
    policy_budgets,
    refusal,
)
from sparsepass.request import observer as watch
from sparsepass.request.hints import alike, current_hint, parse_hint_text
from sparsepass.sites import Findings, FoundSite
from sparsepass.types import DENSE, TASKS, LengthBucket, Phase, Plan, PlanEntry, Rows, Skip, TaskClass

__all__ = ["GraphPlan", "Settings", "budget_text", "plan_graph", "plan_keys"]

plan_keys: dict[str, Callable[[], str]] = {}
"""What the hint guards call: the key of the plan that the current hint resolves to, per distinct table of plans.

An entry is there as long as a graph that is guarded on it. Part of the package's surface (``sparsepass.plan_keys``)
because Dynamo's guards can reach nothing deeper.
"""

MIX_DENSE = "the rows' mean density is not expected to pay, or the policy is dense for all of them"


@dataclass(frozen=True)
class GraphPlan:
    """Plans of one graph by task class, the one in force, and what has to be guarded for it to stay right."""

    plans: dict[TaskClass | Rows, Plan]
    """By class; and by the classes of the rows, where the hint in force is a list of several."""
    task: TaskClass | Rows
    registered: Registered | None
    """What the graph is guarded on; None where every hint gets the same plan."""
    length_guards: tuple[str, ...] = ()
    lengths: tuple[tuple[int | torch.SymInt, LengthBucket], ...] = ()
    """Key lengths of the sparse sites, each with the range that the plan holds in."""
    sampled: int = 0
    """Query rows that each sparse site samples for the monitor in force; 0 without one."""

    @property
    def registry_key(self) -> str | None:
        """Entry of ``plan_keys`` that the graph is guarded on."""
        return None if self.registered is None else self.registered.name

    @property
    def current(self) -> Plan:
        return self.plans[self.task]


def plan_graph(findings: Findings, settings: Settings) -> GraphPlan:
    """Plan every site for every task class. Installs the guards on sizes; that on the hint is the caller's."""
    refusals = {found.site.index: refusal(found) for found in findings.sites}
    for found in findings.sites:
        if refusals[found.site.index] is None:
            torch_private.fix(found.head_sizes)
    ranges, guards = length_ranges(findings, refusals, settings)
    shown = next((ranges[found.site.index].guarded for found in findings.prefill if found.site.index in ranges), None)

    own = _own_mixes(findings, refusals, ranges, settings)
    by_class = [[_alone(f, task, refusals, ranges, settings, own) for f in findings.sites] for task in TASKS]
    alone = [tuple(budget_text(entries[i].budget) for entries in by_class) for i in range(len(findings.sites))]
    table = MixTable(
        [
            _site_classes(f, texts, None if refusals[f.site.index] or f.hint else ranges[f.site.index], settings)
            for f, texts in zip(findings.sites, alone, strict=True)
        ]
    )
    plans: dict[TaskClass | Rows, Plan] = {
        task: Plan(task, shown, tuple(entries), _key(table, task))
        for task, entries in zip(TASKS, by_class, strict=True)
    }
    wanted = settings.wanted()
    task = alike(wanted) or wanted
    if isinstance(task, tuple):
        one = plans[task[0]].entries
        texts = table.texts(task)
        mixed = [
            entry if budget_text(entry.budget) == text else entry_of_text(found, text, MIX_DENSE)
            for found, text, entry in zip(findings.sites, texts, one, strict=True)
        ]
        plans[task] = Plan(task, shown, tuple(mixed), _key(table, task))
    watching = watch.current()
    sampled = 0 if watching is None else watching.rows
    registered = _register(table, settings) if table.differs else None
    return GraphPlan(plans, task, registered, guards, _sparse_lengths(findings, plans[task], ranges), sampled)


def _sparse_lengths(
    findings: Findings, plan: Plan, ranges: Mapping[int, Range]
) -> tuple[tuple[int | torch.SymInt, LengthBucket], ...]:
    found: dict[str, tuple[int | torch.SymInt, LengthBucket]] = {}
    for site, entry in zip(findings.sites, plan.entries, strict=True):
        if not entry.budget.dense and (span := ranges[site.site.index].guarded) is not None:
            found[str(site.key_shape[2])] = (site.key_shape[2], span)
    return tuple(found.values())


def _key(table: MixTable, hint: TaskClass | Rows) -> str:
    """The key of the plan that a hint means now: a graph that is watched is another one."""
    key = table.key(hint)
    watching = watch.current()
    return key if watching is None or not table.watchable(key) else key + watching.suffix


def _alone(
    found: FoundSite,
    task: TaskClass,
    refusals: Mapping[int, Skip | None],
    ranges: Mapping[int, Range],
    settings: Settings,
    own: Mapping[int, PlanEntry],
) -> PlanEntry:
    """The entry of a site for a batch of one class, which the site's own hint overrules."""
    skip = refusals[found.site.index]
    if skip is not None:
        return PlanEntry(found.site, DENSE, reason=skip.reason)
    if found.site.index in own:
        return own[found.site.index]
    if found.hint is not None:
        task = alike(parse_hint_text(found.hint)) or task
    return entry_for(found, task, ranges[found.site.index].bucket, settings)


def _own_mixes(
    findings: Findings, refusals: Mapping[int, Skip | None], ranges: Mapping[int, Range], settings: Settings
) -> dict[int, PlanEntry]:
    """Entries of the sites that have a list of hints of their own, given inside the compiled region."""
    groups: dict[Rows, list[FoundSite]] = {}
    for found in findings.sites:
        rows = None if found.hint is None else parse_hint_text(found.hint)
        if isinstance(rows, tuple) and alike(rows) is None and refusals[found.site.index] is None:
            groups.setdefault(rows, []).append(found)
    entries = {}
    for rows, members in groups.items():
        sites = []
        for found in members:
            span = ranges[found.site.index]
            alone = tuple(budget_text(entry_for(found, task, span.bucket, settings).budget) for task in TASKS)
            sites.append(_site_classes(found, alone, span, settings))
        for found, text in zip(members, MixTable(sites).texts(rows), strict=True):
            entries[found.site.index] = entry_of_text(found, text, MIX_DENSE)
    return entries


def _site_classes(found: FoundSite, alone: tuple[str, ...], span: Range | None, settings: Settings) -> SiteClasses:
    """What mixed batches need to know of a site; nothing can differ by row at one without a range of lengths."""
    counted = found.site.phase is Phase.PREFILL
    if span is None:
        return SiteClasses(alone, counted=counted)
    if span.bucket is not None:
        buckets = [_bucket_classes(found, span.bucket, span.merged, settings)]
    else:
        every = settings.policy.buckets
        buckets = [replace(_bucket_classes(found, each, (each,), settings), high=each.high) for each in every]
    return SiteClasses(alone, tuple(buckets), torch_private.hint_value(found.query_shape[0]) is not None, counted)


def _bucket_classes(
    found: FoundSite, bucket: LengthBucket, merged: Sequence[LengthBucket], settings: Settings
) -> BucketClasses:
    """Of merged buckets the most cautious limit counts: the graph is the same whichever of them it is compiled in."""
    budgets = policy_budgets(found, bucket, settings)
    limits: dict[str, float] = {}
    for budget in budgets:
        if budget.dense:
            continue
        limit = min(limit_for(found, budget, each, settings) for each in merged)
        limits[budget.method] = min(limit, limits.get(budget.method, limit))
    return BucketClasses(budgets, equivalent_length(found.site, bucket), tuple(sorted(limits.items())))


@dataclass(frozen=True, eq=False)
class Registered:
    """An entry of ``plan_keys``, there as long as this object is."""

    name: str
    key: Callable[[], str]
    """The key of the plan that the hint in force means."""


_registered: weakref.WeakValueDictionary[str, Registered] = weakref.WeakValueDictionary()
_lock = threading.RLock()
"""Taken again where the collector runs ``_forget`` inside ``_register``."""


def _register(table: MixTable, settings: Settings) -> Registered:
    """Enter the keys of a table into ``plan_keys``; equal tables share an entry."""
    content = repr((table.content, settings.task))
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    default = settings.task or TaskClass.UNKNOWN
    with _lock:
        found = _registered.get(name)
        if found is None:
            found = Registered(name, lambda: _key(table, watch.in_force(current_hint() or default)))
            _registered[name] = found
            plan_keys[name] = found.key
            weakref.finalize(found, _forget, name, found.key).atexit = False
    return found


def _forget(name: str, key: Callable[[], str]) -> None:
    with _lock:
        if plan_keys.get(name) is key:  # not one that was entered since
            del plan_keys[name]
