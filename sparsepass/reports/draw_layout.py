"""Places a condensed graph on a page: boxes and lines in points, y downwards, every box as large as its text."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sparsepass.reports.draw_graph import Condensed, DrawNode, Fold, Shared, Stage

Measure = Callable[[str, float, bool], float]
"""Width in points of a text (one line) at a font size, bold or not."""

KIND_WORDS = {
    "sparse": "sparse attention",
    "dense_masked": "dense, mask recognized",
    "dense": "left dense",
    "refused": "not matched",
    "decode": "decode (dense)",
}
COLUMN_HEIGHT = 860.0
"""Points after which a graph goes on in the next column: what fits on a screen when zoomed to half."""
_GAP = 20.0
_PAD = 7.0
_RAIL = 16.0
_WRAP = 40


@dataclass(frozen=True)
class Line:
    """One line of text in a box."""

    text: str
    size: float = 9.0
    bold: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle with centered text. ``kind`` picks the colors: a node kind, ``shared``, ``frame`` or ``times``."""

    x: float
    y: float
    w: float
    h: float
    kind: str
    lines: tuple[Line, ...] = ()

    @property
    def middle(self) -> float:
        return self.y + self.h / 2


@dataclass(frozen=True)
class Wire:
    """A polyline; an arrow head at its end if ``arrow``. ``kind``: flow, residual or shared."""

    points: tuple[tuple[float, float], ...]
    kind: str
    arrow: bool = True


@dataclass
class Scene:
    """Everything on one panel. ``boxes`` are painted in order, after the wires except for frames."""

    width: float = 0.0
    height: float = 0.0
    boxes: list[Box] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)


def layout(graph: Condensed, measure: Measure) -> Scene:
    """Top-down, in columns of about ``COLUMN_HEIGHT``; ops that several layers read stand to the right of a column."""
    blocks = [_block(fold, measure) for fold in graph.folds]
    scene = Scene()
    left, first_stage = 0.0, 0
    for column in _columns(blocks):
        right = _place_column(scene, column, graph.shared, first_stage, left, measure)
        first_stage += sum(len(block.fold.stages) * block.fold.times for block in column)
        left = right + 3 * _GAP
    scene.width = max((b.x + b.w for b in scene.boxes), default=0.0)
    scene.height = max((b.y + b.h for b in scene.boxes), default=0.0)
    _join_columns(scene)
    return scene


@dataclass
class _Row:
    """One row of a block: the ops box, or the sites of a stage side by side. Positions are relative to the block."""

    stage: Stage
    is_ops: bool
    boxes: list[Box]
    y: float = 0.0

    @property
    def width(self) -> float:
        return sum(b.w for b in self.boxes) + _GAP / 2 * (len(self.boxes) - 1)

    @property
    def height(self) -> float:
        return max(b.h for b in self.boxes)


@dataclass
class _Block:
    fold: Fold
    rows: list[_Row]
    times: Box | None
    width: float
    height: float


def _block(fold: Fold, measure: Measure) -> _Block:
    rows: list[_Row] = []
    for stage, last in zip(fold.stages, fold.last, strict=True):
        if stage.ops:
            rows.append(_Row(stage, True, [_sized("op", (Line(_ops(stage.ops), faint=True),), measure)]))
        if stage.sites:
            boxes = [_site(a, b, measure) for a, b in zip(stage.sites, last.sites, strict=True)]
            rows.append(_Row(stage, False, boxes))
    times, y = None, 0.0
    width = max(row.width for row in rows)
    if fold.times > 1:
        what = "the same" if len(fold.stages) == 1 else f"these {len(fold.stages)} layers"
        times = _sized("times", (Line(f"x{fold.times} {what}", 9, bold=True),), measure)
        # The arrow into the frame comes down its center: the tag has the left half to itself.
        width = max(width, 2 * times.w + 2 * _PAD) + 4 * _PAD
        y = times.h + 2 * _PAD
    for row in rows:
        row.y = y
        y += row.height + _GAP
    return _Block(fold, rows, times, width, y - _GAP + (1.5 * _PAD if times else 0.0))


def _site(first: DrawNode, last: DrawNode, measure: Measure) -> Box:
    lines = [Line(KIND_WORDS.get(first.kind, first.kind), 10, bold=True)]
    label = re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", first.label)
    lines += [Line(part) for text in label.splitlines() for part in textwrap.wrap(text, _WRAP)]
    name = first.name if first.name == last.name else f"{first.name} .. {last.name}"
    lines += [Line(part, 8, faint=True) for part in textwrap.wrap(name, _WRAP + 4)]
    return _sized(first.kind, tuple(lines), measure)


def _sized(kind: str, lines: tuple[Line, ...], measure: Measure) -> Box:
    width = max(measure(line.text, line.size, line.bold) for line in lines) + 2 * _PAD
    return Box(0, 0, width, sum(line_height(line) for line in lines) + _PAD, kind, lines)


def line_height(line: Line) -> float:
    """Height in points that a line of text takes in its box."""
    return line.size * 1.4


def _ops(count: int) -> str:
    return "1 op" if count == 1 else f"{count} ops"


