"""Plots of ``frontier.py``: accuracy over cost, a panel per class, and the sparsity of states over difficulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

COLORS = {"tiny": "tab:orange", "small": "tab:blue", "large": "tab:green"}
NAMES = {"flops": "operations of the prefill", "bytes": "bytes of weights, keys and values read"}
CLASS_COLORS = {"single_qa": "tab:blue", "multi_qa": "tab:cyan", "multi_hop": "tab:red", "aggregation": "tab:olive"}
MARKERS = "os^Dv*"


def draw(found: dict[str, Any], folder: Path) -> None:
    """``frontier_flops.png``, ``frontier_bytes.png`` and, where states were measured, ``hidden_states.png``."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for axis in NAMES:
        _frontier(found, axis, folder / f"frontier_{axis}.png")
    if found["hidden"]:
        _hidden(found["hidden"], folder / "hidden_states.png")


def _frontier(found: dict[str, Any], axis: str, file: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    cells = found["cells"]
    kinds, lengths, models = (list(dict.fromkeys(c[name] for c in cells)) for name in ("class", "length", "model"))
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 7.5), sharex=True, sharey=True, layout="constrained")
    for panel, kind in zip(panels.flat, kinds, strict=False):
        for model in models:
            for place, length in enumerate(lengths):
                mine = [c for c in cells if (c["class"], c["model"], c["length"]) == (kind, model, length)]
                mine.sort(key=lambda cell: cell[axis])
                color, marker = COLORS[model], MARKERS[place % len(MARKERS)]
                x, y = [c[axis] for c in mine], [c["accuracy"] for c in mine]
                below, above = [c["accuracy"] - c["low"] for c in mine], [c["high"] - c["accuracy"] for c in mine]
                panel.errorbar(x, y, [below, above], color=color, marker=marker, markersize=4, lw=0.9, elinewidth=0.5)
                panel.plot(x[-1:], y[-1:], marker=marker, markersize=10, color=color, markeredgecolor="black")
        panel.set(title=kind, xscale="log", ylim=(-0.04, 1.05))
        panel.grid(alpha=0.3, which="both")
    for panel in panels[-1]:
        panel.set_xlabel(NAMES[axis])
    for panel in panels[:, 0]:
        panel.set_ylabel("right answers")
    shown = [Line2D([], [], color=COLORS[model], lw=3, label=model) for model in models]
    shown += [
        Line2D([], [], color="gray", marker=MARKERS[place % len(MARKERS)], lw=0, label=f"{length} tokens")
        for place, length in enumerate(lengths)
    ]
    figure.legend(handles=shown, loc="outside right center", fontsize=9)
    figure.suptitle("One request; a line is one model and length, sparse to dense (large mark); 95% intervals")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _hidden(states: dict[str, Any], file: Path) -> None:
    from matplotlib import pyplot

    axes = {"length": "tokens", "items": "facts, chains or kinds in 4K tokens", "hops": "hops asked for"}
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6.5), sharey="row", layout="constrained")
    for column, (axis, label) in enumerate(axes.items()):
        for row, name in enumerate(("hoyer", "participation")):
            panel = panels[row][column]
            for kind, color in CLASS_COLORS.items():
                mine = [p for p in states["points"] if (p["class"], p["axis"]) == (kind, axis)]
                if not mine:
                    continue
                mean, error = zip(*(p[name] for p in mine), strict=True)
                x = [p["value"] for p in mine]
                panel.errorbar(
                    x, mean, [1.96 * one for one in error], color=color, marker="o", markersize=4, label=kind
                )
            panel.grid(alpha=0.3)
            panel.set_xlabel(label)
            if axis == "hops":
                panel.set_xticks([1, 2, 3])
            else:
                panel.set_xscale("log", base=2)
    panels[0][0].set_ylabel("Hoyer sparsity")
    panels[1][0].set_ylabel("participation ratio")
    panels[0][0].legend(fontsize=8)
    figure.suptitle("The last layer's state where the answer begins, with 95% intervals")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
