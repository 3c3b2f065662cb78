"""Story filtering: all chapters in which something did not happen (after The Sparse Frontier, 2504.17768)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsepass.measure.tasks.metrics import iou
from sparsepass.measure.tasks.text.story import EVENTS, story
from sparsepass.measure.tasks.text.writing import Measure, TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

ASKED = (
    "In which chapters was there no {event}? Give the numbers of all of them, with commas.",
    "List the numbers of all chapters without a {event}, with commas.",
)


@dataclass(frozen=True)
class StoryFiltering(TextTask):
    """Three chapters of all lack an event. What is not there has no place to attend to, so every chapter counts.

    A context has four questions at most, one per event.
    """

    name: str = "text_story_filtering"
    task_class: TaskClass = TaskClass.AGGREGATION
    scope: Level = "high"
    dispersion: Level = "low"
    measure: Measure = iou
    smallest: int = 6

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        chapters = story(size, dice)
        asked = dice.sample(list(EVENTS), min(questions, len(EVENTS)))
        written = tuple(
            (
                ASKED[self.template].format(event=event),
                ", ".join(str(one.number) for one in chapters if event not in one.events),
            )
            for event in asked
        )
        return Written(tuple(one.text(self.template) for one in chapters), written)
