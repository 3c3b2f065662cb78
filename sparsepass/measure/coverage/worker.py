"""Processes of their own that measure, so that a crash, a leak or an endless loop costs one model and phase."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from sparsepass.measure.coverage.architectures import Kind
from sparsepass.measure.coverage.inputs import Phase

Record = dict[str, Any]
RENEW = 15
"""Tasks that one process measures; memory of compiled graphs is given back with it."""
LOOK_S = 2.0
"""How often limits are looked at, at least."""
ALONE = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else each has a pool of compilers, which have nothing to do
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment of the processes: one thread each, and no context on a GPU that none of them uses."""


@dataclass(frozen=True)
class Task:
    """One architecture, and the (implementation, phase) pairs wanted of it."""

    kind: Kind
    arch: str
    cases: tuple[tuple[str, Phase], ...]
    length: int
    fused: bool = False
    checkpoint: bool = False
    """Whether ``arch`` is a checkpoint's folder or name, not a model_type."""
    trust: bool = False

    def head(self) -> Record:
        """What a record of the first case is of."""
        implementation, phase = self.cases[0]
        return {"kind": str(self.kind), "arch": self.arch, "implementation": implementation, "phase": str(phase)}

    def rest(self) -> Task:
        """The task without its first case."""
        return replace(self, cases=self.cases[1:])


def records_of(task: Task) -> Iterator[Record]:
    """Measures in this process, one record per case; what goes wrong is a record too."""
    import warnings

    from sparsepass.measure.coverage.inputs import NO_CACHE, call_for
    from sparsepass.measure.coverage.measure import measure
    from sparsepass.measure.coverage.tiny import ABSENT, LISTED, build, build_checkpoint, first_line

    warnings.simplefilter("ignore")
    built: dict[str, Any] = {}
    failed: dict[str, str] = {}
    while task.cases:
        head = task.head()
        (implementation, phase), task = task.cases[0], task.rest()
        if implementation not in built and implementation not in failed:
            try:
                if task.checkpoint:
                    model = build_checkpoint(task.arch, task.kind, implementation, task.trust)
                else:
                    model = build(task.arch, task.kind, implementation)
                built = {implementation: model}
            except Exception as error:
                failed[implementation] = first_line(error)
        if implementation in failed:
            absent = any(text in failed[implementation] for text in (LISTED, ABSENT))
            yield head | {"error": failed[implementation], "stage": "absent" if absent else "build"}
            continue
        try:
            call = call_for(built[implementation], task.kind, phase, task.length)
            yield head | measure(built[implementation], call, decode=phase is Phase.DECODE, fused=task.fused)
        except Exception as error:
            reason = first_line(error)
            yield head | {"error": reason, "stage": "absent" if NO_CACHE in reason else "run"}


def _serve(pipe: Connection) -> None:
    import logging

    import torch

    logging.disable(logging.WARNING)  # of Dynamo and of transformers, about models that are made up
    torch.set_num_threads(1)
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
    """One process and the task it is at; renewed now and then. ``task`` holds the cases not yet measured."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.pipe: Any = None
        self._process: Any = None
        self._served = 0
        self._since = 0.0

    def begin(self, task: Task) -> None:
        """Gives the process a task; makes a process where there is none, or an old one."""
        if self._process is None or self._served >= RENEW:
            self.stop()
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._served = 0
        self._served += 1
        self._since = time.monotonic()
        self.task = task
        with contextlib.suppress(BrokenPipeError):  # it has died since: the next look finds that
            self.pipe.send(task)

    def take(self) -> Record | None:
        """What the process has sent: the record of a case, or None for the end of the task, or of the process."""
        task = self.task
        assert task is not None
        try:
            record = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            return self._lost(f"the process ended with code {self._process.exitcode}")
        self._since = time.monotonic()
        if record is None:
            self.task = None
            return None
        self.task = task.rest()
        return dict(record)

    def late(self, limit: float) -> Record | None:
        """Ends a process that is past the limit: the record of the case it was at."""
        if self.task is None or time.monotonic() - self._since < limit:
            return None
        return self._lost(f"took longer than {limit:g} s")

    def _lost(self, reason: str) -> Record | None:
        task = self.task
        self.stop()
        if task is None or not task.cases:
            return None
        self.task = task.rest()  # the next process goes on with it
        return task.head() | {"error": reason, "stage": "run"}

    def stop(self) -> None:
        """Ends the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.pipe.close()
            self._process = None
        self.task = None


def run_all(tasks: Iterable[Task], jobs: int, limit: float, seconds: float | None = None) -> Iterator[Record]:
    """The records of every task as they come, from ``jobs`` processes side by side.

    A case past ``limit`` seconds, or one that ends its process, is recorded as that; the task's other cases go on in
    a new process. After ``seconds`` everything is stopped, and what was not through has no record.
    """
    waiting = deque(tasks)
    until = None if seconds is None else time.monotonic() + seconds
    workers = [Worker() for _ in range(max(min(jobs, len(waiting)), 0))]
    try:
        with _environment(ALONE):
            while until is None or time.monotonic() < until:
                for worker in workers:
                    if worker.task is None and waiting:
                        worker.begin(waiting.popleft())
                busy = [worker for worker in workers if worker.task is not None]
                if not busy:
                    return
                left = LOOK_S if until is None else min(LOOK_S, max(until - time.monotonic(), 0.0))
                ready = wait([worker.pipe for worker in busy], min(left, limit))
                for worker in busy:
                    record = worker.take() if worker.pipe in ready else worker.late(limit)
                    if worker.task is not None and worker.pipe.closed:
                        waiting.appendleft(worker.task)
                        worker.task = None
                    if record is not None:
                        yield record
    finally:
        for worker in workers:
            worker.stop()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What processes inherit while it is open."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, held in before.items():
            if held is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = held
