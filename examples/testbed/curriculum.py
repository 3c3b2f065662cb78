"""Which sequence length the next step has: longer ones once the longest so far is answered well, not by the clock."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

MUST = {"single_qa": 0.9, "multi_qa": 0.9, "aggregation": 0.8, "multi_hop end": 0.8, "multi_hop names": 0.9}
"""Share of answer tokens that are right at the longest length, before a longer one joins."""

LAGGING = ("aggregation", "multi_hop end", "multi_hop names")
"""These hold the others back for ``patience`` steps at most: they may need more steps than the curriculum can wait."""


@dataclass
class Curriculum:
    """Lengths in use are ``lengths[: level + 1]``."""

    lengths: tuple[int, ...]
    patience: int
    seed: int
    mix: tuple[float, ...] = ()
    """How often each length is drawn, if not by the curriculum: then all are in use from the first step on."""
    level: int = 0
    at_level: int = 0
    """Steps since the longest length joined."""
    dice: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.dice.seed(self.seed)
        self._all_if_mixed()

    def _all_if_mixed(self) -> None:
        if self.mix:
            self.level = len(self.lengths) - 1

    @property
    def longest(self) -> int:
        return self.lengths[self.level]

    def next_length(self) -> int:
        """Half of the steps at the longest length in use, fewer where such a step takes long; the rest evenly."""
        self.at_level += 1
        if self.mix:
            return self.dice.choices(self.lengths, self.mix)[0]
        often = 0.5 if self.longest <= 1024 else 0.35 if self.longest <= 4096 else 0.2
        if self.level == 0 or self.dice.random() < often:
            return self.longest
        return self.lengths[self.dice.randrange(self.level)]

    def advance(self, right: dict[str, float]) -> bool:
        """Add the next length if ``right``, measured at the longest, allows it."""
        short = {part for part, share in MUST.items() if right.get(part, 0.0) < share}
        waited = self.at_level >= self.patience and short <= set(LAGGING)
        if self.level + 1 == len(self.lengths) or (short and not waited):
            return False
        self.level, self.at_level = self.level + 1, 0
        return True

    def state(self) -> dict[str, Any]:
        version, internal, gauss = self.dice.getstate()
        return {"level": self.level, "at_level": self.at_level, "dice": [version, list(internal), gauss]}

    def restore(self, state: dict[str, Any]) -> None:
        self.level, self.at_level = min(state["level"], len(self.lengths) - 1), state["at_level"]
        version, internal, gauss = state["dice"]
        self.dice.setstate((version, tuple(internal), gauss))
        self._all_if_mixed()
