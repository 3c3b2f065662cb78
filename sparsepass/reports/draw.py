"""A picture of the captured graph: attention sites colored by outcome, everything else condensed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepass.errors import SparsepassError, close_names
from sparsepass.host.files import write_figure
from sparsepass.reports.draw_graph import NODE_KINDS, DrawNode, condense
from sparsepass.reports.draw_layout import KIND_WORDS, Box, Line, Scene, Wire, layout, line_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DrawError", "DrawNode", "Panel", "check_path", "draw_graph", "draw_panels"]

MAX_PANELS = 6
SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colors, told apart by most color-blind readers; the boxes also say the outcome in words.
COLORS = {
    "sparse": "#009E73",
    "dense_masked": "#3A8FC9",
    "dense": "#E69F00",
    "refused": "#D55E00",
    "decode": "#B5659A",
    "op": "#ADB5BD",
    "shared": "#868E96",
    "frame": "#CED4DA",
    "times": "#495057",
}
_MARGIN = 28.0
_INK, _FAINT = "#212529", "#5C636A"


class DrawError(SparsepassError, ValueError):
    """A picture that cannot be written: unknown suffix, or nothing to draw."""


@dataclass(frozen=True)
class Panel:
    """One graph of a picture. ``nodes`` in topological order (that of the FX graph)."""

    title: str
    subtitle: str
    nodes: Sequence[DrawNode]


def draw_graph(nodes: Sequence[DrawNode], path: str | Path, *, title: str = "", subtitle: str = "") -> Path:
    """Writes the picture of one captured graph.

    Args:
        nodes: the graph in topological order; names of inputs that are not among the nodes are ignored.
        path: where to; .png, .svg or .pdf by its suffix. Folders must exist.

    Raises:
        DrawError: another suffix, or no nodes.
    """
    return draw_panels([Panel(title, subtitle, nodes)], path)


def draw_panels(panels: Sequence[Panel], path: str | Path, *, footer: str = "") -> Path:
    """Several graphs side by side in one picture, with one legend. See ``draw_graph``."""
    path = check_path(path)
    panels = [panel for panel in panels if panel.nodes]
    for node in itertools.chain.from_iterable(panel.nodes for panel in panels):
        if node.kind not in NODE_KINDS:
            raise DrawError(f"Node {node.name!r} has kind {node.kind!r}. {close_names(node.kind, NODE_KINDS)}")
    if not panels:
        raise DrawError("Nothing to draw: the graph has no nodes. Pass the nodes of a captured graph.")

    # Late: importing matplotlib takes most of a second. A bare Figure needs no pyplot state and no display.
    from matplotlib.figure import Figure

    page = _Page()
    scenes = [layout(condense(panel.nodes), page.measure) for panel in panels]
    legend = _legend(panels)
    widths = [
        max(scene.width, page.measure(panel.title, 13, True), page.measure(panel.subtitle, 9.5, False))
        for panel, scene in zip(panels, scenes, strict=True)
    ]
    total = sum(widths) + 2.5 * _MARGIN * (len(panels) - 1)
    total = max(total, max(page.measure(text, 9, False) + 24 for _, text in legend), page.measure(footer, 9, False))
    rows = _legend_rows(legend, total, page)
    top = 52.0
    bottom = 18.0 * (len(rows) + bool(footer)) + 14
    width = total + 2 * _MARGIN
    height = max(s.height for s in scenes) + top + bottom + 2 * _MARGIN

    figure = Figure(figsize=(width / 72, height / 72), dpi=144, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    x = _MARGIN
    for panel, scene, panel_width in zip(panels, scenes, widths, strict=True):
        _text(axes, x, _MARGIN + 8, Line(panel.title, 13, bold=True), align="left")
        _text(axes, x, _MARGIN + 28, Line(panel.subtitle, 9.5, faint=True), align="left")
        _paint(axes, scene, x, _MARGIN + top)
        x += panel_width + 2.5 * _MARGIN
    y = height - _MARGIN - bottom + 20
    for row in rows:
        x = _MARGIN
        for kind, text, advance in row:
            _paint_box(axes, Box(x, y - 6, 16, 12, kind), 0, 0)
            _text(axes, x + 23, y, Line(text, 9), align="left")
            x += advance
        y += 18
    if footer:
        _text(axes, _MARGIN, y, Line(footer, 9, faint=True), align="left")
    write_figure(path, figure, 144, DrawError)
    return path


def check_path(path: str | Path) -> Path:
    """The path, if a picture can be written there. Raises DrawError for another suffix or a folder that is missing."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DrawError(
            f"Cannot draw to {path.name!r}: the suffix picks the format. {close_names(path.suffix, SUFFIXES)}"
        )
    if not path.parent.is_dir():
        raise DrawError(f"Cannot draw to {path}: the folder {path.parent} does not exist. Create it first.")
    return path


