"""Needles: the code of one thing, or of four things at once, among all others' (after RULER, 2404.06654)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsepass.measure.tasks.text.words import ADJECTIVES, NOUNS, TOWNS
from sparsepass.measure.tasks.text.writing import TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

SAID = ("The code of the {name} is {code}.\n", "Whoever opens the {name} needs the number {code}.\n")
ASKED = (
    "What is the code of the {names}? Give the code alone.",
    "Which number opens the {names}? Give the number alone.",
)
ASKED_MANY = (
    "What are the codes of the {names}? Give the codes alone, in this order, with commas.",
    "Which numbers open the {names}? Give the numbers alone, in this order, with commas.",
)


@dataclass(frozen=True)
class Needle(TextTask):
    """One code of many. Every line is such a code, so the others distract."""

    name: str = "text_needle"
    task_class: TaskClass = TaskClass.SINGLE_QA
    scope: Level = "low"
    dispersion: Level = "low"
    queries: int = 1
    smallest: int = 4

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        most = len(ADJECTIVES) * len(NOUNS) * len(TOWNS)
        names = [_named(one) for one in dice.sample(range(most), min(size, most))]
        codes = [str(code) for code in dice.sample(range(100_000, 1_000_000), len(names))]
        pieces = tuple(
            SAID[self.template].format(name=name, code=code) for name, code in zip(names, codes, strict=True)
        )
        asked = ASKED if self.queries == 1 else ASKED_MANY
        written = []
        for _ in range(questions):
            chosen = dice.sample(range(len(names)), self.queries)
            listed = ", the ".join(names[one] for one in chosen)
            written.append((asked[self.template].format(names=listed), ", ".join(codes[one] for one in chosen)))
        return Written(pieces, tuple(dict.fromkeys(written)))


@dataclass(frozen=True)
class Needles(Needle):
    """Four codes of many, asked for at once."""

    name: str = "text_needles"
    task_class: TaskClass = TaskClass.MULTI_QA
    queries: int = 4


def _named(number: int) -> str:
    number, town = divmod(number, len(TOWNS))
    number, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[number]} {NOUNS[noun]} of {TOWNS[town]}"
