"""What a task is: a generator of contexts with questions, of an exact length, with the class it stands for.

The classes are those of The Sparse Frontier (arXiv 2504.17768): scope, how many facts an answer needs, and dispersion,
how hard they are to find and how far apart they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sparsepass.errors import SparsepassError
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

Metric = Callable[[Sequence[int], Sequence[int]], float]
"""``metric(predicted, gold)`` on token ids, from 0.0 to 1.0."""


class TaskError(SparsepassError, ValueError):
    """A sample that cannot be drawn as asked: too short a length, no questions, an unknown task."""


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids that follow the context, and those that a right model answers with."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One context and its questions. Each question alone follows the context: they are not asked one after another."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]
    task: str
    length: int
    """The context with one question and its answer has at most this many tokens; exactly this many where all of the
    task's questions are equally long."""
    seed: int
    metric: Metric = exact_match
    gap: tuple[int, ...] = ()
    """Tokens that say nothing, to stand between questions in one sequence; none if they may not share one."""


class Task(Protocol):
    """A task: what it is called, where it stands on both axes, how answers are scored, and its samples."""

    @property
    def name(self) -> str: ...
    @property
    def task_class(self) -> TaskClass: ...
    @property
    def scope(self) -> Level: ...
    @property
    def dispersion(self) -> Level: ...
    @property
    def metric(self) -> Metric: ...

    def draw(self, length: int, seed: int, questions: int = 1) -> Sample:
        """The sample of this length, in tokens, and seed: the same on every machine. Raises ``TaskError``."""
        ...


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text, the same in every process and on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
