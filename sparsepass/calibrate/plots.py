"""Plots of an evaluation: the law of safe density by length, and the worst loss by compute."""

from __future__ import annotations

from pathlib import Path

from sparsepass.calibrate.evaluate import Evaluation
from sparsepass.calibrate.words import tokens

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")


def draw(found: Evaluation, folder: Path) -> list[Path]:
    """Write ``tolerance.png``, ``safe_density.png`` and ``equal_compute.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("tolerance.png", "safe_density.png", "equal_compute.png")]
    return [_map(found, paths[0]), _law(found, paths[1]), _compute(found, paths[2])]


def _map(found: Evaluation, path: Path) -> Path:
    """The heat map task by length, a panel per method: the share of the attention that has to be computed."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(place.task for place in found.every))
    lengths = sorted({place.length for place in found.every})
    count = max(1, len(found.methods))
    figure = Figure(
        figsize=(0.8 + (0.75 * len(lengths) + 0.4) * count + 1.2, 1.1 + 0.5 * len(tasks)), layout="constrained"
    )
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    image = None
    for axes, method in zip(panels, found.methods, strict=False):
        grid = [[float("nan")] * len(lengths) for _ in tasks]
        for task, fit in found.fits(method).items():
            for length, safe in zip(fit.lengths, fit.safe, strict=True):
                grid[tasks.index(task)][lengths.index(length)] = safe.value
        image = axes.imshow(grid, vmin=0.0, vmax=1.0, cmap="viridis_r", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                text = "dense\nfails" if value != value else f"{value:.2f}"
                axes.text(
                    column, row, text, ha="center", va="center", color="white" if value > 0.5 else "black", size=8
                )
        axes.set_title(method, size=9)
        axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    panels[0].set_yticks(range(len(tasks)), tasks)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label=f"safe density (loss of {found.tolerated:.0%})")
    figure.savefig(path, dpi=150)
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
    figure.savefig(path, dpi=150)
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
    figure.savefig(path, dpi=150)
    return path
