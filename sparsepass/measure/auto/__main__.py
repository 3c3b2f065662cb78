"""``python -m sparsepass.measure.auto``: the commands with the standard library's own command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparsepass.errors import SparsepassError
from sparsepass.measure.auto.command import COMMANDS
from sparsepass.measure.bench.arguments import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, or 2 for what cannot be run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command, options = parse(given, COMMANDS, "python -m sparsepass.measure.auto")
        return command.run(options)
    except SparsepassError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
