"""How sure a mean score is: bootstrap intervals that resample contexts, as questions on one context are alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and the interval it lies in at ``level``."""

    mean: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(scores: Sequence[Sequence[float]], *, level: float = 0.95, rounds: int = 2000, seed: int = 0) -> Interval:
    """The percentile interval (Efron 1979) of the mean of all scores, ``scores[context][question]``.

    It says nothing where all scores are equal: a mean of 1.0 has the interval 1.0 to 1.0, however few there are. Raises
    ``ValueError`` without a score.
    """
    sums = [(sum(one), len(one)) for one in scores if one]
    if not sums or not 0.0 < level < 1.0 or rounds < 1:
        raise ValueError(
            f"{len(sums)} contexts, level {level}, rounds {rounds}; accepted: 1 or more, 0 to 1, 1 or more."
        )
    dice = random.Random(seed)
    means = sorted(_mean(dice.choices(sums, k=len(sums))) for _ in range(rounds))
    tail = (1.0 - level) / 2.0
    low, high = (means[min(rounds - 1, int(share * rounds))] for share in (tail, 1.0 - tail))
    return Interval(_mean(sums), low, high, level)


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    return sum(one[0] for one in sums) / sum(one[1] for one in sums)
