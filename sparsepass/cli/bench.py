"""``sparsepass bench`` and ``sparsepass tune``: their options are those of ``python -m``, as typer commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sparsepass.errors import OptionError
from sparsepass.measure.auto.command import COMMANDS as AUTO
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.commands import COMMANDS
from sparsepass.measure.bench.options import make, specs, spread
from sparsepass.measure.calibrate.command import COMMAND as CALIBRATE
from sparsepass.measure.calibrate.evaluate_command import COMMAND as EVALUATE
from sparsepass.measure.coverage.run import COMMAND as COVERAGE
from sparsepass.measure.tune.run import COMMAND as TUNE

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Measure kernels, selection, whole ops and models against the other implementations on this device.",
)


auto_app = typer.Typer(no_args_is_help=True, help="Budgets that read the request: collect signals, fit, compare.")


def add_commands(app: typer.Typer) -> None:
    """Adds ``bench``, ``tune``, ``coverage``, ``calibrate``, ``evaluate`` and ``auto`` to the command line."""
    app.add_typer(bench_app, name="bench")
    app.add_typer(auto_app, name="auto")
    add_command(app, TUNE)
    add_command(app, COVERAGE)
    add_command(app, CALIBRATE)
    add_command(app, EVALUATE)


def add_command(app: typer.Typer, command: Command) -> None:
    """Registers a command whose options are the fields of its dataclass."""

    class Spreading(TyperCommand):
        """Takes several values behind one option: ``--lengths 8K 32K``."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, spread(args, command.options))

    registered = app.command(command.name, cls=Spreading, help=command.help, epilog=command.example)
    registered(_function(command.options, command.run))


def _function(options: type[Any], run: Callable[[Any], int]) -> Callable[..., None]:
    """What typer reads the options from: a function whose signature is the dataclass."""

    def call(**given: Any) -> None:
        code = run(make(options, given))
        if code:
            raise typer.Exit(code)

    parameters = []
    for spec in specs(options):
        kind: Any = spec.kind if spec.kind is bool else list[spec.kind] if spec.many else spec.kind | None  # type: ignore[name-defined]
        flag = "--json" if spec.name == "as_json" else spec.flag
        shown: Any = spec.default not in ((), None, "", False, 0)
        text = " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else str(spec.default)
        settings = typer.Option(
            flag,
            help=spec.help,
            rich_help_panel=spec.panel,
            show_default=text if shown else False,
            metavar="|".join(filter(None, spec.choices)) or None,
        )
        default: Any = False if spec.kind is bool else list(spec.default) if spec.many else spec.default
        annotation = Annotated[kind, settings]
        parameters.append(
            inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


for _command in COMMANDS:
    add_command(bench_app, _command)
for _command in AUTO:
    add_command(auto_app, _command)

_RESULT = typer.Argument(help="JSON file that a bench command wrote with --out.")


@bench_app.command()
def plot(
    file: Annotated[Path, _RESULT],
    folder: Annotated[Path | None, typer.Argument(help="Where to write; default: beside the file.")] = None,
) -> None:
    """Draw the plots of a result: speedup, rate, time against density, share of selection, error against time."""
    from sparsepass.measure.bench.plots import draw
    from sparsepass.measure.bench.result import Result, legible

    result = Result.load(file)
    with legible(file):
        written = draw(result, folder or file.parent, file.stem)
    if not written:
        raise OptionError(f"{file} holds nothing to draw: no variant was timed.")
    for picture in written:
        typer.echo(picture)


@bench_app.command()
def show(file: Annotated[Path, _RESULT]) -> None:
    """Print the tables of a result again."""
    from sparsepass.measure.bench.result import Result, legible
    from sparsepass.measure.bench.tables import show as print_tables

    result = Result.load(file)
    with legible(file):
        print_tables(result)
