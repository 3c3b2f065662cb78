"""What a monitor in force changes: rows that a graph samples, the class that a hint is raised to, and what is kept.

The surface is ``sparsepass.monitor``; this part is what hints, plans and compiled graphs need of it. Where no monitor
is in force, all of it is one look at a ContextVar.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsepass.types import Rows, TaskClass


@dataclass(frozen=True, slots=True)
class WatchedSite:
    """A site that samples rows, as its compiled graph knows it."""

    name: str
    layer: int | None
    """None where it is not known, or several share the graph."""
    floors: Mapping[TaskClass, float]
    """The policy's floor of the mean mass kept, by class; a class without one is not there."""
    own_hint: bool
    """Given a hint inside the compiled region: a monitor cannot raise it."""


@dataclass(frozen=True, slots=True)
class WatchedGraph:
    """What a monitor needs to know of a graph: its sites, and which classes compute more than others there."""

    sites: tuple[WatchedSite, ...]
    costs: Mapping[TaskClass, float]
    """Mean share of the attention computed under each class, over the sites that have one budget for a class."""

    def next_denser(self, task: TaskClass) -> TaskClass | None:
        """The class that computes the least of those that compute more than this one; None where none does."""
        more = [other for other in self.costs if self.costs[other] > self.costs[task] + 1e-9]
        return min(more, key=lambda other: self.costs[other]) if more else None


@dataclass
class Kept:
    """Mass kept at one site under one class: over calls, requests (rows of the batch), heads and sampled rows."""

    rows: int = 0
    """Sampled rows that see anything, over heads and requests."""
    total: float = 0.0
    lowest: float = float("inf")
    """The lowest mean of one head in one request."""
    least: float = float("inf")
    """The lowest mean of one request, over its heads and rows: what a floor is held against."""
    heads: Any = None
    """float64 [H, 2] on the CPU: sums and counts of each query head."""

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else float("nan")

    def add(self, kept: torch.Tensor) -> None:
        """Count one request's kept mass, float [H, R], NaN where a row sees nothing."""
        seen = ~kept.isnan()
        counts = seen.sum(1)
        sums = kept.double().nan_to_num(0.0).sum(1)
        both = torch.stack([sums, counts.double()], 1)
        self.heads = both if self.heads is None else self.heads + both
        self.rows += int(counts.sum())
        self.total += float(sums.sum())
        if (used := counts > 0).any():
            self.least = min(self.least, float(sums.sum() / counts.sum()))
            self.lowest = min(self.lowest, float((sums[used] / counts[used]).min()))


@dataclass(frozen=True, slots=True)
class Raised:
    """One escalation: after ``call`` (from 1), ``hint`` runs under the budgets of ``to`` instead of ``before``."""

    call: int
    hint: TaskClass
    before: TaskClass
    to: TaskClass
    layer: int | None
    """None where it is not known, or several share the graph."""
    site: str
    mass: float
    floor: float


@dataclass(slots=True)
class _Pending:
    """Figures of one call on their way from the device."""

    call: int
    graph: WatchedGraph
    given: TaskClass | Rows
    used: TaskClass | Rows
    sizes: tuple[torch.Size, ...]
    values: torch.Tensor
    done: torch.cuda.Event | None

    def ready(self) -> bool:
        return self.done is None or self.done.query()


