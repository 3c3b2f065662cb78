"""Story multi-hop: what somebody held before another thing (after The Sparse Frontier, 2504.17768)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsepass.measure.tasks.text.story import story
from sparsepass.measure.tasks.text.writing import TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

ASKED = (
    "What did {person} hold right before the {item}? Give the thing alone.",
    "Which thing did {person} let go for the {item}? Give the thing alone.",
)


@dataclass(frozen=True)
class StoryMultiHop(TextTask):
    """The thing was got some chapters before, by a trade that does not name the later one."""

    name: str = "text_story_multi_hop"
    task_class: TaskClass = TaskClass.MULTI_HOP
    scope: Level = "low"
    dispersion: Level = "high"
    smallest: int = 8

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        chapters = story(size, dice)
        held: dict[str, str] = {}
        changes = []
        for one in chapters:
            if one.holder in held:
                changes.append((one.holder, held[one.holder], one.item))
            held[one.holder] = one.item
        chosen = dice.sample(changes, min(questions, len(changes)))
        written = tuple((ASKED[self.template].format(person=who, item=item), before) for who, before, item in chosen)
        return Written(tuple(one.text(self.template) for one in chapters), written)
