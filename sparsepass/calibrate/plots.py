"""Plots of an evaluation: the law of safe density by length, and the worst loss by compute."""

from __future__ import annotations

from pathlib import Path

from sparsepass.calibrate.evaluate import Evaluation
from sparsepass.calibrate.words import tokens

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")


def draw(found: Evaluation, folder: Path) -> list[Path]:
    """Write ``safe_density.png`` and ``equal_compute.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_law(found, folder / "safe_density.png"), _compute(found, folder / "equal_compute.png")]


def _law(found: Evaluation, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for color, (task, fit) in zip(COLORS * 9, found.fits().items(), strict=False):
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
    axes.plot(densities, worst, "o-", color="#7f7f7f", label="fixed budgets")
    axes.plot([found.density(None)], [found.worst(None)], "*", color="#d62728", markersize=14, label="policy")
    axes.axhline(found.tolerated, color="#1f77b4", linewidth=1, linestyle="--", label="tolerated")
    axes.set_xlabel("share of the attention computed, mean over the mix")
    axes.set_ylabel("worst loss of any task and length")
    axes.legend()
    figure.savefig(path, dpi=150)
    return path
