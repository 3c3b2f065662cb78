"""The file of a sweep: written after every architecture, gone on with by the next run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError

FORMAT, VERSION = "sparsepass.coverage", 1
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
        """Writes the file whole or not at all. Raises ``OptionError``."""
        lines = ",\n".join("  " + json.dumps(record) for record in self.records.values())
        head = {"format": FORMAT, "version": VERSION, "versions": self.versions, "settings": self.settings}
        text = json.dumps(head)[:-1] + ', "records": [\n' + lines + "\n]}\n"
        part = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            os.replace(part, file)
        except OSError as error:
            raise OptionError(f"{str(file)!r} cannot be written: {error.strerror}.") from error

    @classmethod
    def load(cls, file: Path) -> Sweep:
        """Reads what ``save`` wrote. Raises ``OptionError``."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"{str(file)!r} cannot be read as JSON: {error}.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise OptionError(f"{str(file)!r} is no result of sparsepass coverage (version {VERSION}).")
        held = cls(data["versions"], data["settings"])
        for record in data["records"]:
            held.add(record)
        return held
