"""Words that the text tasks are made of: our own lists, and words that no language has."""

from __future__ import annotations

import itertools
import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    amber ancient bitter blue brass bright broken calm carved clever cold copper crooked dark deep distant dusty
    early empty faded fair fierce frozen gentle gilded golden gray green heavy hidden hollow honest humble iron
    ivory jade late light little lonely long loud lucky mild misty narrow noble odd old pale patient plain
    polished proud quick quiet rare red restless round rough rusty sharp silent silver simple slow small smooth
    soft solid spare steady steep stern still stone strange sunny sweet tall tame thin tired tiny velvet warm
    weary white wide wild wise young
    """
)
NOUNS = _words(
    """
    anchor arch attic barn basket beacon bell bench boat bottle bridge bucket cabin candle canoe castle cellar
    chest chapel clock cottage court crane crate cradle dam desk dock door drum engine farm ferry fence fountain
    forge gate garden glider granary hall harbor hut inn jar kettle key kiln ladder lamp lantern library
    lighthouse lock loom mill mine mirror museum needle office organ oven palace piano pier plow pump quarry
    raft rope saddle sail school shed ship shop shrine sled stable station statue stove study table tavern
    temple theater tower trunk tunnel vault violin wagon wall warehouse watch well wharf wheel windmill workshop
    yard
    """
)
TOWNS = _words(
    """
    Aldmere Barrow Calder Dunmore Elsby Farrow Gresham Hollin Ipsley Jarrow Kelby Larkhill Marden Norwood Oakley
    Penrith Quarndon Ripley Selby Thornby Ulverton Verwood Wexcombe Yarley Zennor Ashbury Birchley Colwick
    Denholm Easton Fenwick Glossop Hartley Ivydale Kirkby Lindale Melrose Newham Orford Pelham Redmile Stanhope
    Tilbury Upwell
    """
)
PEOPLE = _words(
    """
    Ada Boris Clara Dario Elena Felix Greta Hugo Irene Jonas Karin Louis Marta Nadir Olive Pavel Quinn Rosa
    Simon Tilda Ursula Viktor Wanda Xavier Yara Zoltan
    """
)
HOURS = (
    *("at dawn", "before breakfast", "in the morning", "late in the morning", "at noon", "after lunch"),
    *("in the afternoon", "at tea time", "at dusk", "in the evening", "after supper", "at midnight"),
)
FILLER = (
    "The road went on past hedges and low walls.",
    "A light wind came from the west and went again.",
    "Somebody had left a gate open, and somebody closed it.",
    "The clouds were neither high nor low that day.",
    "Carts passed now and then, some full and some empty.",
    "A dog barked twice and then lay down.",
    "It was as quiet as on most days of that season.",
    "The bread was good and the soup was warm.",
    "Nobody could say how long the bench had stood there.",
    "Rain was expected, and later it was not.",
    "The river kept to its bed between the willows.",
    "People talked about the price of wool and of salt.",
)


def made_up(count: int, dice: random.Random, *, capital: bool = False) -> list[str]:
    """``count`` different words that can be spoken and mean nothing, of two or three syllables."""
    two = list(itertools.product(_SYLLABLES, repeat=2))
    found = dict.fromkeys("".join(one) for one in dice.sample(two, min(count, len(two) // 2)))
    while len(found) < count:
        found["".join(dice.choice(_SYLLABLES) for _ in range(3))] = None
    return [word.upper() if capital else word for word in found]


_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "is", "or", "um")]
