"""Plans of mixed batches, whose rows have hints of several classes: decided from plain data, with no graph at hand.

The graph of a mixed batch fixes caps. Which classes it serves follows from them: every class that would raise no cap is
in it, so other arrangements of rows, and other mixes under the same caps, run the same graph. Whether sparse pays is
one bit more: the mean density over the rows against what was measured. Both are in the plan's key, which the guard
works out anew for the hint in force at each call.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from sparsepass.methods.catalogue import encode_budget
from sparsepass.methods.rows import RowBudgets, is_row_text, leaves_as_is, share_batch
from sparsepass.request.hints import alike
from sparsepass.types import DENSE, EXACT, TASKS, Budget, Rows, TaskClass

DENSE_TEXT = encode_budget(DENSE)
EXACT_TEXT = encode_budget(EXACT)


@dataclass(frozen=True, slots=True)
class BucketClasses:
    """What each class may compute at one site, in one length bucket, before it is asked whether that pays."""

    budgets: tuple[Budget, ...]
    """The policy's, in the order of ``TASKS``."""
    length: int
    """Keys that densities are taken at."""
    limits: tuple[tuple[str, float], ...]
    """Method name and the largest density at which it pays; 0: at none."""
    high: int | None = None
    """Upper edge of the bucket in tokens, included; None: no edge."""

    def budget(self, task: TaskClass) -> Budget:
        return self.budgets[TASKS.index(task)]

    def share(self, tasks: Set[TaskClass]) -> RowBudgets | None:
        """How these classes share a launch; None where all are dense, or sparse pays at no density."""
        shared = share_batch({task: self.budget(task) for task in tasks}, self.length)
        return shared if shared is not None and self._limit(shared) > 0 else None

    def cost(self, shared: RowBudgets, task: TaskClass | None) -> float:
        """Cost of rows of a class (None: under the cap), as a density, over the largest that pays."""
        return shared.cost(task, self.length) / self._limit(shared)

    def _limit(self, shared: RowBudgets) -> float:
        return dict(self.limits).get(shared.cap.method, 0.0)


@dataclass(frozen=True, slots=True)
class SiteClasses:
    """One site as mixed batches see it."""

    alone: tuple[str, ...]
    """Budget texts of a batch of one class alone, in the order of ``TASKS``."""
    buckets: tuple[BucketClasses, ...] = ()
    """The bucket of its length, or all of them where the op decides by the real length. None where nothing can differ
    by row: the site is refused, or has a hint of its own."""
    by_row: bool = True
    """Whether budgets can differ by row: not where the size of the batch is only known on the device."""
    counted: bool = True
    """Whether the plan's key speaks of it."""

    def differs(self, tasks: Set[TaskClass]) -> bool:
        """Whether these classes have several budgets here."""
        return any(len({bucket.budget(task) for task in tasks}) > 1 for bucket in self.buckets)

    def text(self, served: Set[TaskClass]) -> str:
        """What the op is given for a mix of these classes where sparse pays; by length, it is only sparse where it
        would pay for rows under the cap alone, since the rows are not known when the text is written."""
        if len(self.buckets) == 1:
            return self._text(self.buckets[0], served)
        texts = []
        for bucket in self.buckets:
            shared = bucket.share(served)
            pays = shared is not None and _at_most_one(bucket.cost(shared, None))
            texts.append(self._text(bucket, served) if pays else DENSE_TEXT)
        if set(texts) == {DENSE_TEXT}:
            return DENSE_TEXT
        highs = ["*" if bucket.high is None else str(bucket.high) for bucket in self.buckets]
        return ";".join(f"{high}={text}" for high, text in zip(highs, texts, strict=True))

    def _text(self, bucket: BucketClasses, served: Set[TaskClass]) -> str:
        shared = bucket.share(served)
        if shared is None or (not self.by_row and any(bucket.budget(task).dense for task in served)):
            return DENSE_TEXT
        return shared.text() if self.by_row else encode_budget(shared.cap)


@dataclass(frozen=True, slots=True)
class Mix:
    """The two plans that rows of certain classes can have: budget texts by site."""

    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    sparse_key: str
    dense_key: str
    costs: tuple[float, ...]
    """By class, in the order of ``TASKS``: what a row costs at the sites that differ, over what just pays."""

    def pays(self, rows: Sequence[TaskClass]) -> bool:
        """Whether the mean over the rows pays: one answer for all sites, so that there are two plans and no more."""
        return _at_most_one(sum(self.costs[TASKS.index(task)] for task in rows) / len(rows))