class _Page:
    """Measures text with the fonts that the picture will use."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import RendererAgg
        from matplotlib.font_manager import FontProperties

        make: Any = RendererAgg  # untyped in some releases of matplotlib
        self._renderer = make(8, 8, 72)  # at 72 dots per inch a pixel is a point
        self._fonts = {bold: FontProperties(weight="bold" if bold else "normal") for bold in (False, True)}

    def measure(self, text: str, size: float, bold: bool) -> float:
        font = self._fonts[bold].copy()
        font.set_size(size)
        return float(self._renderer.get_text_width_height_descent(text, font, ismath=False)[0]) if text else 0.0


def _legend(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    counts = Counter(node.kind for panel in panels for node in panel.nodes)
    entries = [(kind, f"{words} ({counts[kind]})") for kind, words in KIND_WORDS.items() if counts[kind]]
    return [*entries, ("op", f"other ops, condensed ({counts['op']})")]


def _legend_rows(legend: Sequence[tuple[str, str]], width: float, page: _Page) -> list[list[tuple[str, str, float]]]:
    rows: list[list[tuple[str, str, float]]] = [[]]
    used = 0.0
    for kind, text in legend:
        advance = page.measure(text, 9, False) + 44
        if rows[-1] and used + advance > width + 20:
            rows.append([])
            used = 0.0
        rows[-1].append((kind, text, advance))
        used += advance
    return rows


def _paint(axes: Axes, scene: Scene, x: float, y: float) -> None:
    for box in scene.boxes:
        if box.kind == "frame":
            _paint_box(axes, box, x, y)
    for wire in scene.wires:
        _paint_wire(axes, wire, x, y)
    for box in scene.boxes:
        if box.kind != "frame":
            _paint_box(axes, box, x, y)


def _paint_box(axes: Axes, box: Box, x: float, y: float) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    color = COLORS[box.kind]
    site = box.kind in KIND_WORDS
    weight = 0.18 if site else {"op": 0.15, "times": 1.0, "frame": 0.12}.get(box.kind, 0.06)
    fill = tuple(1 - weight * (1 - channel) for channel in to_rgb(color))
    shape = f"round,pad=0,rounding_size={min(5.0, box.h / 2)}"
    style: Any = (0, (4, 3)) if box.kind in ("shared", "frame") else "solid"
    axes.add_patch(
        FancyBboxPatch(
            (box.x + x, box.y + y), box.w, box.h, boxstyle=shape, facecolor=fill, edgecolor=color,
            linewidth=1.8 if site else 1.0, linestyle=style,
        )
    )  # fmt: skip
    at = box.y + y + (box.h - sum(line_height(line) for line in box.lines)) / 2
    for line in box.lines:
        _text(axes, box.x + x + box.w / 2, at + line_height(line) / 2, line, ink="white" if box.kind == "times" else "")
        at += line_height(line)


def _paint_wire(axes: Axes, wire: Wire, x: float, y: float) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Outline

    color = {"flow": "#495057", "residual": "#9AA1A8", "shared": "#9AA1A8"}[wire.kind]
    axes.add_patch(
        FancyArrowPatch(
            path=Outline([(px + x, py + y) for px, py in wire.points]),
            arrowstyle="-|>,head_length=4,head_width=2.2" if wire.arrow else "-",
            mutation_scale=1, color=color, linewidth=1.1 if wire.kind == "flow" else 0.9, shrinkA=0, shrinkB=0,
            linestyle=(0, (4, 2)) if wire.kind == "shared" else "solid", fill=wire.arrow, joinstyle="round",
        )
    )  # fmt: skip


def _text(axes: Axes, x: float, y: float, line: Line, *, align: str = "center", ink: str = "") -> None:
    axes.text(
        x, y, line.text, fontsize=line.size, fontweight="bold" if line.bold else "normal",
        color=ink or (_FAINT if line.faint else _INK), ha=align, va="center_baseline", parse_math=False,
    )  # fmt: skip
