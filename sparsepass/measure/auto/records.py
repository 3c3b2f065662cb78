"""What a collection found: for each request and budget, whether the answer was right, and every signal of the prefill.

JSON, one table per place (task, template, length, budget), a column per signal: what fits and comparisons read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsepass.errors import shown, shown_path
from sparsepass.host.files import check_output, read_json, write_json
from sparsepass.measure.auto.error import AutoError

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
        """Writes the file whole or not at all. Raises ``AutoError``."""
        rows = [{**asdict(place), "right": [int(one) for one in place.right]} for place in self.places]
        check_output(path, AutoError)
        write_json(path, {"version": VERSION, "about": dict(self.about), "places": rows}, AutoError, indent=None)

    @staticmethod
    def load(path: Path) -> Records:
        """Raises ``AutoError`` for a file that is not there or is something else."""
        data = read_json(path, "file of records", AutoError, finite=False)
        where = f"{shown_path(path)} holds no records of `sparsepass auto collect`"
        if not isinstance(data, dict):
            raise AutoError(f"{where}: it is a {type(data).__name__}.")
        if data.get("version") != VERSION:
            raise AutoError(f"{where}, version {VERSION}: its version is {shown(data.get('version'))}.")
        try:
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
            return Records(tuple(places), dict(data["about"]))
        except KeyError as error:
            raise AutoError(f"{where}: the field {error} is missing.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise AutoError(f"{where}: {error}.") from error

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