class MixTable:
    """The sites of one graph, and its plan's key for any hint. Equal ``content`` means equal keys for every hint."""

    def __init__(self, sites: Sequence[SiteClasses]) -> None:
        self.sites = tuple(sites)
        self.content = repr(self.sites)
        self._alone = {task: self._key([site.alone[i] for site in self.sites]) for i, task in enumerate(TASKS)}
        self._mixes: dict[frozenset[TaskClass], Mix] = {}
        self._last: tuple[Rows, str] = ((), "")
        exact = [
            all(site.alone[i] in (DENSE_TEXT, EXACT_TEXT) for site in self.sites if site.counted)
            for i in range(len(TASKS))
        ]
        self._exact_keys = {self._alone[task] for task, all_of_it in zip(TASKS, exact, strict=True) if all_of_it}

    def key(self, hint: TaskClass | Rows) -> str:
        """The key of the plan that a hint means. Runs at each call of the compiled graph."""
        if not isinstance(hint, tuple):
            return self._alone[hint]
        rows, key = self._last  # one object, so that threads cannot mix the two
        if rows is not hint:
            mix = self.mix(frozenset(hint))
            key = mix.sparse_key if mix.pays(hint) else mix.dense_key
            self._last = (hint, key)
        return key

    def watchable(self, key: str) -> bool:
        """Whether a plan with this key leaves anything out: there is nothing to watch where all is exact."""
        return key not in self._exact_keys

    def texts(self, hint: TaskClass | Rows) -> tuple[str, ...]:
        """The budget text of each site under a hint."""
        task = alike(hint)
        if task is not None or not isinstance(hint, tuple):
            return tuple(site.alone[TASKS.index(task or hint)] for site in self.sites)
        mix = self.mix(frozenset(hint))
        return mix.sparse if mix.pays(hint) else mix.dense

    def mix(self, tasks: frozenset[TaskClass]) -> Mix:
        """The plans of rows of these classes, worked out once."""
        if tasks not in self._mixes:
            self._mixes[tasks] = self._work_out(tasks)
        return self._mixes[tasks]

    @property
    def differs(self) -> bool:
        """Whether any two hints mean different plans, or a monitor does. Where every class alone is dense, no mix of
        them pays."""
        return len(set(self._alone.values())) > 1 or any(map(self.watchable, self._alone.values()))

    def _work_out(self, tasks: frozenset[TaskClass]) -> Mix:
        served = self._served(tasks)
        # Where the classes agree, one stands for all: the text is what each of them gets alone.
        first = min(TASKS.index(task) for task in tasks)
        differ = [site.differs(tasks) for site in self.sites]
        sparse = [s.text(served) if mixed else s.alone[first] for s, mixed in zip(self.sites, differ, strict=True)]
        dense = [
            text if not mixed or len(site.buckets) > 1 else DENSE_TEXT
            for text, site, mixed in zip(sparse, self.sites, differ, strict=True)
        ]
        costs = [
            _costs(site, served)
            for site, mixed, text in zip(self.sites, differ, sparse, strict=True)
            if mixed and len(site.buckets) == 1 and text != DENSE_TEXT
        ]
        mean = tuple(sum(column) / len(costs) for column in zip(*costs, strict=True)) if costs else (0.0,) * len(TASKS)
        return Mix(tuple(sparse), tuple(dense), self._key(sparse), self._key(dense), mean)

    def _served(self, tasks: frozenset[TaskClass]) -> frozenset[TaskClass]:
        """These classes, and all others that change no cap and nothing of what these get."""
        buckets = {bucket for site in self.sites for bucket in site.buckets}
        return tasks | {task for task in TASKS if all(_changes_nothing(b, tasks, task) for b in buckets)}

    def _key(self, texts: Sequence[str]) -> str:
        return key_of([text for text, site in zip(texts, self.sites, strict=True) if site.counted])


def _costs(site: SiteClasses, served: Set[TaskClass]) -> tuple[float, ...]:
    (bucket,) = site.buckets
    shared = bucket.share(served)
    if shared is None:
        return (math.inf,) * len(TASKS)
    return tuple(bucket.cost(shared, task if site.by_row else None) for task in TASKS)


def _changes_nothing(bucket: BucketClasses, tasks: frozenset[TaskClass], added: TaskClass) -> bool:
    before, after = bucket.share(tasks), bucket.share(tasks | {added})
    return after is None if before is None else after is not None and leaves_as_is(before, after)


def _at_most_one(cost: float) -> bool:
    return cost <= 1 + 1e-9


def key_of(texts: Sequence[str]) -> str:
    """Readable key of a plan: ``dense``, or the budgets with their counts, with a digest where that leaves
    something out: the order of different sites, or what the classes of a mix get under their cap."""
    if all(text == DENSE_TEXT for text in texts):
        return DENSE_TEXT
    counts = Counter(f"{text.split('|')[0]}, by row" if is_row_text(text) else text for text in texts)
    shown = ", ".join(f"{count}x {text}" for text, count in counts.items())
    if len(counts) > 1 or any(map(is_row_text, texts)):
        shown += f" #{hashlib.sha256('/'.join(texts).encode()).hexdigest()[:12]}"
    return shown
