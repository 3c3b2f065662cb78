"""Tables, JSON and plots of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from sparsepass.host.files import check_output, read_text, write_figure, write_whole
from sparsepass.measure.auto.compare import HELD_OUT, Comparison, Found
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.judge import Verdict
from sparsepass.measure.calibrate.bounds import upper_bound

COLORS = {"requests": "#1f77b4", "template": "#2ca02c", "task": "#d62728"}


def tables(found: Comparison) -> Group:
    """A table for each way of holding out, and one of the router by task."""
    parts: list[Any] = [
        f"Tried first: {found.cheap}. The calibrated policy, told the class, costs {found.reference:.3f} of dense; "
        f"savings are shares of its {1 - found.reference:.3f}."
    ]
    for held_out in HELD_OUT:
        rows = [one for one in found.found if one.held_out == held_out]
        if not rows:
            continue
        table = Table(title=f"Held out: {_HELD[held_out]}", title_justify="left")
        table.add_column("decides by", no_wrap=True)
        for name in ("AUC", "saving at best threshold", "saving as fitted", "cost", "kept", "worst task", "worst cell"):
            table.add_column(name, justify="right")
        for one in rows:
            worst = one.verdict.worst
            table.add_row(
                one.candidate,
                _spread(one.auc, 3),
                _spread(one.at_best, 2),
                f"{one.saving:.2f}",
                f"{one.verdict.cost:.3f}",
                f"{one.verdict.kept:.4f}",
                f"{one.verdict.least_kept:.4f}",
                f"{worst.kept:.3f} {worst.place.task} {worst.place.length}",
            )
        parts.append(table)
    for held_out in HELD_OUT:
        if any((one.candidate, one.held_out) == ("router", held_out) for one in found.found):
            title = f"Router, held out: {_HELD[held_out]}"
            parts.append(by_task(found.of("router", held_out).verdict, title, 1 - found.goal.confidence))
    return Group(*parts)


def by_task(verdict: Verdict, title: str, error: float) -> Table:
    """Questions, runs again and misses of each task, over all lengths."""
    table = Table(title=title, title_justify="left")
    table.add_column("task", no_wrap=True)
    for name in ("questions", "right when cheap", "run again", "missed", "bound", "cost"):
        table.add_column(name, justify="right")
    for task in dict.fromkeys(cell.place.task for cell in verdict.cells):
        cells = [cell for cell in verdict.cells if cell.place.task == task]
        count, missed = sum(cell.questions for cell in cells), sum(cell.missed for cell in cells)
        right = sum(sum(cell.place.right) / len(cell.place.right) for cell in cells) / len(cells)
        table.add_row(
            task,
            str(count),
            f"{right:.3f}",
            f"{sum(cell.again for cell in cells) / len(cells):.3f}",
            str(missed),
            f"{upper_bound(missed, count, error):.4f}",
            f"{sum(cell.cost for cell in cells) / len(cells):.3f}",
        )
    return table


_HELD = {"requests": "other requests", "template": "another template", "task": "each task in turn"}


def _spread(values: tuple[float, float, float], digits: int) -> str:
    value, low, high = values
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


BEGIN, END = "<!-- comparison -->", "<!-- end of comparison -->"


def markdown(found: Comparison, requests: int) -> str:
    """The comparison as a table for documents, between two comments."""
    held = [name for name in HELD_OUT if any(one.held_out == name for one in found.found)]
    lines = [
        BEGIN,
        f"`{found.cheap}` first, {requests} requests per task, template and length. The policy that is told the class "
        f"costs {found.reference:.3f} of dense; savings are shares of its {1 - found.reference:.3f}, the probe's "
        "cost and both passes included. Kept: of the dense accuracy, by the task that keeps least. Intervals: 95%.",
        "",
        "| decides by | " + " | ".join(f"{_HELD[name]}: AUC | saving | kept" for name in held) + " |",
        "|---|" + "---|" * (3 * len(held)),
    ]
    for candidate in dict.fromkeys(one.candidate for one in found.found):
        cells = []
        for name in held:
            one = found.of(candidate, name)
            cells += [_spread(one.auc, 3), f"{one.saving:.2f}", f"{one.verdict.least_kept:.3f}"]
        lines.append(f"| {candidate} | " + " | ".join(cells) + " |")
    lines += ["", "The router, by task:", "", "| held out | task | questions | run again | missed | bound | cost |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in held:
        verdict = found.of("router", name).verdict
        for task, (missed, count) in verdict.tasks.items():
            cells_ = [cell for cell in verdict.cells if cell.place.task == task]
            again = sum(cell.again for cell in cells_) / len(cells_)
            cost = sum(cell.cost for cell in cells_) / len(cells_)
            bound = upper_bound(missed, count, 1 - found.goal.confidence)
            lines.append(f"| {_HELD[name]} | `{task}` | {count} | {again:.3f} | {missed} | {bound:.4f} | {cost:.3f} |")
    return "\n".join([*lines, END])


def write_markdown(found: Comparison, requests: int, path: Path) -> None:
    """Put the table where the document has the last one, or at its end."""
    text = read_text(path, "document", AutoError) if path.exists() else ""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_whole(path, before + markdown(found, requests) + (after or "\n"), AutoError)


def as_json(found: Comparison) -> dict[str, Any]:
    """All figures as plain JSON."""

    def plain(one: Found) -> dict[str, Any]:
        return {
            "candidate": one.candidate,
            "held_out": one.held_out,
            "auc": one.auc,
            "saving_at_best_threshold": one.at_best,
            "saving": one.saving,
            "cost": one.verdict.cost,
            "kept": one.verdict.kept,
            "kept_by_worst_task": one.verdict.least_kept,
            "cells": [
                {
                    "task": cell.place.task,
                    "template": cell.place.template,
                    "length": cell.place.length,
                    "questions": cell.questions,
                    "again": cell.again,
                    "missed": cell.missed,
                    "upper": cell.upper,
                    "cost": cell.cost,
                }
                for cell in one.verdict.cells
            ],
        }

    return {
        "cheap": found.cheap,
        "reference_cost": found.reference,
        "loss": found.goal.loss,
        "confidence": found.goal.confidence,
        "spare": found.goal.spare,
        "found": [plain(one) for one in found.found],
    }


def draw(found: Comparison, path: Path) -> Path:
    """Two panels: how well each signal predicts a loss, and what it saves as fitted, hollow where a task loses more
    than tolerated."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(one.candidate for one in found.found))
    for step, held_out in enumerate(HELD_OUT):
        color = COLORS[held_out]
        for one in (one for one in found.found if one.held_out == held_out):
            place = names.index(one.candidate) + (step - 1) * 0.25
            value, low, high = one.auc
            left.plot([low, high], [place, place], color=color)
            left.plot(value, place, "o", color=color)
            keeps = one.verdict.least_kept >= 1 - found.goal.loss
            right.plot(one.saving, place, "o", color=color, fillstyle="full" if keeps else "none")
        left.plot([], [], "o", color=color, label=_HELD[held_out])
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.axvline(0.5, color="#7f7f7f", linewidth=1, linestyle=":")
    left.set_xlabel("AUC: scores of requests that the cheap budget loses, over others'")
    left.legend(fontsize="small", title="held out", loc="center left")
    right.axvline(0.8, color="#7f7f7f", linewidth=1, linestyle=":")
    right.axvline(0.0, color="#7f7f7f", linewidth=1)
    right.set_xlabel(f"share of the policy's saving (hollow: a task loses over {found.goal.loss:.0%})")
    check_output(path, AutoError)
    write_figure(path, figure, 120, AutoError)
    return path
