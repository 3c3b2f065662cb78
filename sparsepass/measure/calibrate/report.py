"""A calibration as an HTML page, and as tables in the terminal."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsepass.errors import OptionError
from sparsepass.host.files import check_output, write_whole
from sparsepass.measure.calibrate.cell import Cell, Status
from sparsepass.measure.calibrate.result import Calibration
from sparsepass.measure.calibrate.setting import setting_text
from sparsepass.measure.calibrate.words import how_sure, note, the_number, tokens


def write_html(found: Calibration, name: str, path: Path) -> None:
    """Write the report: one page that needs nothing beside it."""
    check_output(path, OptionError)
    write_whole(path, html(found, name), OptionError)


def html(found: Calibration, name: str) -> str:
    """The report's text."""
    import jinja2  # here alone: only the page needs it

    source = resources.files("sparsepass.measure.calibrate").joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(
        name=name,
        complete=found.complete,
        number=the_number(found),
        sure=how_sure(found),
        lengths=[tokens(length) for length in found.lengths],
        methods=[{"name": method, "rows": _rows(found, method)} for method in _methods(found)],
        policy=[
            {"task_class": str(task), "budgets": [_budget(found, task, length) for length in found.lengths]}
            for task in found.classes
        ],
        trials=[_trial(cell, trial) for cell in found.cells for trial in cell.trials],
        questions=sum(cell.questions for cell in found.cells),
        about={**found.about, "tolerated loss": f"{found.goal.loss:.1%}", "confidence": f"{found.goal.confidence:.0%}"},
    )


def table(found: Calibration) -> RenderableType:
    """What the command prints: the heat map per method, the number, how sure it is."""
    parts: list[RenderableType] = []
    for method in _methods(found):
        grid = Table(title=f"{method}: share computed by the sparsest verified budget", title_justify="left")
        grid.add_column("task")
        for length in found.lengths:
            grid.add_column(tokens(length), justify="right")
        for task in found.tasks:
            cells = [_cell(found, task, length, method) for length in found.lengths]
            grid.add_row(task, *(Text("") if cell is None else _text(cell) for cell in cells))
        parts.append(grid)
    parts += [Text(the_number(found), style="bold"), Text(how_sure(found))]
    if not found.complete:
        parts.append(Text("The time limit came first; run the command again with the same --log to go on.", "yellow"))
    return Group(*parts)


def _text(cell: Cell) -> Text:
    value, below = note(cell)
    return Text(f"{value}\n{below}", style="green" if cell.status is Status.SAFE else "yellow")


def _methods(found: Calibration) -> list[str]:
    return list(dict.fromkeys(cell.method for cell in found.cells))


def _cell(found: Calibration, task: str, length: int, method: str) -> Cell | None:
    places = [cell for cell in found.cells if (cell.task, cell.length, cell.method) == (task, length, method)]
    return places[0] if places else None


def _rows(found: Calibration, method: str) -> list[dict[str, Any]]:
    rows = []
    for task in found.tasks:
        cells = [_cell(found, task, length, method) for length in found.lengths]
        known = [cell for cell in cells if cell is not None]
        if known:
            rows.append({"task": task, "task_class": str(known[0].task_class), "cells": [_colored(c) for c in cells]})
    return rows


def _colored(cell: Cell | None) -> dict[str, str]:
    if cell is None:
        return {"value": "", "note": "", "title": "not asked", "color": "", "ink": ""}
    value, below = note(cell)
    title = f"{cell.status.words}; {cell.questions} questions"
    if cell.budget is None:
        return {"value": value, "note": below, "title": title, "color": "", "ink": ""}
    light = 94 - 58 * min(1.0, cell.density)
    title = f"{setting_text(cell.budget)}: {title}"
    ink = "#102030" if light > 60 else "#ffffff"
    return {"value": value, "note": below, "title": title, "color": f"hsl(210 55% {light:.0f}%)", "ink": ink}


def _budget(found: Calibration, task: Any, length: int) -> str:
    safe = found.safe([task], length)
    return "dense" if safe.budget is None else f"{setting_text(safe.budget)}: {safe.density:.3f}"


def _trial(cell: Cell, trial: Any) -> dict[str, str]:
    return {
        "task": cell.task,
        "length": tokens(cell.length),
        "budget": setting_text(trial.budget),
        "samples": "held out" if trial.held_out else "search",
        "questions": str(trial.questions),
        "accuracy": f"{trial.accuracy:.3f}",
        "loss": f"{trial.loss:+.3f}",
        "bounds": f"{trial.low:+.3f} to {trial.high:+.3f}",
        "density": f"{trial.density:.3f}",
        "verdict": ("verified" if trial.passed else "failed") if trial.held_out else "likely" if trial.passed else "no",
    }
