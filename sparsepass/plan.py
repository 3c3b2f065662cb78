"""Decide what happens to every site, for every task class, before any of it is done.

One captured graph gets one plan per task class. Plans with equal keys share a compiled graph; where all are equal the
graph needs no hint guard. Adjacent length buckets with equal plans are merged, so dense lengths compile once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparsepass import dynamo
from sparsepass.crossover import Verdict, sparse_wins
from sparsepass.hints import current_hint, resolve_hint
from sparsepass.kernels.support import why_not
from sparsepass.mask import MaskTerms
from sparsepass.methods import encode_budget, make_method
from sparsepass.policy import Policy
from sparsepass.sites import Findings, FoundSite
from sparsepass.types import BY_LENGTH, DENSE, Align, Budget, LengthBucket, Phase, Plan, PlanEntry, Skip, TaskClass

plan_keys: dict[str, Callable[[], str]] = {}
"""What the hint guards call: the key of the plan that the current hint resolves to, per distinct table of plans.

Part of the package's surface (``sparsepass.plan_keys``) because Dynamo's guards can reach nothing deeper.
"""

TASKS = tuple(TaskClass)


@dataclass(frozen=True)
class Settings:
    """What the user asked of one compiled region."""

    policy: Policy
    task: TaskClass | None = None
    """Class when no hint is in force; None is the hardest."""
    always_sparse: bool = False
    """Ignore the measured crossover: every site with a budget under dense goes through the sparse kernel."""

    def wanted(self) -> TaskClass:
        return current_hint() or self.task or TaskClass.UNKNOWN


@dataclass(frozen=True)
class GraphPlan:
    """Plans of one graph by task class, the one in force, and what has to be guarded for it to stay right."""

    plans: dict[TaskClass, Plan]
    task: TaskClass
    registry_key: str | None
    """Entry of ``plan_keys`` that the graph is guarded on; None where every class gets the same plan."""
    length_guards: tuple[str, ...] = ()

    @property
    def current(self) -> Plan:
        return self.plans[self.task]


@dataclass(frozen=True, slots=True)
class _Range:
    """The policy's bucket that a site's key length is in, and the run of buckets that its graph is guarded to."""

    bucket: LengthBucket | None
    guarded: LengthBucket | None


def plan_graph(findings: Findings, settings: Settings) -> GraphPlan:
    """Plan every site for every task class. Installs the length guards; the hint guard is the caller's to install."""
    refusals = {found.site.index: _refusal(found) for found in findings.sites}
    ranges, guards = _length_ranges(findings, refusals, settings)
    plans = {}
    for task in TASKS:
        entries = []
        for found in findings.sites:
            skip = refusals[found.site.index]
            if skip is not None:
                entries.append(PlanEntry(found.site, DENSE, reason=skip.reason))
                continue
            own = resolve_hint(found.hint) if found.hint is not None else task
            entries.append(_entry(found, own, ranges[found.site.index].bucket, settings))
        shown = next(
            (ranges[found.site.index].guarded for found in findings.prefill if found.site.index in ranges), None
        )
        plans[task] = Plan(task, shown, tuple(entries), _key(entries))
    wanted = settings.wanted()
    distinct = len({plan.key for plan in plans.values()}) > 1
    return GraphPlan(plans, wanted, _register(plans, settings) if distinct else None, guards)


def _refusal(found: FoundSite) -> Skip | None:
    """Why this site cannot be rewritten whatever the budget, or None."""
    site, attention = found.site, found.attention
    if site.phase is Phase.DECODE:
        return Skip("decode site: one query row, stays dense for now")
    if attention.dropout_p != 0.0:
        return Skip(f"attention dropout is {attention.dropout_p}; the sparse kernels have none (call model.eval())")
    operands = (attention.query, attention.key, attention.value)
    values = [operand.meta.get("example_value") for operand in operands]
    tensors = [held for held in values if isinstance(held, torch.Tensor)]
    if len(tensors) != len(values):
        return Skip("the graph carries no shapes for query, key or value")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return Skip("gradients are needed here; run under torch.no_grad() or torch.inference_mode()")
    if isinstance(found.terms, Skip):
        return found.terms
    if site.kv_heads == 0 or site.heads % site.kv_heads:
        return Skip(f"{site.heads} query heads are no multiple of {site.kv_heads} key/value heads")
    reason = why_not(torch.device(site.device), getattr(torch, site.dtype), site.head_dim, site.v_head_dim)
    return Skip(reason) if reason else None


def _entry(found: FoundSite, task: TaskClass, bucket: LengthBucket | None, settings: Settings) -> PlanEntry:
    if bucket is None:
        return _entry_by_length(found, task, settings)
    budget = settings.policy.site_budget(task, bucket, found.layer, found.site.heads)
    if budget.dense:
        reason = "the hint is dense" if task is TaskClass.DENSE else f"the policy is dense for {task} at {bucket}"
        return _dense_entry(found, reason)
    if not settings.always_sparse:
        verdict = _verdict(found, budget, bucket)
        if not verdict.wins:
            return _dense_entry(found, verdict.reason)
    return PlanEntry(found.site, budget, rewritten=True)