@dataclass(eq=False)
class Watch:
    """The state of one monitor. Threads and tasks that share it take turns."""

    rows: int
    floor: float | None
    calls: int = 0
    unseen: int = 0
    """Calls inside a CUDA graph that the user captures: what they keep cannot be read."""
    kept: dict[tuple[TaskClass, TaskClass, str, int | None], Kept] = field(default_factory=dict)
    """By class given, class in force, name of the site and its layer."""
    raised: dict[TaskClass, TaskClass] = field(default_factory=dict)
    events: list[Raised] = field(default_factory=list)
    floors: dict[tuple[TaskClass, str, int | None], float] = field(default_factory=dict)
    _pending: deque[_Pending] = field(default_factory=deque)
    _mixed: dict[Rows, Rows] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)

    @property
    def suffix(self) -> str:
        """What it adds to the key of a plan that has something to watch."""
        return f", {self.rows} rows watched"

    def in_force(self, hint: TaskClass | Rows) -> TaskClass | Rows:
        """The class, or each row's, that a hint runs under now. Waits for earlier calls that may still raise it."""
        if self._pending:
            self.settle()
        if not self.raised:
            return hint
        if not isinstance(hint, tuple):
            return self.raised.get(hint, hint)
        found = self._mixed.get(hint)  # the same object each time: plans are looked up by identity
        if found is None:
            found = self._mixed[hint] = tuple(self.raised.get(task, task) for task in hint)
        return found

    def add(
        self, graph: WatchedGraph, given: TaskClass | Rows, used: TaskClass | Rows, masses: Sequence[torch.Tensor]
    ) -> None:
        """Take a call's kept masses, each float32 [B, H, R] on the device, without waiting for it."""
        device = masses[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.unseen += 1
            return
        flat = torch.cat([mass.detach().reshape(-1) for mass in masses])
        done = None
        if device.type == "cuda":
            host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))
            flat = host
        with self._lock:
            self.calls += 1
            sizes = tuple(mass.shape for mass in masses)
            self._pending.append(_Pending(self.calls, graph, given, used, sizes, flat, done))
            while len(self._pending) > 1 and self._pending[0].ready():
                self._absorb(self._pending.popleft())

    def lower(self) -> None:
        """Let every hint have its own budgets again, after the calls made so far."""
        with self._lock:
            self.settle()
            self.raised, self._mixed = {}, {}

    def settle(self) -> None:
        """Count what earlier calls kept, waiting for those whose figures are still on the device."""
        with self._lock:
            while self._pending:
                one = self._pending.popleft()
                if one.done is not None:
                    one.done.synchronize()
                self._absorb(one)

    def _absorb(self, one: _Pending) -> None:
        """Count a call's figures, and raise the classes of which a layer kept less than its floor."""
        short: dict[TaskClass, Raised] = {}
        places = [size.numel() for size in one.sizes]
        for site, size, part in zip(one.graph.sites, one.sizes, one.values.split(places), strict=True):
            for row, mass in enumerate(part.view(size)):
                given, used = _of_row(one.given, row), _of_row(one.used, row)
                kept = Kept()
                kept.add(mass)
                if not kept.rows:
                    continue
                self.kept.setdefault((given, used, site.name, site.layer), Kept()).add(mass)
                floor = self.floor if self.floor is not None else site.floors.get(used)
                if floor is None:
                    continue
                self.floors[used, site.name, site.layer] = floor
                stale = self.raised.get(given, given) is not used  # raised by a call before it, after it had begun
                to = None if stale or site.own_hint or kept.mean >= floor else one.graph.next_denser(used)
                if to is not None and (
                    given not in short or kept.mean - floor < short[given].mass - short[given].floor
                ):
                    short[given] = Raised(one.call, given, used, to, site.layer, site.name, kept.mean, floor)
        if short:
            self.raised |= {given: event.to for given, event in short.items()}
            self._mixed = {}
            self.events += short.values()


def _of_row(hint: TaskClass | Rows, row: int) -> TaskClass:
    return hint[row] if isinstance(hint, tuple) else hint


_current: ContextVar[Watch | None] = ContextVar("sparsepass_watch", default=None)


def current() -> Watch | None:
    """The monitor in force in this thread or asyncio task."""
    return _current.get()


def enter(watch: Watch) -> object:
    """Put a monitor in force; give what is returned to ``leave``."""
    return _current.set(watch)


def leave(token: Any) -> None:
    _current.reset(token)


def in_force(hint: TaskClass | Rows) -> TaskClass | Rows:
    """What a hint means now: itself, unless a monitor raised it."""
    watch = _current.get()
    return hint if watch is None else watch.in_force(hint)
