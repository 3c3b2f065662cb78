"""Every pattern that is looked for, in the order in which it is tried."""

from __future__ import annotations

import functools
import importlib.metadata
import logging

from sparsepass.patterns.composite import FLEX, MULTI_HEAD, NATIVE
from sparsepass.patterns.pattern import Pattern
from sparsepass.patterns.sdpa import OTHER_KERNEL, SDPA, SDPA_KERNEL
from sparsepass.patterns.written_out import WRITTEN_OUT

CATALOGUE: tuple[Pattern, ...] = (SDPA, SDPA_KERNEL, OTHER_KERNEL, WRITTEN_OUT, MULTI_HEAD, FLEX, NATIVE)
GROUP = "sparsepass.patterns"
"""Entry points of this group name a ``Pattern``, or a tuple of them, of another package."""

log = logging.getLogger("sparsepass")


@functools.lru_cache(maxsize=1)
def every_pattern() -> tuple[Pattern, ...]:
    """Patterns of other packages in the order of their names, then our own. One that does not load is logged."""
    found: list[Pattern] = []
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            held = entry.load()
            patterns = held if isinstance(held, tuple) else (held,)
            wrong = [one for one in patterns if not isinstance(one, Pattern)]
            if wrong:
                raise TypeError(
                    f"it is {wrong[0]!r}; accepted is a sparsepass.patterns.pattern.Pattern or a tuple of them"
                )
            found.extend(patterns)
        except Exception as error:  # code of another package: no reason not to compile
            log.warning("the pattern %r (%s) is not used: %s", entry.name, entry.value, error)
    return (*found, *CATALOGUE)
