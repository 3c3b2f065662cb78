"""Common words: the ten words of a list that stand there most often (after RULER, 2404.06654)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsepass.measure.tasks.metrics import iou
from sparsepass.measure.tasks.text.words import made_up
from sparsepass.measure.tasks.text.writing import Measure, TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

COMMON = 10
TIMES_AS_OFTEN = 10
ASKED = (
    "Which ten words stand most often in the list? Give the ten words, with commas.",
    "Name the ten words that were written down more often than all others, with commas.",
)


@dataclass(frozen=True)
class CommonWords(TextTask):
    """Ten words stand 30 times, all others 3 times; where the text is too short for that, 20 and 2, or 10 and 1.

    A context has one question.
    """

    name: str = "text_common_words"
    task_class: TaskClass = TaskClass.AGGREGATION
    scope: Level = "high"
    dispersion: Level = "low"
    measure: Measure = iou
    smallest: int = 150
    """Words in the list, repeats included."""

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        rarely = 3 if size >= 900 else 2 if size >= 500 else 1
        often = rarely * TIMES_AS_OFTEN
        words = made_up(COMMON + (size - COMMON * often) // rarely, dice)
        common, others = words[:COMMON], words[COMMON:]
        listed = common * often + others * rarely
        dice.shuffle(listed)
        width = 12
        pieces = tuple(" ".join(listed[start : start + width]) + "\n" for start in range(0, len(listed), width))
        return Written(pieces, ((ASKED[self.template], ", ".join(common)),))
