"""The file of a sweep: written all along, gone on with by the next run, merged with those of other machines."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError, quoted_path, shown_path
from sparsepass.host.files import LARGEST, check_output, decode, parse_json, read_bytes, write_whole

FORMAT, VERSION = "sparsepass.coverage", 1
_GZIP = b"\x1f\x8b"
Record = dict[str, Any]
Key = tuple[str, str, str, str]


def key_of(record: Record) -> Key:
    """What a record is of: kind, architecture, implementation, phase."""
    return record["kind"], record["arch"], record["implementation"], record["phase"]


@dataclass
class Sweep:
    """Records of a sweep with what they were made by. ``versions`` must agree for a file to be gone on with."""

    versions: dict[str, str]
    settings: dict[str, Any]
    records: dict[Key, Record] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        self.records[key_of(record)] = record

    def save(self, file: Path) -> None:
        """Writes the file whole or not at all; packed, if its name ends in .gz. Raises ``OptionError``."""
        lines = ",\n".join("  " + json.dumps(record) for record in self.records.values())
        head = {"format": FORMAT, "version": VERSION, "versions": self.versions, "settings": self.settings}
        text = json.dumps(head)[:-1] + ', "records": [\n' + lines + "\n]}\n"
        check_output(file, OptionError)
        write_whole(file, gzip.compress(text.encode(), mtime=0) if file.suffix == ".gz" else text, OptionError)

    @classmethod
    def load(cls, file: Path) -> Sweep:
        """Reads what ``save`` wrote. Raises ``OptionError``."""
        held = read_bytes(file, "result", OptionError)
        if held.startswith(_GZIP):
            held = _unpacked(held, file)
        data = parse_json(decode(held, file, "result", OptionError), shown_path(file), OptionError, finite=False)
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise OptionError(f"{quoted_path(file)} is no result of sparsepass coverage (version {VERSION}).")
        try:
            sweep = cls({name: str(one) for name, one in data["versions"].items()}, dict(data["settings"]))
            for record in data["records"]:
                sweep.add(record)
        except KeyError as error:
            raise OptionError(f"{quoted_path(file)}: the field {error} is missing; measure again.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise OptionError(f"{quoted_path(file)} is no result of sparsepass coverage: {error}.") from error
        return sweep


def _unpacked(held: bytes, file: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(held)) as stream:
            found = stream.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise OptionError(f"{quoted_path(file)} cannot be unpacked: {error}.") from error
    if len(found) > LARGEST:
        raise OptionError(f"{quoted_path(file)} has over {LARGEST} bytes when unpacked; no result is so large.")
    return found


def merged(sweeps: Sequence[Sweep]) -> Sweep:
    """One sweep of several, made on different machines of the same transformers and length.

    Of two records of the same model and phase the later counts, but one that was measured counts more than an error.
    Versions that differ are all listed. Raises ``OptionError``.
    """
    first = sweeps[0]
    together = Sweep(dict(first.versions), dict(first.settings))
    for sweep in sweeps:
        for what, mine, other in (
            ("lengths", together.settings, sweep.settings),
            ("versions of transformers", first.versions.get("transformers"), sweep.versions.get("transformers")),
        ):
            if mine != other:
                raise OptionError(f"The files are of different {what}, {mine} and {other}: they cannot be merged.")
        for name, version in sweep.versions.items():
            known = together.versions.get(name, version).split(" and ")
            together.versions[name] = " and ".join(dict.fromkeys([*known, version]))
        for key, record in sweep.records.items():
            if "error" not in record or "error" in together.records.get(key, record):
                together.add(record)
    return together
