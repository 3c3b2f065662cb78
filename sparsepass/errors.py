"""Errors raised to users. Each says what was given, what is accepted, and what to do."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 2000
"""Characters of an error's text; of a longer one the middle is left out."""

SHOWN = 80
"""Characters of a given value that an error shows."""


class SparsepassError(Exception):
    """Base of every error that sparsepass raises on purpose. Its text has at most ``LONGEST`` characters."""

    def __init__(self, *given: object) -> None:
        super().__init__(*(_cut(one, LONGEST) if isinstance(one, str) else one for one in given))


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


def shown(value: object, most: int = SHOWN) -> str:
    """``repr`` of a value that a user gave, for an error: short, quick, and never itself an error."""
    return _cut(_Shown(most).repr(value), 2 * most)


def quoted_path(path: object) -> str:
    """A path in quotes, for an error's text."""
    return shown(str(path), 2 * SHOWN)


def shown_path(path: object) -> str:
    """A path as an error's text begins with it: in quotes only if it is long or cannot be printed."""
    text = str(path)
    return text if len(text) <= 2 * SHOWN and text.isprintable() else shown(text, 2 * SHOWN)


def close_names(given: str, known: Iterable[str]) -> str:
    """Sentence naming the known spellings, the nearest first: used by every 'unknown name' error."""
    names = sorted(known)
    # Ten times as long as every name is near none, and comparing takes time with its length.
    short = len(given) <= 10 * max(map(len, names), default=0)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5) if short else []
    listed = ", ".join(repr(name) for name in names)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}? Known: {listed}."
    return f"Known: {listed}."


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head, tail = most * 3 // 5, most // 3
    return f"{text[:head]} ... {text[-tail:]}"


class _Shown(reprlib.Repr):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8
        self.maxother = self.maxstring = most

    def repr_str(self, x: str, level: int) -> str:
        return repr(x) if len(x) <= self.maxstring else f"{x[: self.maxstring]!r}... ({len(x)} characters)"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= self.maxstring else f"{x[: self.maxstring]!r}... ({len(x)} bytes)"

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of thousands of digits.
        return repr(x) if x.bit_length() <= 200 else f"a number of some {int(x.bit_length() * 0.30103) + 1} digits"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            return super().repr_instance(x, level)
        except Exception:
            return f"<{type(x).__name__}>"