def _entry_by_length(found: FoundSite, task: TaskClass, settings: Settings) -> PlanEntry:
    """The length cannot be guarded (unbacked, or a range the user fixed): hand the op the whole table."""
    rows = []
    for bucket in settings.policy.buckets:
        entry = _entry(found, task, bucket, settings)
        rows.append(("*" if bucket.high is None else str(bucket.high), encode_budget(entry.budget)))
    if all(text == rows[0][1] == encode_budget(DENSE) for _, text in rows):
        return _dense_entry(found, f"the policy is dense for {task} at every length")
    table = ";".join(f"{high}={text}" for high, text in rows)
    return PlanEntry(found.site, Budget(BY_LENGTH, {"table": table}), rewritten=True)


def _verdict(found: FoundSite, budget: Budget, bucket: LengthBucket) -> Verdict:
    site = found.site
    device = torch.device(site.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return sparse_wins(
        device_name=name,
        device_type=device.type,
        dtype=site.dtype,
        head_dim=site.head_dim,
        length=_equivalent_length(site.q_len, site.kv_len, bucket),
        density=make_method(budget).mean_density,
    )


def _equivalent_length(q_len: int | str, kv_len: int | str, bucket: LengthBucket) -> int:
    """Length of the square problem with the same work; for a symbolic length the bucket's lower edge, to be safe."""
    longest = kv_len if isinstance(kv_len, int) else bucket.low + 1
    rows = q_len if isinstance(q_len, int) else longest
    return int((min(rows, longest) * longest) ** 0.5)


def _dense_entry(found: FoundSite, reason: str) -> PlanEntry:
    return PlanEntry(found.site, DENSE, reason=reason, rewritten=_dense_without_mask(found))


def _dense_without_mask(found: FoundSite) -> bool:
    """Whether the dense kernel can do without the mask: it is causal or full, which SDPA takes as a flag.

    An SDPA site that has no mask already is left alone.
    """
    terms = found.terms
    if not isinstance(terms, MaskTerms) or terms.padding or terms.segments is not None:
        return False
    if found.attention.spelling == "sdpa" and found.attention.mask is None:
        return False
    band = terms.band
    return band.left < 0 and (band.right < 0 or (band.right == 0 and band.align is Align.TOP_LEFT))


def _length_ranges(
    findings: Findings, refusals: dict[int, Skip | None], settings: Settings
) -> tuple[dict[int, _Range], tuple[str, ...]]:
    """Range of key lengths that each plannable site is planned for, and the texts of the guards installed.

    Sites whose key length is the same expression are planned together. A symbolic length is guarded to the widest run
    of buckets in which no plan differs; where it cannot be guarded the range is None.
    """
    groups: dict[str, list[FoundSite]] = {}
    for found in findings.sites:
        if refusals[found.site.index] is None:
            groups.setdefault(str(found.key_shape[2]), []).append(found)
    ranges: dict[int, _Range] = {}
    guards: list[str] = []
    for members in groups.values():
        length = members[0].key_shape[2]
        if isinstance(length, int):
            bucket = settings.policy.bucket(length)
            span = _Range(bucket, bucket)
        else:
            span = _guardable_range(members, length, settings)
            if span.guarded is not None:
                guards.extend(dynamo.guard_range(length, span.guarded.low, span.guarded.high))
        ranges.update({found.site.index: span for found in members})
    return ranges, tuple(dict.fromkeys(guards))


def _guardable_range(members: Sequence[FoundSite], length: torch.SymInt, settings: Settings) -> _Range:
    current = dynamo.hint_value(length)
    buckets = list(settings.policy.buckets)
    if current is None:
        return _Range(None, None)
    here = next(i for i, bucket in enumerate(buckets) if current in bucket)
    if not dynamo.can_guard(length):
        inside = (length > buckets[here].low, buckets[here].high is None or length <= buckets[here].high)
        known = buckets[here] if all(c is True or dynamo.holds(c) for c in inside) else None
        return _Range(known, known)

    def table(bucket: LengthBucket) -> tuple[str, ...]:
        return tuple(str(_entry(found, task, bucket, settings).budget) for found in members for task in TASKS)

    wanted = table(buckets[here])
    first = last = here
    while first > 0 and table(buckets[first - 1]) == wanted:
        first -= 1
    while last + 1 < len(buckets) and table(buckets[last + 1]) == wanted:
        last += 1
    return _Range(buckets[here], LengthBucket(buckets[first].low, buckets[last].high))


def budget_text(budget: Budget) -> str:
    """The text that the graph op carries for a budget."""
    return str(budget.params["table"]) if budget.method == BY_LENGTH else encode_budget(budget)


def _key(entries: Sequence[PlanEntry]) -> str:
    """Readable key of a plan: ``dense``, or the budgets with their counts, with a digest where layers differ."""
    texts = [budget_text(entry.budget) for entry in entries if entry.site.phase is Phase.PREFILL]
    sparse = [text for text in texts if text != "dense"]
    if not sparse:
        return "dense"
    counts = Counter(texts)
    shown = ", ".join(f"{count}x {text}" for text, count in counts.items())
    if len(counts) > 1:
        shown += f" #{hashlib.sha256('|'.join(texts).encode()).hexdigest()[:8]}"
    return shown


def _register(plans: dict[TaskClass, Plan], settings: Settings) -> str:
    """Enter this table of keys into ``plan_keys``; equal tables share an entry."""
    keys = {task: plan.key for task, plan in plans.items()}
    content = repr((sorted((str(task), key) for task, key in keys.items()), str(settings.task)))
    name = hashlib.sha256(content.encode()).hexdigest()[:12]
    if name not in plan_keys:
        default = settings.task or TaskClass.UNKNOWN
        plan_keys[name] = lambda: keys[current_hint() or default]
    return name