def _shared_box(shared: Shared, measure: Measure, again: bool) -> Box:
    names = ", ".join(shared.names[:4]) + (f", +{len(shared.names) - 4}" if len(shared.names) > 4 else "")
    lines = [Line(f"{_ops(shared.ops)} read by several layers" + (" (again)" if again else ""), faint=True)]
    lines += [Line(part, 8, faint=True) for part in textwrap.wrap(names, 30)[:3]]
    return _sized("shared", tuple(lines), measure)


def _columns(blocks: Sequence[_Block]) -> list[list[_Block]]:
    columns: list[list[_Block]] = []
    height = 0.0
    for block in blocks:
        if not columns or height + block.height > COLUMN_HEIGHT:
            columns.append([])
            height = 0.0
        columns[-1].append(block)
        height += block.height + _GAP
    return columns


def _place_column(
    scene: Scene, blocks: Sequence[_Block], shared: Sequence[Shared], stage: int, left: float, measure: Measure
) -> float:
    """Adds one column to the scene, its flow wires included; returns its right edge."""
    width = max(block.width for block in blocks)
    skips = any(row.stage.skips_sites for block in blocks for row in block.rows)
    content = left + (_RAIL if skips else 0.0)
    center, right = content + width / 2, content + width
    placed: list[tuple[_Row, list[Box]]] = []
    tops: dict[int, float] = {}
    y = 0.0
    for block in blocks:
        for i in range(len(block.fold.stages) * block.fold.times):
            tops[stage + i] = y
        stage += len(block.fold.stages) * block.fold.times
        if block.times:
            x = center - block.width / 2
            scene.boxes.append(Box(x, y, block.width, block.height, "frame"))
            scene.boxes.append(replace(block.times, x=x + _PAD, y=y + _PAD))
        for row in block.rows:
            x = center - row.width / 2
            boxes = []
            for box in row.boxes:
                boxes.append(replace(box, x=x, y=y + row.y))
                x += box.w + _GAP / 2
            placed.append((row, boxes))
            scene.boxes.extend(boxes)
        y += block.height + _GAP
    _flow(scene, placed, left + 4)
    return _rails(scene, placed, shared, tops, right, measure)


def _flow(scene: Scene, placed: Sequence[tuple[_Row, list[Box]]], rail: float) -> None:
    for (_, above), (_, below) in itertools.pairwise(placed):
        for a in above:
            for b in below:
                ends = ((a.x + a.w / 2, a.y + a.h), (b.x + b.w / 2, b.y))
                scene.wires.append(Wire(ends, "flow"))
    ops = [(row, boxes[0]) for row, boxes in placed if row.is_ops]
    for (row, a), (_, b) in itertools.pairwise(ops):
        if row.stage.skips_sites:
            points = ((a.x, a.middle + 3), (rail, a.middle + 3), (rail, b.middle - 3), (b.x, b.middle - 3))
            scene.wires.append(Wire(points, "residual"))


def _rails(
    scene: Scene,
    placed: Sequence[tuple[_Row, list[Box]]],
    shared: Sequence[Shared],
    tops: dict[int, float],
    right: float,
    measure: Measure,
) -> float:
    """Boxes of shared ops beside the column, a rail down from each, a tap to every box that reads it."""
    edge, bottom, lane = right, 0.0, 0
    for number, item in enumerate(shared):
        readers = [
            boxes[-1] for row, boxes in placed if number in (row.stage.ops_read if row.is_ops else row.stage.sites_read)
        ]
        if not readers:
            continue
        box = _shared_box(item, measure, again=item.stage not in tops)
        box = replace(box, x=right + _GAP + _RAIL * lane, y=max(tops.get(item.stage, 0.0), bottom))
        scene.boxes.append(box)
        edge, bottom, lane = max(edge, box.x + box.w), box.y + box.h + _GAP / 2, lane + 1
        rail = box.x + _RAIL / 2
        foot = box.y + box.h
        shift = 3.0 * (lane - 1)  # taps of two rails into one box must not lie on each other
        for reader in readers:
            y = reader.middle + shift
            if box.y < y < foot:
                scene.wires.append(Wire(((box.x, y), (reader.x + reader.w, y)), "shared"))
            else:
                scene.wires.append(
                    Wire(((rail, foot if y > foot else box.y), (rail, y), (reader.x + reader.w, y)), "shared")
                )
    return edge


def _join_columns(scene: Scene) -> None:
    """One arrow from the last box of a column, over the gap, to the first box of the next."""
    flow = [b for b in scene.boxes if b.kind not in ("frame", "times", "shared")]
    for a, b in itertools.pairwise(flow):
        if b.y < a.y:
            gap = b.x + b.w / 2
            low, high, between = a.y + a.h + _GAP / 2, b.y - _GAP / 2, _column_gap(scene, b)
            start = (a.x + a.w / 2, a.y + a.h)
            points = (start, (start[0], low), (between, low), (between, high), (gap, high), (gap, b.y))
            scene.wires.append(Wire(points, "flow"))


def _column_gap(scene: Scene, first: Box) -> float:
    """x of the free strip left of the column that ``first`` begins."""
    return max((b.x + b.w for b in scene.boxes if b.x + b.w < first.x - _RAIL - 4), default=0.0) + 1.5 * _GAP
