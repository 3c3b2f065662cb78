"""How long this process has compiled while calls waited: said once, since a first call may take minutes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar

log = logging.getLogger("sparsepass")

LIMIT = 10.0
"""Seconds in total after which it is said."""

clock = time.perf_counter

_expected: ContextVar[bool] = ContextVar("sparsepass_compiling_expected", default=False)
_spent = 0.0
_graphs = 0


@contextlib.contextmanager
def expected() -> Iterator[None]:
    """Whoever calls inside knows that it compiles: that time is not counted."""
    token = _expected.set(True)
    try:
        yield
    finally:
        _expected.reset(token)


def add(seconds: float) -> None:
    """Count a compilation; where the total first passes ``LIMIT``, log one warning that names ``warmup``."""
    global _spent, _graphs
    if _expected.get():
        return
    before, _spent, _graphs = _spent, _spent + seconds, _graphs + 1
    if before < LIMIT <= _spent:
        log.warning(
            "Calls of this process have waited %.0f s for the compilation of %d graph%s so far, and each new length "
            "bucket, plan and stage of generate compiles once more. sparsepass.warmup(model, lengths, hints) compiles "
            "ahead; INFO of this logger has a line for each graph.",
            _spent,
            _graphs,
            "" if _graphs == 1 else "s",
        )
