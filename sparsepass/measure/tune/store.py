"""The tuning file, and what an interrupted run leaves to go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError, quoted_path
from sparsepass.host.files import check_output, read_json, write_whole
from sparsepass.kernels.runtime.tuned import FORMAT, VERSION, devices, is_tuning, parse_tile
from sparsepass.planning.crossover_table import fit, parse_records


def default_out() -> Path:
    """The file that is found at run time: the one ``SPARSEPASS_TUNING`` names, else the default one."""
    from sparsepass.kernels.runtime.tuned import OFF, TUNING_ENV, default_file

    named = os.environ.get(TUNING_ENV, "")
    return Path(named) if named and named.lower() not in OFF else default_file()


class Progress:
    """Outcomes so far by point, kept in a file beside the one to be written; of this device and these versions only."""

    def __init__(self, out: Path, key: Mapping[str, Any], fresh: bool) -> None:
        self.file = out.with_name(out.name + ".partial")
        self.key = dict(key)
        self.done: dict[str, Any] = {}
        if not fresh:
            self._read()

    def _read(self) -> None:
        try:
            held = read_json(self.file, "file of a run", OptionError)
        except OptionError:
            return
        if isinstance(held, dict) and held.get("key") == json.loads(json.dumps(self.key)):
            done = held.get("done", {})
            self.done = done if isinstance(done, dict) and all(isinstance(o, dict) for o in done.values()) else {}

    def add(self, name: str, outcome: Any) -> None:
        self.done[name] = outcome
        write(self.file, json.dumps({"key": self.key, "done": self.done}))

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)


def entry(environment: Mapping[str, Any], settings: Mapping[str, Any], outcomes: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of one device."""
    records = [record for outcome in outcomes.values() for record in outcome.get("records", ())]
    tiles = [outcome["tile"] for outcome in outcomes.values() if "tile" in outcome]
    tried = [one for outcome in outcomes.values() for one in outcome.get("tried", ())]
    return {
        "device": environment["device"],
        "device_type": environment["device_type"],
        "measured": environment["date"],
        "environment": dict(environment),
        "settings": dict(settings),
        "curves": _curves(records, environment["date"]),
        "tiles": [tile for tile in tiles if not tile["built_in"]],
        "tiles_measured": [{"dtype": tile["dtype"], "head_dim": tile["head_dim"]} for tile in tiles],
        "tiles_tried": tried,
        "records": records,
    }


def held_devices(out: Path) -> list[Any]:
    """The devices of a tuning file that is to be written anew. Raises ``OptionError``."""
    try:
        data = read_json(out, "tuning file", OptionError)
    except OptionError as error:
        raise OptionError(f"{error} Remove it, or give --out.") from error
    if not is_tuning(data) or data.get("version") != VERSION:
        raise OptionError(
            f"{quoted_path(out)} is there and is no tuning file of this version; remove it, or give --out."
        )
    where = f"{quoted_path(out)} is there; remove it, or give --out"
    parse_records(data, where)
    for device in (found := list(devices(data, where))):
        if not all(_is_entry(one) for part in ("records", "tiles") for one in _listed(device.get(part))):
            raise OptionError(f"{where}: an entry is not as sparsepass tune writes it.")
        if not isinstance(device.get("measured", ""), str) or not isinstance(device.get("tiles_tried", []), list):
            raise OptionError(f"{where}: an entry is not as sparsepass tune writes it.")
    return found


def _listed(part: Any) -> list[Any]:
    """A part of a device's entry; what is no list is one entry that is none."""
    return [] if part is None else part if isinstance(part, list) else [part]


def _is_entry(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("dtype"), str) and isinstance(one.get("head_dim"), int)


def merged(out: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """The file's content with this device in place of its former measurement. Raises ``OptionError``.

    What was not measured now (other dtypes or head sizes, the tiles or the crossover) is kept from before.
    """
    kept: list[Any] = []
    if out.is_file():
        kept = held_devices(out)
    content = dict(new)
    for former in kept:
        if former.get("device") == new["device"]:
            for part in ("records", "tiles"):
                content[part] = _left(former, new, part) + new[part]
            tried = (
                [*former.get("tiles_tried", []), *new["tiles_tried"]] if not new["tiles_tried"] else new["tiles_tried"]
            )
            content |= {"curves": _curves(content["records"], new["measured"]), "tiles_tried": tried}
    others = [one for one in kept if one.get("device") != new["device"]]
    return {"format": FORMAT, "version": VERSION, "devices": [*others, content]}


def _left(former: Mapping[str, Any], new: Mapping[str, Any], part: str) -> list[Any]:
    """Of a part of a device's former entry, what the new one says nothing of; each with the date it was measured."""
    measured = {(one["dtype"], one["head_dim"]) for one in new["records" if part == "records" else "tiles_measured"]}
    date = former.get("measured", "")
    held = former.get(part, [])
    return [{"measured": date, **one} for one in held if (one["dtype"], one["head_dim"]) not in measured]


def _curves(records: list[Any], measured: str) -> list[Any]:
    dated = [{"measured": measured, **one} for one in records]
    return [curve.to_json() for curve in fit(parse_records({"records": dated}, "tune"))]


def validate(content: Mapping[str, Any]) -> None:
    """Checks a tuning file's content against ``tuning.schema.json`` (if jsonschema is installed) and by reading it.

    Raises ``OptionError``.
    """
    parse_records(content, "the tuning file")
    for device in content["devices"]:
        for tile in device["tiles"]:
            parse_tile(tile["tile"])
    try:
        import jsonschema
    except ImportError:
        return
    schema = json.loads(
        resources.files("sparsepass.measure.tune").joinpath("tuning.schema.json").read_text(encoding="utf-8")
    )
    error = next(iter(jsonschema.Draft202012Validator(schema).iter_errors(content)), None)
    if error is not None:
        raise OptionError(f"The tuning file: at {error.json_path}: {error.message}.")


def to_text(content: Mapping[str, Any]) -> str:
    """JSON with one record, curve or tile to a line."""
    blocks = []
    for device in content["devices"]:
        fields = []
        for name, value in device.items():
            if isinstance(value, list) and value:
                lines = ",\n".join("    " + json.dumps(one) for one in value)
                fields.append(f"   {json.dumps(name)}: [\n{lines}\n   ]")
            else:
                fields.append(f"   {json.dumps(name)}: {json.dumps(value)}")
        blocks.append("  {\n" + ",\n".join(fields) + "\n  }")
    head = f' "format": {json.dumps(content["format"])},\n "version": {content["version"]},\n "devices": [\n'
    return "{\n" + head + ",\n".join(blocks) + "\n ]\n}\n"


def write(file: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises ``OptionError``."""
    check_output(file, OptionError)
    write_whole(file, text, OptionError)
