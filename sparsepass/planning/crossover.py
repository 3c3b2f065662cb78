"""Where sparse is faster than dense: a measured function of length, density, head size, dtype and device.

The table (``planning/crossover.json``) holds, per device, dtype and head size, the largest density at which the sparse
path, selection included, beat the dense kernel by 5%, at each measured length. Where nothing was measured the answer is
cautious. A tuning file (``sparsepass tune``) replaces the devices that it has. Rebuild the shipped table by

    python -m sparsepass.planning.crossover build docs/measurements/crossover_*.json \
        -o sparsepass/planning/crossover.json
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

import torch

from sparsepass.errors import OptionError
from sparsepass.host.environment import cpu_name
from sparsepass.host.files import read_json, write_whole
from sparsepass.kernels.runtime.tuned import TUNING_ENV, named_by_user, tuning_file, tuning_json, warn_once
from sparsepass.planning.crossover_table import (
    Curve,
    Points,
    Record,
    Table,
    fit,
    interpolate,
    parse,
    parse_records,
    plain_dtype,
)

FORMER_ENV = "SPARSEPASS_CROSSOVER"
"""The variable's name before it covered kernel configurations too. To set it is an error: it would go unheard."""

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

    ``device_name`` as ``torch.cuda.get_device_name`` gives it (``cpu`` for this machine's), ``dtype`` as
    ``str(torch.dtype)`` with or without ``torch.``, ``length`` in key tokens, ``density`` the mean over the heads.
    Raises ``OptionError`` if the file that ``SPARSEPASS_TUNING`` names cannot be read.
    """
    if device_type == "cpu" and device_name == "cpu":
        device_name = cpu_name()
    return _verdict(current_table(), device_name, device_type, plain_dtype(dtype), head_dim, length, density)


MASKED_FROM = 4096
"""Tokens from which exact attention by the block-sparse kernel beat SDPA given a mask tensor, on the H200 in bf16:
2.2 times under padding and 3.1 under a window, 5.4 and 8.7 times at 16384 (``docs/measurements/masked_dense.py``)."""


def full_wins(*, device_name: str, device_type: str, dtype: str, head_dim: int, length: int, flagged: bool) -> bool:
    """Whether exact attention is faster by the block-sparse kernel, over every visible block, than by SDPA.

    ``flagged``: SDPA can be told of the mask by a flag. Where it needs a mask tensor the fast dense kernels are out of
    reach. Arguments otherwise and errors as for ``sparse_wins``; False where nothing was measured.
    """
    if sparse_wins(
        device_name=device_name, device_type=device_type, dtype=dtype, head_dim=head_dim, length=length, density=1.0
    ):
        return True
    half = plain_dtype(dtype) in SAME_RATE
    measured = any(curve.device == device_name for curve in current_table().curves)
    return not flagged and device_type == "cuda" and half and measured and length >= MASKED_FROM


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
    mine = _of_device(table, device_name, device_type)
    named = device_name
    if not mine and device_type == "cpu":
        # Both paths are matrix products in the same library there, so the ratio carries over; the name may not.
        mine, named = [curve for curve in table.curves if curve.device_type == device_type], "another CPU"
    if not mine:
        return fallback, f"the cautious default, {device_name} was not measured"
    basis = _basis(mine, named)
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


def provenance(device: torch.device) -> str:
    """Which table decides for a device, and when it was measured: a sentence for reports. Raises ``OptionError``."""
    device_type = device.type
    device_name = torch.cuda.get_device_name(device) if device_type == "cuda" else cpu_name()
    table = current_table()
    mine = _of_device(table, device_name, device_type)
    if mine:
        return f"Where sparse pays: {_basis(mine, device_name)}."
    if device_type == "cpu" and (others := [curve for curve in table.curves if curve.device_type == "cpu"]):
        return f"Where sparse pays: {_basis(others, 'another CPU')}. Measure this one by sparsepass tune."
    return f"Where sparse pays: the cautious default, {device_name} was not measured. Measure it by sparsepass tune."


def _of_device(table: Table, device_name: str, device_type: str) -> list[Curve]:
    same_type = [curve for curve in table.curves if curve.device_type == device_type]
    return [curve for curve in same_type if curve.device.casefold() == device_name.casefold()]


def _basis(curves: Sequence[Curve], device_name: str) -> str:
    date, source = max(curve.measured for curve in curves), curves[0].source
    return f"measured on {device_name}" + "".join(f", {part}" for part in (date, source) if part)


def current_table() -> Table:
    """The shipped table, with the devices of the tuning file in force, if there is one, in place of its own.

    Raises ``OptionError`` if ``SPARSEPASS_TUNING`` names a file that cannot be used. A default file that cannot be used
    is left alone, with a warning.
    """
    if os.environ.get(FORMER_ENV):
        raise OptionError(f"{FORMER_ENV} is now called {TUNING_ENV}; it takes the same files. Rename it.")
    file = tuning_file()
    if file is None:
        return _shipped()
    try:
        return _with_own(_Content(tuning_json(file)), str(file))
    except OptionError as error:
        if named_by_user():
            raise
        warn_once(f"the tuning file is not used: {error}")
        return _shipped()


@functools.cache
def _shipped() -> Table:
    text = resources.files("sparsepass.planning").joinpath("crossover.json").read_text(encoding="utf-8")
    return parse(json.loads(text), "crossover.json", "shipped table")


class _Content:
    """Content of a file, compared by identity: ``tuning_json`` gives the same object until the file changes."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __hash__(self) -> int:
        return id(self.data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and other.data is self.data


@functools.lru_cache(maxsize=16)
def _with_own(content: _Content, where: str) -> Table:
    return _shipped().replaced_by(parse(content.data, where, where))


def _json(path: Path) -> Any:
    return read_json(path, "crossover file", OptionError)


def main(argv: Sequence[str] | None = None) -> int:
    """``build FILE... -o TABLE``: fit the records of all files together. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsepass.planning.crossover", description="Where sparse beats dense."
    )
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
    try:
        write_whole(options.output, to_text({**table.to_json(), "sources": sources}), OptionError)
    except OptionError as error:
        print(error, file=sys.stderr)
        return 1
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
