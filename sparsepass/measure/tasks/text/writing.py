"""Text tasks: what a task writes becomes token ids of an exact length.

A task writes a text of some size, in pieces. The largest size that fits is looked for; the few tokens that are left are
filled with sentences that say nothing.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparsepass.measure.tasks.base import Metric, Question, Sample, TaskError, stable_seed
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.measure.tasks.text.codec import Bytes, Codec
from sparsepass.measure.tasks.text.words import FILLER
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

Measure = Callable[[Sequence[str], Sequence[str]], float]
LARGEST = 1 << 20


@dataclass(frozen=True)
class Written:
    """Pieces of a context in order, each with its own end of line, and (question, answer) pairs on it."""

    pieces: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TextMetric:
    """A measure of items as a metric of token ids: the first line of the decoded text, cut at commas."""

    codec: Codec
    measure: Measure

    def __call__(self, predicted: Sequence[int], gold: Sequence[int]) -> float:
        return self.measure(self.items(predicted), self.items(gold))

    def items(self, ids: Sequence[int]) -> list[str]:
        lines = self.codec.decode(ids).strip().splitlines()
        return [item.strip(" .").casefold() for item in lines[0].split(",") if item.strip(" .")] if lines else []


@dataclass(frozen=True)
class TextTask(ABC):
    """A task in words. ``template``: one of two wordings, to test on one that a calibration has not seen."""

    name: str
    task_class: TaskClass
    scope: Level
    dispersion: Level
    measure: Measure = exact_match
    codec: Codec = field(default_factory=Bytes)
    template: int = 0
    smallest: int = 1
    """The size below which a text does not have what its questions need."""

    @property
    def metric(self) -> Metric:
        return TextMetric(self.codec, self.measure)

    @abstractmethod
    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        """A text of ``size``, in whatever the task counts, and at most ``questions`` questions on it."""

    def draw(self, length: int, seed: int, questions: int = 1) -> Sample:
        """The sample of this length, in tokens, and seed. It may have fewer questions, where a context has no more.

        The longest question with its answer fits ``length`` exactly. Raises ``TaskError`` for a length without room.
        """
        if questions < 1:
            raise TaskError(f"{self.name}: questions={questions}; accepted is 1 or more.")
        fits = self._encoded(self.smallest, seed, questions)
        if fits.total > length:
            raise TaskError(f"{self.name}: {length} tokens are too few; with this codec it takes {fits.total} or more.")
        too_long: int | None = None
        while too_long is None or too_long - fits.size > 1:
            size = self._next_size(length, fits, too_long)
            tried = self._encoded(size, seed, questions)
            if tried.total > length:
                too_long = size
            elif size == LARGEST or tried.total == fits.total:  # there is no more to write
                fits = tried
                break
            else:
                fits = tried
        context = (*fits.context, *self._rest(length - fits.total))
        return Sample(context, fits.questions, self.name, length, seed, metric=self.metric)

    def _next_size(self, length: int, fits: Encoded, too_long: int | None) -> int:
        """By the tokens per size so far, strictly between what fits and what does not."""
        guess = fits.size * length // max(1, fits.total)
        if too_long is None:
            return min(LARGEST, max(fits.size + 1, min(guess, 16 * fits.size) + 1))
        return min(too_long - 1, max(fits.size + 1, guess))

    def _encoded(self, size: int, seed: int, questions: int) -> Encoded:
        dice = random.Random(stable_seed(self.name, self.template, seed))
        written = self.write(size, questions, dice)
        encode = self.codec.encode
        context = (*self.codec.head, *itertools.chain.from_iterable(map(encode, written.pieces)))
        asked = tuple(
            Question((*encode(f"\n{question}\nAnswer:"), *self.codec.tail), encode(f" {answer}"))
            for question, answer in written.questions
        )
        return Encoded(size, context, asked)

    def _rest(self, count: int) -> tuple[int, ...]:
        """Exactly ``count`` tokens of sentences that say nothing, cut off where they end."""
        sentences = itertools.cycle(FILLER)
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += self.codec.encode(f"{next(sentences)}\n")
        return tuple(tokens[:count])


@dataclass(frozen=True)
class Encoded:
    """What a size gives, in tokens."""

    size: int
    context: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def total(self) -> int:
        return len(self.context) + max(len(one.prompt) + len(one.answer) for one in self.questions)
