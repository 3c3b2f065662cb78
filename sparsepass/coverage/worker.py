"""A process of its own that measures, so that a crash, a leak or an endless loop costs one architecture."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sparsepass.coverage.architectures import Kind
from sparsepass.coverage.inputs import Phase

Record = dict[str, Any]
RENEW = 15
"""Architectures that one process measures; memory of compiled graphs is given back with it."""


@dataclass(frozen=True)
class Task:
    """One architecture, and the (implementation, phase) pairs wanted of it."""

    kind: Kind
    arch: str
    cases: tuple[tuple[str, Phase], ...]
    length: int
    fused: bool = False


def records_of(task: Task) -> Iterator[Record]:
    """Measures in this process, one record per case; what goes wrong is a record too."""
    import warnings

    from sparsepass.coverage.inputs import call_for
    from sparsepass.coverage.measure import measure
    from sparsepass.coverage.tiny import LISTED, build, first_line

    warnings.simplefilter("ignore")
    built: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for implementation, phase in task.cases:
        head = {"kind": str(task.kind), "arch": task.arch, "implementation": implementation, "phase": str(phase)}
        if implementation not in built and implementation not in failed:
            try:
                built = {implementation: build(task.arch, task.kind, implementation)}
            except Exception as error:
                failed[implementation] = first_line(error)
        if implementation in failed:
            absent = any(text in failed[implementation] for text in (LISTED, "does not support an attention impl"))
            yield head | {"error": failed[implementation], "stage": "absent" if absent else "build"}
            continue
        try:
            call = call_for(built[implementation], task.kind, phase, task.length)
            yield head | measure(built[implementation], call, decode=phase is Phase.DECODE, fused=task.fused)
        except Exception as error:
            yield head | {"error": first_line(error), "stage": "run"}


def _serve(pipe: Connection) -> None:
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            for record in records_of(task):
                pipe.send(record)
            pipe.send(None)
        except BrokenPipeError:  # the sweep was ended
            return


class Worker:
    """Measures tasks in another process. A task past its limit, or one that ends the process, is recorded as that."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._process: Any = None
        self._pipe: Any = None
        self._served = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def run(self, task: Task) -> Iterator[Record]:
        """The records of a task, as they come."""
        if self._process is None or self._served >= RENEW:
            self._stop()
            self._start()
        self._served += 1
        self._pipe.send(task)
        began, left = time.monotonic(), list(task.cases)
        reason = f"took longer than {self.limit:g} s for this architecture"
        while self._pipe.poll(max(self.limit - (time.monotonic() - began), 0.0)):
            try:
                record = self._pipe.recv()
            except EOFError:
                self._process.join()
                reason = f"the process ended with code {self._process.exitcode}"
                break
            if record is None:
                return
            left.pop(0)
            yield record
        self._stop()
        for implementation, phase in left:
            head = {"kind": str(task.kind), "arch": task.arch, "implementation": implementation, "phase": str(phase)}
            yield head | {"error": reason, "stage": "run"}

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._served = 0

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None
