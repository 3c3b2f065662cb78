"""Story retrieval: sixteen times, where was somebody in a chapter (after The Sparse Frontier, 2504.17768)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsepass.measure.tasks.metrics import in_place
from sparsepass.measure.tasks.text.story import story
from sparsepass.measure.tasks.text.writing import Measure, TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

ASKED = (
    "Where was {asked}? Give the towns alone, in this order, with commas.",
    "Name the towns of {asked}, in this order, with commas.",
)
ONE = ("{person} in chapter {number}", "chapter {number} for {person}")


@dataclass(frozen=True)
class StoryRetrieval(TextTask):
    """``queries`` questions at once; the score is the share that is right."""

    name: str = "text_story_retrieval"
    task_class: TaskClass = TaskClass.MULTI_QA
    scope: Level = "low"
    dispersion: Level = "low"
    measure: Measure = in_place
    queries: int = 16
    smallest: int = 8

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        chapters = story(size, dice)
        facts = [(one.number, person, place) for one in chapters for person, place in one.places.items()]
        written = []
        for _ in range(questions):
            chosen = dice.sample(facts, self.queries)
            listed = ", ".join(ONE[self.template].format(person=who, number=number) for number, who, _ in chosen)
            written.append((ASKED[self.template].format(asked=listed), ", ".join(place for _, _, place in chosen)))
        return Written(tuple(one.text(self.template) for one in chapters), tuple(dict.fromkeys(written)))
