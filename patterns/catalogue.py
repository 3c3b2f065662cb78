"""Every pattern that is looked for, in the order in which it is tried."""

from sparsepass.match import Pattern
from sparsepass.patterns.eager_softmax import EAGER_SOFTMAX
from sparsepass.patterns.sdpa import SDPA

CATALOGUE: tuple[Pattern, ...] = (SDPA, EAGER_SOFTMAX)
ANCHORS: tuple[str, ...] = tuple(dict.fromkeys(pattern.anchor for pattern in CATALOGUE))
