"""Crossover tables: their data, their file, and how they are fitted to measurements."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sparsepass.errors import OptionError, shown
from sparsepass.kernels.runtime.tuned import devices, is_tuning

MARGIN = 1.05
"""Dense time over sparse time from which sparse counts as faster: under it, noise could make a site lose."""

VERSION = 1
Points = tuple[tuple[int, float], ...]
"""(key length in tokens, largest winning density), lengths rising; density 0: dense won at every density."""


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement. Times in milliseconds, selection included in ``sparse_ms``; ``length`` in key tokens."""

    device: str
    device_type: str
    dtype: str
    head_dim: int
    length: int
    density: float
    sparse_ms: float
    dense_ms: float
    measured: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """The largest winning density by length, for one device, dtype and head size."""

    device: str
    device_type: str
    dtype: str
    head_dim: int
    points: Points
    measured: str = ""
    """Date of the measurement, empty where it is not known."""
    source: str = field(default="", compare=False)
    """The file that it was read from; not part of the file."""

    def to_json(self) -> dict[str, Any]:
        """The curve as the table's file has it."""
        return {
            "device": self.device,
            "device_type": self.device_type,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "points": [list(point) for point in self.points],
            **({"measured": self.measured} if self.measured else {}),
        }


@dataclass(frozen=True, eq=False)
class Table:
    """Curves, and per device type the ``fallback`` for devices without any."""

    curves: tuple[Curve, ...]
    fallback: Mapping[str, Points]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the content: part of what a compiled graph depends on."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    def replaced_by(self, other: Table) -> Table:
        """This table with the devices of ``other`` in place of its own; CPUs count as one device."""
        taken = {_device_key(curve) for curve in other.curves}
        kept = tuple(curve for curve in self.curves if _device_key(curve) not in taken)
        return Table(other.curves + kept, {**self.fallback, **other.fallback})

    def to_json(self) -> dict[str, Any]:
        """The content of the table's file."""
        return {
            "version": VERSION,
            "margin": MARGIN,
            "curves": [curve.to_json() for curve in self.curves],
            "fallback": {name: [list(point) for point in points] for name, points in sorted(self.fallback.items())},
        }


def interpolate(points: Points, length: int) -> float:
    """Largest winning density at ``length``: linear in its logarithm between points, 0 below, the last value above."""
    if not points or length < points[0][0]:
        return 0.0
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        if length < high:
            return at_low + (at_high - at_low) * math.log(length / low) / math.log(high / low)
    return points[-1][1]


