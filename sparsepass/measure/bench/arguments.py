"""A command line by ``argparse``, for machines without typer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepass.measure.bench.options import make, specs, spread


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its options, and what to do with them. ``file``: what its one positional argument is, if any."""

    name: str
    options: type[Any]
    run: Callable[[Any], int]
    help: str
    example: str = ""


def parse(arguments: Sequence[str], commands: Sequence[Command], program: str) -> tuple[Command, Any]:
    """The command asked for and its options. Exits as argparse does; raises ``OptionError`` for a choice."""
    parser = argparse.ArgumentParser(prog=program)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands:
        add_options(
            subparsers.add_parser(command.name, help=command.help, description=command.help, epilog=command.example),
            command.options,
        )
    chosen = next((command for command in commands if arguments and arguments[0] == command.name), None)
    given = vars(parser.parse_args(spread(arguments, chosen.options) if chosen else list(arguments)))
    command = next(command for command in commands if command.name == given["command"])
    return command, make(command.options, given)


def add_options(parser: argparse.ArgumentParser, options: type[Any]) -> None:
    """Adds the fields of a dataclass of options."""
    groups: dict[str, Any] = {}
    for spec in specs(options):
        group = groups.setdefault(spec.panel, parser.add_argument_group(spec.panel))
        shown = spec.help if spec.default in ((), None, "", False, 0) else f"{spec.help} Default: {_text(spec.default)}"
        settings: dict[str, Any] = {"dest": spec.name, "help": shown.replace("%", "%%"), "default": None}
        flag = "--json" if spec.name == "as_json" else spec.flag
        if spec.kind is bool:
            group.add_argument(flag, action="store_true", **settings)
            continue
        settings |= {"type": spec.kind, "metavar": spec.kind.__name__.upper() + " ..." * spec.many}
        if spec.kind is Path:
            settings["metavar"] = "FILE"
        if spec.choices:
            settings["metavar"] = "{" + ",".join(filter(None, spec.choices)) + "}"
        if spec.many:
            settings["action"] = "append"
        group.add_argument(flag, **settings)


def _text(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
