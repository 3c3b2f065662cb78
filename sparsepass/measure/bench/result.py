"""A file of measurements: what was run, where, and the records; and what is derived from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepass.errors import SHOWN, OptionError, SparsepassError, quoted_path
from sparsepass.host.files import check_output, read_json, write_whole

FORMAT, VERSION = "sparsepass.bench", 1
Record = dict[str, Any]
_PARTS = {"what": str, "environment": dict, "settings": dict, "records": list, "fits": list, "notes": list}
SHAPE = ("batch", "heads", "kv_heads", "length", "head_dim", "dtype")


@dataclass(slots=True)
class Result:
    """Records of one run. ``what``: kernel, selection, op or model; ``settings``: what was asked for."""

    what: str
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    fits: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_text(self) -> str:
        """JSON with one record to a line."""
        parts = [f' "format": {json.dumps(FORMAT)}', f' "version": {VERSION}', f' "what": {json.dumps(self.what)}']
        for name in ("environment", "settings", "notes"):
            parts.append(f' "{name}": {json.dumps(getattr(self, name))}')
        for name in ("records", "fits"):
            lines = ",\n".join("  " + json.dumps(one) for one in getattr(self, name))
            parts.append(f' "{name}": [\n{lines}\n ]' if lines else f' "{name}": []')
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def save(self, file: Path) -> None:
        """Writes the file whole or not at all. Raises ``OptionError``."""
        check_output(file, OptionError)
        write_whole(file, self.to_text(), OptionError)

    @classmethod
    def load(cls, file: Path) -> Result:
        """Reads what ``save`` wrote. Raises ``OptionError``."""
        data = read_json(file, "result", OptionError, finite=False)
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise OptionError(
                f"{quoted_path(file)} is no result of sparsepass bench (format {FORMAT!r}, version {VERSION})."
            )
        held = {name: data[name] for name in _PARTS if name in data}
        for name, kind in _PARTS.items():
            if not isinstance(held.get(name, kind()), kind) or (name not in held and name in ("what", "environment")):
                raise OptionError(f"{quoted_path(file)}: {name!r} is missing or of another type; measure again.")
        for name in ("records", "fits"):
            if not all(isinstance(one, dict) and isinstance(one.get("variant"), str) for one in held.get(name, ())):
                raise OptionError(f"{quoted_path(file)}: {name!r} has an entry without a 'variant'; measure again.")
        return cls(**held)


@contextmanager
def legible(file: Path) -> Iterator[None]:
    """Where the records of a file are shown: raises ``OptionError`` if one is not as ``sparsepass bench`` writes it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        if isinstance(error, SparsepassError):
            raise
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)[:SHOWN]
        raise OptionError(f"{quoted_path(file)} has a record that cannot be shown: {reason}; measure again.") from error


def shape_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What records must have in common to be compared."""
    return tuple(record.get(name) for name in SHAPE)


def timed(record: Mapping[str, Any]) -> bool:
    """Whether a record has a time that may be compared: it ran, and its result was right."""
    return "median_ms" in record and bool(record.get("correct", False))


def add_speedups(records: Iterable[Record]) -> None:
    """Adds ``speedup`` to the sparse records: over each dense kernel, over the fastest (``dense``), and over the others
    on the same lists. A wrong result has none, and none is taken over a wrong one."""
    every = list(records)
    for record in every:
        record.pop("speedup", None)
        if not timed(record) or record.get("does") in ("dense", "select"):
            continue
        others = [one for one in every if one is not record and timed(one) and shape_of(one) == shape_of(record)]
        dense = {one["variant"]: one["median_ms"] for one in others if one.get("does") == "dense"}
        if dense:
            dense["dense"] = min(dense.values())
        alike = {
            one["variant"]: one["median_ms"]
            for one in others
            if one.get("does") == record.get("does") == "lists"
            and (one.get("lists"), one.get("density")) == (record.get("lists"), record.get("density"))
        }
        found = {name: round(time / record["median_ms"], 3) for name, time in {**dense, **alike}.items()}
        if found:
            record["speedup"] = found


def fit_lines(records: Iterable[Record]) -> list[Record]:
    """Time against computed density as a straight line, by least squares, for each variant with three densities.

    ``slope_ms`` is the time for density 1, ``constant_ms`` what is left at density 0; ``constant_share`` is the
    constant over the time at the least density, ``r2`` the share of the variance that the line explains.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if timed(record) and record.get("does") not in ("dense", "select") and record.get("density_computed"):
            kind = (record["variant"], record.get("method_name"), record.get("lists"))
            groups.setdefault((*shape_of(record), *kind), []).append(record)
    fits = []
    for key, members in groups.items():
        points = sorted((one["density_computed"], one["median_ms"]) for one in members)
        if len({density for density, _ in points}) < 3:
            continue
        densities, times = zip(*points, strict=True)
        slope, constant = statistics.linear_regression(densities, times)
        mean = statistics.fmean(times)
        spread = sum((time - mean) ** 2 for time in times)
        left = sum((time - slope * density - constant) ** 2 for density, time in points)
        fit: Record = dict(zip(SHAPE, key, strict=False))
        fit |= {"variant": key[len(SHAPE)], "lists": members[0].get("lists"), "points": len(points)}
        fit |= {"slope_ms": round(slope, 5), "constant_ms": round(constant, 5)}
        fit |= {"constant_share": round(constant / times[0], 4), "r2": round(1 - left / spread, 6) if spread else 1.0}
        if members[0].get("method_name"):
            fit["method_name"] = members[0]["method_name"]
        fits.append(fit)
    return fits
