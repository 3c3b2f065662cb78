"""A story in chapters, on which three tasks ask: who was where, who held what, and what did not happen."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsepass.measure.tasks.text.words import ADJECTIVES, HOURS, NOUNS, PEOPLE, TOWNS

EVENTS = {
    "storm": "A storm broke over the roofs.",
    "song": "Somebody sang a song to the end.",
    "quarrel": "There was a quarrel about money.",
    "letter": "A letter arrived and was read aloud.",
}
MISSING = 3
"""Chapters in which an event did not take place, for each event: few, so that the answer is short at any length."""


@dataclass(frozen=True)
class Chapter:
    number: int
    places: dict[str, str]
    """Where each person of this chapter was."""
    holder: str
    item: str
    """What ``holder`` held from here on, in place of what it was before."""
    events: tuple[str, ...]
    hour: str

    def text(self, template: int) -> str:
        (first, here), (second, there) = self.places.items()
        events = " ".join(EVENTS[event] for event in self.events)
        if template == 0:
            return (
                f"Chapter {self.number}. {self.hour.capitalize()} {first} was in {here}, and {second} was in {there}. "
                f"{self.holder} traded what was held so far for the {self.item}. {events}\n"
            )
        return (
            f"Chapter {self.number}. {here} saw {first} {self.hour}; {second} stayed in {there}. "
            f"The {self.item} came to {self.holder}, who let the thing held before go. {events}\n"
        )


def story(chapters: int, dice: random.Random) -> list[Chapter]:
    """``chapters`` chapters; every item is there once, and a few people hold them by turns."""
    people = dice.sample(PEOPLE, max(4, min(len(PEOPLE), chapters // 4)))
    most = len(ADJECTIVES) * len(NOUNS)
    items = [dice.randrange(most) for _ in range(chapters)] if chapters > most else dice.sample(range(most), chapters)
    absent = {event: set(dice.sample(range(chapters), min(MISSING, chapters))) for event in EVENTS}
    found = []
    for number in range(chapters):
        first, second = dice.sample(people, 2)
        here, there = dice.sample(TOWNS, 2)
        adjective, noun = divmod(items[number], len(NOUNS))
        found.append(
            Chapter(
                number + 1,
                {first: here, second: there},
                dice.choice((first, second)),
                f"{ADJECTIVES[adjective]} {NOUNS[noun]}",
                tuple(event for event in EVENTS if number not in absent[event]),
                dice.choice(HOURS),
            )
        )
    return found
