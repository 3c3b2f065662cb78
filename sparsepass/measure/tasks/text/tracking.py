"""Variable tracking: all names that end at a value, through chains of assignments (after RULER, 2404.06654)."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from sparsepass.measure.tasks.metrics import iou
from sparsepass.measure.tasks.text.words import FILLER, made_up
from sparsepass.measure.tasks.text.writing import Measure, TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

GIVEN = ("Let {name} = {value}.\n", "{name} is set to {value}.\n")
COPIED = ("Let {name} = {source}.\n", "{name} takes what {source} has.\n")
ASKED = (
    "Which names equal {value}? List all of them, with commas.",
    "Which names have the value {value}? List all of them, with commas.",
)


@dataclass(frozen=True)
class Tracking(TextTask):
    """Eight chains of one value and four copies, in order but scattered among sentences that say nothing."""

    name: str = "text_tracking"
    task_class: TaskClass = TaskClass.MULTI_HOP
    scope: Level = "low"
    dispersion: Level = "high"
    measure: Measure = iou
    chains: int = 8
    hops: int = 4

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        length = self.hops + 1
        names = made_up(self.chains * length, dice, capital=True)
        values = [str(value) for value in dice.sample(range(10_000, 100_000), self.chains)]
        said: list[list[str]] = []
        for chain, value in enumerate(values):
            mine = names[chain * length : (chain + 1) * length]
            first = GIVEN[self.template].format(name=mine[0], value=value)
            later = [
                COPIED[self.template].format(name=name, source=source) for source, name in itertools.pairwise(mine)
            ]
            said.append([first, *later])
        turns = [chain for chain in range(self.chains) for _ in range(length)]
        dice.shuffle(turns)
        waiting = [iter(one) for one in said]
        statements = [next(waiting[chain]) for chain in turns]
        places = set(dice.sample(range(size + len(statements)), len(statements)))
        lines = iter(statements)
        pieces = tuple(
            next(lines) if place in places else f"{dice.choice(FILLER)}\n" for place in range(size + len(statements))
        )
        asked = dice.sample(range(self.chains), min(questions, self.chains))
        written = tuple(
            (ASKED[self.template].format(value=values[one]), ", ".join(names[one * length : (one + 1) * length]))
            for one in asked
        )
        return Written(pieces, written)
