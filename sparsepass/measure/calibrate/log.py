"""What was measured, one JSON line per context: a calibration that was interrupted goes on where it was."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsepass.errors import SHOWN, OptionError, quoted_path, shown, shown_path
from sparsepass.host.files import check_output, decode, json_lines, parse_json, read_bytes, unwritable
from sparsepass.measure.calibrate.cell import Outcome

FORMAT = "sparsepass.calibration"
FORMAT_VERSION = 1

_HEAD = json.dumps({"format": FORMAT}).encode()

Key = tuple[str, int, int, str]
"""Task, length, seed, and the budget's text (``dense``)."""


class Log:
    """The outcomes of a calibration, kept in a file if one is given. ``conditions``: what they hold for, as JSON.
    ``others``: logs under the same conditions that are read besides, such as those of other machines. ``again``: what
    the file has is not read but left out.

    Raises ``OptionError`` for a file that is no such log, or of other conditions.
    """

    def __init__(
        self, path: Path | None, conditions: dict[str, Any], others: Sequence[Path] = (), again: bool = False
    ) -> None:
        self._outcomes: dict[Key, Outcome] = {}
        self._file: io.FileIO | None = None
        self._end = 0
        """Bytes of whole lines in the file."""
        self.found = 0
        """Outcomes that the files had."""
        head = {"format": FORMAT, "version": FORMAT_VERSION, "conditions": json.loads(json.dumps(conditions))}
        for other in others:
            self._read(other, head)
        if path is None:
            return
        check_output(path, OptionError)
        self._path = path
        if path.exists() and path.stat().st_size:
            if again:
                self._check_ours(path)
            else:
                self._end = self._read(path, head)
        try:
            self._file = path.open("r+b" if self._end else "wb", buffering=0)
            self._file.truncate(self._end)  # a line that was cut off when the run ended
            self._file.seek(self._end)
        except OSError as error:
            raise unwritable(path, error, OptionError) from error
        if not self._end:
            self._write(head)

    def _read(self, path: Path, head: dict[str, Any]) -> int:
        """Takes the outcomes; returns the bytes of whole lines."""
        content = read_bytes(path, "log", OptionError)
        whole = content.rfind(b"\n") + 1
        where = shown_path(path)
        if not whole:
            self._check_ours(path)
        lines = [
            (n, parse_json(line, f"{where}, line {n}", OptionError))
            for n, line in json_lines(decode(content[:whole], path, "log", OptionError))
        ]
        if whole and not (lines and _is_head(lines[0][1])):
            raise OptionError(f"{where} is no log of a calibration, version {FORMAT_VERSION}. Give another file.")
        if whole < len(content):
            warnings.warn(f"{where}: the last line was cut off, and is left out.", RuntimeWarning, stacklevel=2)
        if not lines:
            return 0
        theirs, mine = lines[0][1]["conditions"], head["conditions"]
        if theirs != mine:
            other = sorted(key for key in {*theirs, *mine} if theirs.get(key) != mine.get(key))
            raise OptionError(
                f"{where} was measured under other conditions: {', '.join(other)[:SHOWN]} differ. Give another file, "
                "or --again to measure anew."
            )
        for number, record in lines[1:]:
            self._take(record, f"{where}, line {number}")
        self.found += len(lines) - 1
        return whole

    @staticmethod
    def _check_ours(path: Path) -> None:
        """Refuses to write over what no calibration wrote."""
        content = read_bytes(path, "log", OptionError)
        if not content.startswith(_HEAD[:-1]) and not _HEAD.startswith(content):
            raise OptionError(
                f"{quoted_path(path)} is no log of a calibration, and is left as it is. Give another file."
            )

    def _take(self, record: Any, where: str) -> None:
        kinds = {"task": str, "length": int, "seed": int, "budget": str, "scores": list, "density": int | float}
        for name, kind in kinds.items():
            given = record.get(name) if isinstance(record, dict) else record
            if isinstance(given, bool) or not isinstance(given, kind):
                raise OptionError(f"{where}: {name!r} is {shown(given)}; remove the line, or give another file.")
        scores = record["scores"]
        if not all(isinstance(one, int | float) and 0 <= one <= 1 for one in [*scores, record["density"]]):
            raise OptionError(f"{where}: 'scores' and 'density' are from 0 to 1; remove the line.")
        key = (record["task"], record["length"], record["seed"], record["budget"])
        self._outcomes[key] = Outcome(tuple(scores), record["density"])

    def get(self, key: Key) -> Outcome | None:
        return self._outcomes.get(key)

    def put(self, key: Key, outcome: Outcome) -> None:
        self._outcomes[key] = outcome
        task, length, seed, budget = key
        scores = [round(score, 6) for score in outcome.scores]
        self._write(
            {
                "task": task,
                "length": length,
                "seed": seed,
                "budget": budget,
                "scores": scores,
                "density": round(outcome.density, 6),
            }
        )

    def _write(self, record: dict[str, Any]) -> None:
        """Appends one whole line, or none."""
        if self._file is None:
            return
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise unwritable(self._path, error, OptionError) from error
        self._end += len(line)

    def __len__(self) -> int:
        return len(self._outcomes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _is_head(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("conditions"), dict):
        return False
    return line.get("format") == FORMAT and line.get("version") == FORMAT_VERSION
