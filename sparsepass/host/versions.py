"""Which versions of torch this was tested with, and the warning for others."""

from __future__ import annotations

import functools
import re
import warnings

import torch

FIRST, LAST = (2, 11), (2, 14)
"""The first and the last release of torch that the tests ran on (``make matrix``)."""


def untested(version: str) -> str | None:
    """What to say about a version of torch, as ``torch.__version__`` has it; None where it was tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and FIRST <= (int(found[1]), int(found[2])) <= LAST:
        return None
    tested = f"{FIRST[0]}.{FIRST[1]} to {LAST[0]}.{LAST[1]}"
    return (
        f"torch {version} was not tested with this version of sparsepass; {tested} were. "
        "It may work. If something fails or looks wrong, install one of these."
    )


@functools.cache
def warn_of_untested() -> None:
    """Warns once in a process, at the first compilation: importing stays silent."""
    said = untested(str(torch.__version__))
    if said is not None:
        warnings.warn(said, RuntimeWarning, stacklevel=3)
