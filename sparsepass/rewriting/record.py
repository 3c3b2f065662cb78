"""Which compiled graphs were made and which ran, for those who want to know (``explain``, ``warmup``, tests)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsepass.rewriting.counters import Counts

if TYPE_CHECKING:
    from sparsepass.rewriting.compiled import CompiledGraph


@dataclass
class Recording:
    """Graphs compiled and graphs called while the recording was on, each listed once, in order.

    ``before``: the counts of each graph that ran, by site, as they stood at its first call.
    """

    compiled: list[CompiledGraph] = field(default_factory=list)
    ran: list[CompiledGraph] = field(default_factory=list)
    before: list[dict[int, Counts]] = field(default_factory=list)
    runs_before: list[int] = field(default_factory=list)


with_sites = 0
"""Runs of graphs with attention sites in this process; threads may lose some, so that only its change says anything."""

ACTIVE: list[Recording] = []
_lock = threading.Lock()


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Record what is compiled and what runs, in every thread, until the block ends."""
    record = Recording()
    with _lock:
        ACTIVE.append(record)
    try:
        yield record
    finally:
        with _lock:
            ACTIVE.remove(record)


def compiled(graph: CompiledGraph) -> None:
    for record in list(ACTIVE):
        record.compiled.append(graph)


def ran(graph: CompiledGraph) -> None:
    for record in list(ACTIVE):
        if not any(graph is other for other in record.ran):
            record.ran.append(graph)
            record.before.append(graph.counts())
            record.runs_before.append(graph.runs)
