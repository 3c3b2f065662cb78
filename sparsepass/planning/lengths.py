"""Key lengths that one graph may serve: neighboring buckets in which no plan differs, and the guards on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsepass.graph import torch_private
from sparsepass.planning.site import Settings, entry_for, policy_budgets
from sparsepass.sites import Findings, FoundSite
from sparsepass.types import DENSE, TASKS, LengthBucket, Skip


@dataclass(frozen=True, slots=True)
class Range:
    """The policy's bucket that a site's key length is in, and the run of buckets that its graph is guarded to."""

    bucket: LengthBucket | None
    guarded: LengthBucket | None
    merged: tuple[LengthBucket, ...] = ()
    """The buckets of that run."""


def length_ranges(
    findings: Findings, refusals: dict[int, Skip | None], settings: Settings
) -> tuple[dict[int, Range], tuple[str, ...]]:
    """Range of key lengths that each plannable site is planned for, and the texts of the guards installed.

    Sites whose key length is the same expression are planned together. A symbolic length is guarded to the widest run
    of buckets in which no plan differs; where it cannot be guarded the range is None.
    """
    groups: dict[str, list[FoundSite]] = {}
    for found in findings.sites:
        if refusals[found.site.index] is None:
            groups.setdefault(str(found.key_shape[2]), []).append(found)
    ranges: dict[int, Range] = {}
    guards: list[str] = []
    for members in groups.values():
        length = members[0].key_shape[2]
        if isinstance(length, int):
            bucket = settings.policy.bucket(length)
            span = Range(bucket, bucket, (bucket,))
        else:
            span = _guardable_range(members, length, settings)
            if span.guarded is not None:
                guards.extend(torch_private.guard_range(length, span.guarded.low, span.guarded.high))
        ranges.update({found.site.index: span for found in members})
    return ranges, tuple(dict.fromkeys(guards))


def _guardable_range(members: Sequence[FoundSite], length: torch.SymInt, settings: Settings) -> Range:
    current = torch_private.hint_value(length)
    buckets = list(settings.policy.buckets)
    if current is None:
        return Range(None, None)
    here = next(i for i, bucket in enumerate(buckets) if current in bucket)
    if not torch_private.can_guard(length):
        inside = (length > buckets[here].low, buckets[here].high is None or length <= buckets[here].high)
        known = buckets[here] if all(c is True or torch_private.holds(c) for c in inside) else None
        return Range(known, known, () if known is None else (known,))

    def table(bucket: LengthBucket) -> tuple[str, ...]:
        alone = tuple(str(entry_for(f, task, bucket, settings).budget) for f in members for task in TASKS)
        if set(alone) == {str(DENSE)}:
            return alone
        # A class that is dense alone, as sparse would not pay, may still be sparse among others in one batch.
        return alone + tuple(str(budget) for found in members for budget in policy_budgets(found, bucket, settings))

    wanted = table(buckets[here])
    first = last = here
    while first > 0 and table(buckets[first - 1]) == wanted:
        first -= 1
    while last + 1 < len(buckets) and table(buckets[last + 1]) == wanted:
        last += 1
    run = tuple(buckets[first : last + 1])
    return Range(buckets[here], LengthBucket(run[0].low, run[-1].high), run)
