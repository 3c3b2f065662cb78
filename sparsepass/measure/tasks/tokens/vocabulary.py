"""The vocabulary of the token-level tasks: 4096 ids in disjoint ranges, nothing to tokenize.

Names and values are drawn anew for every sample, so that an answer can only come from the context.
"""

from __future__ import annotations

SIZE = 4096

BOS = 0
PAD = 1
ASK_ONE = (2, 3)
"""The marker in front of a question; one id per template, here and below."""
ASK_MANY = (4, 5)
ASK_CHAIN = (6, 7)
LINK = (8, 9)
ASK_TOP = ((10, 11, 12, 13), (14, 15, 16, 17))
"""Per template, one id per group of counted values."""
ANSWER = 18

TEMPLATES = 2

FILLER = range(32, 512)
GROUPS = tuple(range(512 + 128 * group, 640 + 128 * group) for group in range(4))
"""Values that are counted: four kinds, each with a range of its own."""
VALUES = range(1024, 2560)
NAMES = range(2560, SIZE)
