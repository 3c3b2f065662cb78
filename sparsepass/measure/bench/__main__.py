"""``python -m sparsepass.measure.bench``: the commands with the standard library's own command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sparsepass.errors import SparsepassError
from sparsepass.measure.bench.arguments import parse
from sparsepass.measure.bench.commands import COMMANDS
from sparsepass.measure.bench.result import Result, legible


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 if a result was wrong, 2 for what cannot be run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] in (["plot"], ["show"]):
            return _read(given[0], given[1:])
        command, options = parse(given, COMMANDS, "python -m sparsepass.measure.bench")
        return command.run(options)
    except SparsepassError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _read(what: str, files: Sequence[str]) -> int:
    from sparsepass.measure.bench.plots import draw
    from sparsepass.measure.bench.tables import show

    if not files or files[0].startswith("-"):
        print(f"usage: python -m sparsepass.measure.bench {what} FILE" + (" [FOLDER]" if what == "plot" else ""))
        return 2
    file = Path(files[0])
    result = Result.load(file)
    with legible(file):
        if what == "show":
            show(result)
            return 0
        for picture in draw(result, Path(files[1]) if len(files) > 1 else file.parent, file.stem):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
