"""How sure one can be of a loss: exact binomial bounds on what was lost and won, question by question.

A dense and a sparse run answer the same questions. Of those that dense gets right (``right``), ``lost`` is what sparse
gets wrong, ``gained`` what it gets right besides; the loss is ``(lost - gained) / right``, a share of the dense
accuracy. Its bounds are those of Clopper and Pearson (1934) on both parts. Questions about one context are no
independent ones: they count for as many as their spread between contexts says (the design effect of a cluster sample).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from scipy.special import betaincinv

LEAST_CORRELATION = 0.02
"""Taken to hold between the questions of one context even where none was seen."""

LOST_SHARE = 0.8
"""Part of the error that is spent on what was lost; the rest on what was gained."""


@functools.lru_cache(maxsize=4096)
def upper_bound(events: float, trials: float, error: float) -> float:
    """The probability under which this few events would still come with probability ``error``; counts may be real."""
    if trials <= 0 or events >= trials:
        return 1.0
    return float(betaincinv(events + 1.0, trials - events, 1.0 - error))


@functools.lru_cache(maxsize=4096)
def lower_bound(events: float, trials: float, error: float) -> float:
    """The probability over which this many events would still come with probability ``error``."""
    if trials <= 0 or events <= 0:
        return 0.0
    return float(betaincinv(events, max(trials - events, 0.0) + 1.0, error))


@dataclass
class Paired:
    """Scores of the same questions, dense and sparse, added context by context."""

    questions: int = 0
    right: float = 0.0
    sparse: float = 0.0
    lost: float = 0.0
    gained: float = 0.0
    contexts: int = 0
    _clusters: list[tuple[float, float]] = field(default_factory=list)
    """(right, lost - gained) of each context."""
    _squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sums over questions of net^2, net * dense, dense^2."""

    def add(self, dense: Sequence[float], sparse: Sequence[float]) -> None:
        """Count one context's questions, scores from 0 to 1."""
        net = [one - other for one, other in zip(dense, sparse, strict=True)]
        self.questions += len(net)
        self.contexts += 1
        self.right += sum(dense)
        self.sparse += sum(sparse)
        self.lost += sum(one for one in net if one > 0)
        self.gained -= sum(one for one in net if one < 0)
        self._clusters.append((sum(dense), sum(net)))
        both = zip(net, dense, strict=True)
        squares = [(one * one, one * right, right * right) for one, right in both]
        self._squares = (
            self._squares[0] + sum(row[0] for row in squares),
            self._squares[1] + sum(row[1] for row in squares),
            self._squares[2] + sum(row[2] for row in squares),
        )

    @property
    def accuracy(self) -> float:
        """Dense, mean over the questions."""
        return self.right / self.questions if self.questions else 0.0

    @property
    def least_trials(self) -> float:
        """Questions that dense got right, as many as they count for if their contexts show no more likeness."""
        return self.right / design_effect(self.questions / self.contexts) if self.contexts else 0.0

    @property
    def loss(self) -> float:
        """Share of the dense accuracy that is lost; under 0 where sparse does better."""
        return (self.lost - self.gained) / self.right if self.right else 0.0

    @property
    def design_effect(self) -> float:
        """Questions asked per question that counts: 1 if those of a context are as different as those of two."""
        least = design_effect(self.questions / self.contexts) if self.contexts else 1.0
        loss, (net, mixed, right) = self.loss, self._squares
        alone = net - 2 * loss * mixed + loss * loss * right
        if self.contexts < 2 or alone <= 0:
            return least
        between = sum((lost - loss * right) ** 2 for right, lost in self._clusters)
        return max(least, between * self.contexts / (self.contexts - 1) / alone)

    def upper(self, error: float) -> float:
        """A bound that the loss is over with probability ``error`` at most."""
        return _upper(*self._counted(), error)

    def best_upper(self, error: float, questions: float, doubt: float) -> float:
        """The upper bound after so many questions in all, if it goes well: from now on as few are lost and gained as
        the rates that those so far are under with probability ``doubt``, but no fewer lost than gained, since sparse
        attention is not better than dense."""
        if not self.questions:
            return 0.0
        more = max(1.0, questions / self.questions)
        lost, gained, trials = self._counted()
        least = [lower_bound(min(one, trials), trials, doubt) * (more - 1.0) * trials for one in (lost, gained)]
        return _upper(lost + max(least), gained + least[1], more * trials, error)

    def lower(self, error: float) -> float:
        """A bound that the loss is under with probability ``error`` at most."""
        lost, gained, trials = self._counted()
        return lower_bound(lost, trials, LOST_SHARE * error) - upper_bound(gained, trials, (1 - LOST_SHARE) * error)

    def _counted(self) -> tuple[float, float, float]:
        """Questions lost, gained and right densely, as many as they count for."""
        effect = self.design_effect
        return self.lost / effect, self.gained / effect, self.right / effect


def _upper(lost: float, gained: float, trials: float, error: float) -> float:
    return upper_bound(lost, trials, LOST_SHARE * error) - lower_bound(gained, trials, (1 - LOST_SHARE) * error)


def design_effect(per_context: float, correlation: float = LEAST_CORRELATION) -> float:
    """Of ``per_context`` questions about one context that are so much alike."""
    return 1.0 + max(0.0, per_context - 1.0) * correlation


def trials_needed(loss: float, error: float) -> float:
    """Independent questions, right densely, that show a loss of at most ``loss`` if none is lost."""
    return math.log(LOST_SHARE * error) / math.log1p(-loss)


def questions_needed(loss: float, error: float, per_context: int, accuracy: float = 1.0) -> int:
    """Questions that show a loss of at most ``loss`` if none is lost: fewer can show nothing."""
    return math.ceil(trials_needed(loss, error) * design_effect(per_context) / accuracy)
