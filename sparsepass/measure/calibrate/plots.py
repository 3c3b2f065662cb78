"""Plots: the heat map task by length of a calibration or an evaluation, and of the latter the law and the compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsepass.errors import OptionError
from sparsepass.host.files import check_folder, write_figure
from sparsepass.measure.calibrate.cell import Cell, Status
from sparsepass.measure.calibrate.evaluate import Evaluation
from sparsepass.measure.calibrate.result import Calibration
from sparsepass.measure.calibrate.words import tokens

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")


def draw(found: Evaluation, folder: Path) -> list[Path]:
    """Write ``tolerance.png``, ``safe_density.png`` and ``equal_compute.png``; returns their paths."""
    check_folder(folder, OptionError)
    paths = [folder / name for name in ("tolerance.png", "safe_density.png", "equal_compute.png")]
    return [_map(found, paths[0]), _law(found, paths[1]), _compute(found, paths[2])]


def draw_calibration(found: Calibration, path: Path) -> Path:
    """The heat map task by length, a panel per method: what the sparsest verified budget computes."""
    cells = {(cell.method, cell.task, cell.length): cell for cell in found.cells}
    methods = list(dict.fromkeys(cell.method for cell in found.cells))
    panels = {}
    for method in methods:
        panels[method] = [[_held(cells.get((method, task, one))) for one in found.lengths] for task in found.tasks]
    label = f"share computed (loss of at most {found.goal.loss:.0%})"
    return _heat(panels, list(found.tasks), list(found.lengths), label, path)


def _held(cell: Cell | None) -> tuple[float, str]:
    if cell is None:
        return float("nan"), "-"
    return cell.density, f"{cell.density:.2f}" if cell.status is Status.SAFE else str(cell.status).replace(" ", "\n")


def _map(found: Evaluation, path: Path) -> Path:
    """The heat map task by length, a panel per method: the share of the attention that has to be computed."""
    tasks = list(dict.fromkeys(place.task for place in found.every))
    lengths = sorted({place.length for place in found.every})
    fails = {(place.task, place.length) for place in found.every if place.fails}
    panels = {}
    for method in found.methods:
        fits = found.fits(method)
        safe = {(task, length): one.value for task, fit in fits.items()
                for length, one in zip(fit.lengths, fit.safe, strict=True)}  # fmt: skip
        panels[method] = [
            [
                (safe[task, length], f"{safe[task, length]:.2f}") if (task, length) in safe
                else (float("nan"), "dense\nfails" if (task, length) in fails else "-")
                for length in lengths
            ]
            for task in tasks
        ]  # fmt: skip
    return _heat(panels, tasks, lengths, f"safe density (loss of {found.tolerated:.0%})", path)


def _heat(
    panels: Mapping[str, Sequence[Sequence[tuple[float, str]]]],
    tasks: Sequence[str],
    lengths: Sequence[int],
    label: str,
    path: Path,
) -> Path:
    """Densities with their texts, [tasks][lengths] of each panel; no color where a density is NaN."""
    from matplotlib.figure import Figure

    size = (2.0 + (0.75 * len(lengths) + 0.4) * max(1, len(panels)), 1.1 + 0.5 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    image = None
    for panel, (title, rows) in zip(axes, panels.items(), strict=False):
        values = [[density for density, _ in row] for row in rows]
        image = panel.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis_r", aspect="auto")
        for row, cells in enumerate(rows):
            for column, (density, text) in enumerate(cells):
                ink = "white" if density > 0.5 else "black"
                panel.text(column, row, text, ha="center", va="center", color=ink, size=8)
        panel.set_title(title, size=9)
        panel.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axes[0].set_yticks(range(len(tasks)), tasks)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label=label)
    write_figure(path, figure, 150, OptionError)
    return path


def _law(found: Evaluation, path: Path) -> Path:
    from matplotlib.figure import Figure

    method = next(iter(found.methods))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(method, size=10)
    for color, (task, fit) in zip(COLORS * 9, found.fits(method).items(), strict=False):
        values = [point.value for point in fit.safe]
        low = [max(0.0, point.value - point.low) for point in fit.safe]
        high = [max(0.0, point.high - point.value) for point in fit.safe]
        axes.errorbar(fit.lengths, values, yerr=[low, high], fmt="o", color=color, capsize=3)
        label = f"{task}: exponent {fit.exponent}" if len(fit.lengths) > 1 else task
        axes.plot(fit.lengths, [fit.at(length) for length in fit.lengths], color=color, label=label)
    lengths = sorted({place.length for place in found.places})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"safe density (loss of {found.tolerated:.1%})")
    axes.legend(fontsize="small")
    write_figure(path, figure, 150, OptionError)
    return path


def _compute(found: Evaluation, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(found.steps)
    densities, worst = [found.density(step) for step in steps], [found.worst(step) for step in steps]
    for color, method in zip(COLORS[2:] * 9, found.methods, strict=False):
        mine = found.steps_of(method)
        axes.plot([densities[step] for step in mine], [worst[step] for step in mine], "o-", color=color, label=method)
    axes.plot([found.density(None)], [found.worst(None)], "*", color="#d62728", markersize=14, label="the policy")
    axes.axhline(found.tolerated, color="#1f77b4", linewidth=1, linestyle="--", label="tolerated")
    axes.set_xlabel("share of the attention computed, mean over the mix")
    axes.set_ylabel("worst loss of any task and length")
    axes.legend()
    write_figure(path, figure, 150, OptionError)
    return path
