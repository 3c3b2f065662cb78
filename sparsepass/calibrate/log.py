"""What was measured, one JSON line per context: a calibration that was interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsepass.calibrate.cell import Outcome
from sparsepass.errors import OptionError

FORMAT = "sparsepass.calibration"
FORMAT_VERSION = 1

Key = tuple[str, int, int, str]
"""Task, length, seed, and the budget's text (``dense``)."""


class Log:
    """The outcomes of a calibration, kept in a file if one is given. ``conditions``: what they hold for, as JSON.
    ``others``: logs under the same conditions that are read besides, such as those of other machines.

    Raises ``OptionError`` for a file that is no such log, or of other conditions.
    """

    def __init__(self, path: Path | None, conditions: dict[str, Any], others: Sequence[Path] = ()) -> None:
        self._outcomes: dict[Key, Outcome] = {}
        self._file = None
        self.found = 0
        """Outcomes that the files had."""
        head = {"format": FORMAT, "version": FORMAT_VERSION, "conditions": json.loads(json.dumps(conditions))}
        for other in others:
            self._read(other, head)
        if path is None:
            return
        whole = 0
        if path.exists() and path.stat().st_size:
            whole = self._read(path, head)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+" if whole else "w", encoding="utf-8")
        if whole:
            self._file.seek(whole)
            self._file.truncate()  # a line that was cut off when the run ended
        else:
            self._write(head)

    def _read(self, path: Path, head: dict[str, Any]) -> int:
        """Takes the outcomes; returns the bytes of whole lines."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].decode("utf-8").splitlines()
        try:
            first, *records = [json.loads(line) for line in lines]
        except ValueError as error:
            raise OptionError(f"{path} is no log of a calibration: {error}. Give another file.") from error
        if not isinstance(first, dict) or first.get("format") != FORMAT or first.get("version") != FORMAT_VERSION:
            raise OptionError(f"{path} is no log of a calibration, version {FORMAT_VERSION}. Give another file.")
        if first["conditions"] != head["conditions"]:
            theirs, mine = first["conditions"], head["conditions"]
            other = sorted(key for key in {*theirs, *mine} if theirs.get(key) != mine.get(key))
            raise OptionError(
                f"{path} was measured under other conditions: {', '.join(other)} differ. Give another file, or --again "
                "to measure anew."
            )
        for record in records:
            key = (record["task"], record["length"], record["seed"], record["budget"])
            self._outcomes[key] = Outcome(tuple(record["scores"]), record["density"])
        self.found += len(records)
        return whole

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
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def __len__(self) -> int:
        return len(self._outcomes)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
