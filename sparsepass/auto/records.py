"""What a collection found: for each request and budget, whether the answer was right, and every signal of the prefill.

JSON, one table per place (task, template, length, budget), a column per signal: what fits and comparisons read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsepass.auto.error import AutoError

VERSION = 1

THEN = "then"
"""Budget of a place that ran under what a policy gives requests without a hint: what ``auto`` runs again under."""

TOLD = "told"
"""Budget of a place that ran under what a policy gives the task's own class."""

UNTRIED = ("dense", THEN, TOLD)
"""Budgets of places that no look at the prefill belongs to."""


@dataclass(frozen=True)
class Place:
    """One task, template and length under one budget: a row per request in each column."""

    task: str
    task_class: str
    template: int
    length: int
    budget: str
    """Text of the budget, ``dense`` for exact attention; or ``THEN`` or ``TOLD``."""
    density: float
    """Share of the visible blocks that was computed."""
    right: tuple[bool, ...]
    """Whether the whole answer was right, by request; requests are those of every other budget of the place."""
    signals: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By name; only of budgets that can be tried."""


@dataclass(frozen=True)
class Records:
    """All places. ``about``: fingerprint of the model and the settings of the probe."""

    places: tuple[Place, ...]
    about: Mapping[str, Any]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(place), "right": [int(one) for one in place.right]} for place in self.places]
        path.write_text(
            json.dumps({"version": VERSION, "about": dict(self.about), "places": rows}) + "\n", encoding="utf-8"
        )

    @staticmethod
    def load(path: Path) -> Records:
        """Raises ``AutoError`` for a file that is not there or is something else."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            places = [
                Place(
                    **{
                        **row,
                        "right": tuple(bool(one) for one in row["right"]),
                        "signals": {name: tuple(column) for name, column in row["signals"].items()},
                    }
                )
                for row in data["places"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AutoError(f"{path} holds no records of `sparsepass auto collect`: {error}.") from error
        if data.get("version") != VERSION:
            raise AutoError(f"{path} has format version {data.get('version')!r}; this sparsepass reads {VERSION}.")
        return Records(tuple(places), data["about"])

    def of(self, **wanted: Any) -> Iterator[Place]:
        """Places whose fields have these values; a tuple, list or set accepts any of its members."""
        for place in self.places:
            if all(_is(getattr(place, name), value) for name, value in wanted.items()):
                yield place

    def tried(self) -> list[str]:
        """Budgets that were tried with a look at their prefill, in order."""
        return [name for name in dict.fromkeys(place.budget for place in self.places) if name not in UNTRIED]

    def like(self, place: Place, budget: str) -> Place | None:
        """The place of the same requests under another budget, if there is one."""
        return next(self.of(task=place.task, template=place.template, length=place.length, budget=budget), None)

    def lengths(self) -> list[int]:
        return sorted({place.length for place in self.places})

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(place.task for place in self.places))


def _is(given: Any, wanted: Any) -> bool:
    return given in wanted if isinstance(wanted, Iterable) and not isinstance(wanted, str) else given == wanted
