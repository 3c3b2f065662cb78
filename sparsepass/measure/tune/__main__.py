"""``python -m sparsepass.measure.tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sparsepass.errors import SparsepassError
from sparsepass.measure.bench.arguments import add_options
from sparsepass.measure.bench.options import make, spread
from sparsepass.measure.tune.grid import TuneOptions
from sparsepass.measure.tune.run import COMMAND


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if points are left to measure, 2 for what cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsepass.measure.tune", description=COMMAND.help, epilog=COMMAND.example
    )
    add_options(parser, TuneOptions)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return COMMAND.run(make(TuneOptions, vars(parser.parse_args(spread(given, TuneOptions)))))
    except SparsepassError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