def fit(records: Iterable[Record]) -> tuple[Curve, ...]:
    """Curves from measurements: repeats by their median, and no length may promise more than a longer one kept."""
    dates: dict[tuple[str, str, str, int], str] = defaultdict(str)
    grouped: dict[tuple[str, str, str, int], dict[int, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for one in records:
        key = (one.device, one.device_type, one.dtype, one.head_dim)
        grouped[key][one.length][one.density].append(one.dense_ms / one.sparse_ms)
        dates[key] = max(dates[key], one.measured)
    return tuple(Curve(*key, points=_fit_lengths(grouped[key]), measured=dates[key]) for key in sorted(grouped))


def _fit_lengths(lengths: Mapping[int, Mapping[float, list[float]]]) -> Points:
    limits: list[tuple[int, float]] = []
    for length in sorted(lengths):
        won, all_won = 0.0, True
        for density in sorted(lengths[length]):
            if statistics.median(lengths[length][density]) < MARGIN:
                all_won = False  # a win beyond a loss is noise
                break
            won = density
        if all_won and limits:
            # The grid ended before the crossover did: what a shorter length kept, this one keeps.
            won = max(won, limits[-1][1])
        limits.append((length, won))
    for index in range(len(limits) - 2, -1, -1):
        limits[index] = (limits[index][0], min(limits[index][1], limits[index + 1][1]))
    return tuple(limits)


def parse(data: Any, where: str, source: str = "") -> Table:
    """A table from a file's content; ``where`` begins each error's text. Raises ``OptionError``.

    The file is a table, measured records, or what ``sparsepass tune`` wrote. ``source`` is kept with the curves.
    """
    table = _parse(data, where)
    return Table(tuple(replace(curve, source=source) for curve in table.curves), table.fallback)


def _parse(data: Any, where: str) -> Table:
    try:
        if is_tuning(data):
            # Fitted anew: a change of the margin then holds for old measurements too.
            return Table(fit(parse_records(data, where)), {})
        if "records" in data:
            return Table(fit(parse_records(data, where)), {})
        if data["version"] != VERSION:
            raise ValueError(
                f"version is {shown(data['version'])}, and this sparsepass reads {VERSION}; rebuild the file"
            )
        curves = tuple(
            Curve(
                str(one["device"]),
                str(one["device_type"]),
                plain_dtype(one["dtype"]),
                int(one["head_dim"]),
                _points(one["points"]),
                str(one.get("measured", "")),
            )
            for one in data["curves"]
        )
        return Table(curves, {str(name): _points(points) for name, points in data.get("fallback", {}).items()})
    except KeyError as error:
        raise OptionError(
            f"{where}: the field {error} is missing; build the file with sparsepass.crossover."
        ) from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise OptionError(f"{where}: not a crossover file: {error}.") from error


def parse_records(data: Mapping[str, Any], where: str) -> list[Record]:
    """The ``records`` of a file of measurements, or of all devices of a tuning file. Raises ``OptionError``."""
    try:
        if is_tuning(data):
            entries = devices(data, where)
            return [_record(one, str(entry.get("measured", ""))) for entry in entries for one in entry["records"]]
        date = str(data.get("date", data.get("environment", {}).get("date", "")))
        hardware = data.get("hardware")
        cpu = hardware.get("cpu") if isinstance(hardware, Mapping) else None
        named = [
            {**one, "device": cpu, "device_type": "cpu"} if cpu and one["device"] == "cpu" else one
            for one in data["records"]
        ]
        return [_record(one, date) for one in named]
    except KeyError as error:
        raise OptionError(f"{where}: a record lacks the field {error}.") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise OptionError(f"{where}: {error}.") from error


def _record(data: Mapping[str, Any], measured: str = "") -> Record:
    device = str(data["device"])
    record = Record(
        device=device,
        device_type=str(data.get("device_type") or _guess_type(device)),
        dtype=plain_dtype(data["dtype"]),
        head_dim=int(data["head_dim"]),
        length=int(data["length"]),
        density=float(data["density"]),
        sparse_ms=float(data["sparse_ms"]),
        dense_ms=float(data["dense_ms"]),
        measured=str(data.get("measured", measured)),
    )
    times_fine = all(0 < time < math.inf for time in (record.sparse_ms, record.dense_ms))
    if not times_fine or not 0 < record.density <= 1 or record.length < 1 or record.head_dim < 1:
        raise ValueError(
            f"a record is out of range (times over 0 ms, density in (0, 1], sizes from 1): {shown(dict(data))}"
        )
    return record


def _points(data: Any) -> Points:
    points = tuple((int(length), float(density)) for length, density in data)
    rising = all(first[0] < second[0] for first, second in itertools.pairwise(points))
    if not points or not rising or points[0][0] < 1 or not all(0 <= density <= 1 for _, density in points):
        raise ValueError(
            f"points are {shown(data)}; accepted are [length, density] pairs, lengths rising, densities 0 to 1"
        )
    return points


def plain_dtype(dtype: Any) -> str:
    """``bfloat16`` for ``torch.bfloat16``, for its text and for ``bf16``."""
    name = str(dtype).removeprefix("torch.")
    return _SHORT_DTYPES.get(name, name)


_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _guess_type(device: str) -> str:
    makers = ("nvidia", "geforce", "tesla", "instinct", "radeon", "cuda")
    return "cuda" if any(maker in device.casefold() for maker in makers) else "cpu"


def _device_key(curve: Curve) -> str:
    return "cpu" if curve.device_type == "cpu" else curve.device.casefold()
