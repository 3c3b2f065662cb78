"""Every pattern that is looked for, in the order in which it is tried."""

from sparsepass.match import Pattern
from sparsepass.patterns.composite import FLEX, MULTI_HEAD, NATIVE
from sparsepass.patterns.sdpa import SDPA
from sparsepass.patterns.written_out import WRITTEN_OUT

CATALOGUE: tuple[Pattern, ...] = (SDPA, WRITTEN_OUT, MULTI_HEAD, FLEX, NATIVE)
ANCHORS: tuple[str, ...] = tuple(dict.fromkeys(pattern.anchor for pattern in CATALOGUE))
