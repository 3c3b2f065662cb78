"""Where sparse is faster than dense: a measured function of length, density, head size, dtype and device.

The table (``crossover.json``) holds, per device, dtype and head size, the largest density at which the sparse path,
selection included, beat the dense kernel by 5%, at each measured length. Where nothing was measured the answer
is cautious. Rebuild it from measurements:

    python -m sparsepass.crossover build docs/measurements/crossover_*.json -o sparsepass/crossover.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparsepass.crossover_table import (
    Points,
    Record,
    Table,
    fit,
    interpolate,
    parse,
    parse_records,
    plain_dtype,
)
from sparsepass.errors import OptionError

CROSSOVER_ENV = "SPARSEPASS_CROSSOVER"
"""Environment variable: a table or a file of records whose devices replace those of the shipped table."""

SAME_RATE = {"float16": "bfloat16", "bfloat16": "float16"}
"""On CUDA both run at one rate, so either stands in for the other."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether sparse is expected to be faster, with a sentence saying why. Truthy when it is."""

    wins: bool
    reason: str
    max_density: float
    """The largest density at which it would be."""

    def __bool__(self) -> bool:
        return self.wins


def sparse_wins(
    *, device_name: str, device_type: str, dtype: str, head_dim: int, length: int, density: float
) -> Verdict:
    """Whether the sparse path beats the dense kernel.

    ``device_name`` as ``torch.cuda.get_device_name`` gives it (any text for a CPU), ``dtype`` as ``str(torch.dtype)``
    with or without ``torch.``, ``length`` in key tokens, ``density`` the mean over the heads. Raises ``OptionError`` if
    the file that ``SPARSEPASS_CROSSOVER`` names cannot be read.
    """
    return _verdict(current_table(), device_name, device_type, plain_dtype(dtype), head_dim, length, density)


@functools.lru_cache(maxsize=4096)
def _verdict(
    table: Table, device_name: str, device_type: str, dtype: str, head_dim: int, length: int, density: float
) -> Verdict:
    curves, basis = _candidates(table, device_name, device_type, dtype, head_dim)
    if not curves:
        return Verdict(False, f"Dense: no sparse kernel is known to be faster on a {device_type} device.", 0.0)
    limit = min(interpolate(points, length) for points in curves)
    where = f"at {length} keys, {dtype}, head size {head_dim} ({basis})"
    if limit <= 0:
        return Verdict(False, f"Dense: sparse is faster at no density {where}.", 0.0)
    if density <= limit * (1 + 1e-9):
        return Verdict(True, f"Sparse: density {density:.3g} is within {limit:.3g}, the most that pays {where}.", limit)
    return Verdict(False, f"Dense: density {density:.3g} is over {limit:.3g}, the most that pays {where}.", limit)


def _candidates(
    table: Table, device_name: str, device_type: str, dtype: str, head_dim: int
) -> tuple[list[Points], str]:
    """The curves that may apply, of which the most cautious counts, and a phrase saying what they rest on."""
    fallback = [table.fallback[device_type]] if device_type in table.fallback else []
    same_type = [curve for curve in table.curves if curve.device_type == device_type]
    mine = [curve for curve in same_type if curve.device.casefold() == device_name.casefold()]
    basis = f"measured on {device_name}"
    if not mine and device_type == "cpu" and same_type:
        # Both paths are matrix products in the same library there, so the ratio carries over; the name may not.
        mine, basis = same_type, "measured on another CPU"
    if not mine:
        return fallback, f"the cautious default, {device_name} was not measured"
    dtypes = {curve.dtype for curve in mine}
    if dtype not in dtypes and device_type == "cuda":
        dtype = SAME_RATE.get(dtype, dtype)
    if dtype in dtypes:
        mine = [curve for curve in mine if curve.dtype == dtype]
    else:
        basis += " in other dtypes"
    larger = [curve.head_dim for curve in mine if curve.head_dim >= head_dim]
    if larger:
        mine = [curve for curve in mine if curve.head_dim == min(larger)]
    else:
        basis += " at smaller head sizes"
    known = [curve.points for curve in mine]
    return (known if larger and dtype in dtypes else known + fallback), basis


def current_table() -> Table:
    """The shipped table, with the devices of the file that ``SPARSEPASS_CROSSOVER`` names in place of its own."""
    override = os.environ.get(CROSSOVER_ENV)
    if not override:
        return _shipped()
    try:
        stat = os.stat(override)
    except OSError as error:
        raise OptionError(
            f"{CROSSOVER_ENV} names {override!r}, which cannot be read ({error.strerror}); name a crossover file or "
            "unset it."
        ) from error
    return _overridden(os.path.abspath(override), stat.st_mtime_ns, stat.st_size)


@functools.cache
def _shipped() -> Table:
    text = resources.files("sparsepass").joinpath("crossover.json").read_text(encoding="utf-8")
    return parse(json.loads(text), "crossover.json")


@functools.lru_cache(maxsize=16)
def _overridden(path: str, modified_ns: int, size: int) -> Table:
    return _shipped().replaced_by(read(Path(path)))


def read(path: Path) -> Table:
    """A table from a file: of the table's own form, or of measured records. Raises ``OptionError``."""
    return parse(_json(path), str(path))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"The crossover file {str(path)!r} cannot be read as JSON: {error}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """``build FILE... -o TABLE``: fit the records of all files together. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsepass.crossover", description="Where sparse beats dense.")
    build = parser.add_subparsers(required=True).add_parser("build", help="fit measured records into a table")
    build.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON with a header and records")
    build.add_argument("-o", "--output", required=True, type=Path, metavar="TABLE", help="the table to write")
    options = parser.parse_args(argv)
    records: list[Record] = []
    sources = []
    try:
        for path in options.files:
            data = _json(path)
            records += parse_records(data, str(path))
            sources.append({"file": path.name, **{key: data[key] for key in data if key != "records"}})
    except OptionError as error:
        print(error, file=sys.stderr)
        return 1
    table = Table(fit(records), _shipped().fallback)
    options.output.write_text(to_text({**table.to_json(), "sources": sources}), encoding="utf-8")
    for curve in table.curves:
        steps = ", ".join(f"{length}: {density:.3g}" for length, density in curve.points)
        print(f"{curve.device}, {curve.dtype}, head size {curve.head_dim}: {steps}")
    return 0


def to_text(content: Mapping[str, Any]) -> str:
    """JSON with one curve to a line, so that a rebuilt table reads well as a diff."""
    lines = []
    for key, value in content.items():
        items = [json.dumps(item) for item in value] if isinstance(value, list) else None
        text = "[\n  " + ",\n  ".join(items) + "\n ]" if items else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
