"""What a calibration asks of a model, and what it finds out for one task at one length by one method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from sparsepass.measure.calibrate.setting import Setting
from sparsepass.types import TaskClass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One context's scores, 0 to 1, one per question; ``density``: share of the visible blocks that was computed."""

    scores: tuple[float, ...]
    density: float


class Meter(Protocol):
    """Runs the model: the sample that a task draws for a length and seed, under a setting (None: dense).

    One with ``prefetch(task, length, seeds, setting)`` is told which contexts will be asked about, to batch them; it
    says whether it did.
    """

    def run(self, task: str, length: int, seed: int, setting: Setting | None, /) -> Outcome: ...


def prefetch(meter: Meter, task: str, length: int, seeds: Sequence[int], setting: Setting | None) -> None:
    """Have a meter that can batch ask ahead: under the setting, and densely where that got something wrong."""
    ahead = getattr(meter, "prefetch", None)
    if ahead is not None and ahead(task, length, seeds, setting) and setting is not None:
        ahead(task, length, [s for s in seeds if min(meter.run(task, length, s, setting).scores) < 1], None)


NOMINAL = 16
"""Questions that a context is thought to have, where that is left to the task and the length."""


LEAST = 0.2
"""Dense accuracy under which there is nothing to keep."""


@dataclass(frozen=True, slots=True)
class Goal:
    """How safe is safe.

    ``loss``: tolerated share of the dense accuracy. ``confidence``: of each statement that a budget loses no more.
    ``questions``: asked about each context. ``search`` and ``verify``: the most contexts per budget; a task with fewer
    questions per context gets more of them to be verified on. ``least``: the
    dense accuracy that is asked for.
    """

    loss: float = 0.01
    confidence: float = 0.95
    questions: int = NOMINAL
    search: int = 8
    verify: int = 64
    least: float = LEAST
    seed: int = 0


class Status(StrEnum):
    """What was found out."""

    SAFE = "safe"
    UNSAFE = "not safe"
    UNSHOWN = "not shown"
    UNMEASURED = "dense fails"

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Status.SAFE: "verified on held-out samples",
    Status.UNSAFE: "not safe at any density tried",
    Status.UNSHOWN: "not shown to be safe with the questions allowed",
    Status.UNMEASURED: "the dense model answers too few questions for a loss to mean anything",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One budget on one set of contexts."""

    budget: Setting
    held_out: bool
    questions: int
    accuracy: float
    loss: float
    low: float
    high: float
    density: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """One task at one length by one method (``layers``: refined by layer or head).

    ``budget`` is the sparsest one that was verified, or None.
    """

    task: str
    task_class: TaskClass
    length: int
    method: str
    status: Status
    budget: Setting | None = None
    density: float = 1.0
    """Share of the visible blocks computed under ``budget``; 1 without one."""
    accuracy: float = 0.0
    """Dense, over the questions of the search."""
    loss: float = 0.0
    """Under ``budget``, on held-out samples."""
    high: float = 0.0
    """Its upper bound at the confidence asked for."""
    questions: int = 0
    """Asked in all under some budget."""
    trials: tuple[Trial, ...] = field(default=())
