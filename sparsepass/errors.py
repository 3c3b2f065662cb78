"""Errors raised to users. Each says what was given, what is accepted, and what to do."""

import difflib
from collections.abc import Iterable


class SparsepassError(Exception):
    """Base of every error that sparsepass raises on purpose."""


class HintError(SparsepassError, ValueError):
    """A task hint that is not one of the known ones."""


class PolicyError(SparsepassError, ValueError):
    """A policy file or object that does not follow the schema."""


class OptionError(SparsepassError, ValueError):
    """An unknown or ill-typed entry in ``options=``."""


class KernelInputError(SparsepassError, ValueError):
    """Arguments that a kernel does not accept; the message names the argument, its value and what is accepted."""


class GraphInvariantError(SparsepassError, RuntimeError):
    """A rewrite broke an invariant of the captured graph. Always a bug in sparsepass, never the user's."""


def close_names(given: str, known: Iterable[str]) -> str:
    """Sentence naming the known spellings, the nearest first: used by every 'unknown name' error."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    listed = ", ".join(repr(name) for name in names)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}? Known: {listed}."
    return f"Known: {listed}."
