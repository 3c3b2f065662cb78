"""Results as tables: rich's where it is installed, aligned text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from sparsepass.measure.bench.result import SHAPE, Record, Result, shape_of

Row = tuple[str, ...]


def show(result: Result) -> None:
    """Prints every table of a result on stdout."""
    for title, head, rows in tables(result):
        _print(title, head, rows)
    for note in result.notes:
        print(f"Note: {note}")


def tables(result: Result) -> Iterable[tuple[str, Row, list[Row]]]:
    """Title, columns and rows of each table: one per shape, then the straight lines."""
    shapes = dict.fromkeys(shape_of(record) for record in result.records)
    device = result.environment.get("device", "")
    for shape in shapes:
        rows = [record for record in result.records if shape_of(record) == shape]
        columns = _KERNEL if result.what == "kernel" else _MODEL if result.what == "model" else _OP
        title = f"{device}: " + ", ".join(f"{name} {value}" for name, value in zip(SHAPE, shape, strict=True) if value)
        used = [column for column in columns if any(_cell(record, column) for record in rows)]
        yield (
            title,
            tuple(_HEADS.get(name, name) for name in used),
            [tuple(_cell(record, name) for name in used) for record in rows],
        )
    if result.fits:
        yield (
            "Time against density as a straight line: time = slope x density + constant",
            _FIT,
            [
                (
                    ", ".join(str(fit[name]) for name in SHAPE),
                    ", ".join(filter(None, (fit["variant"], fit.get("method_name", "")))),
                    str(fit.get("lists") or ""),
                    f"{fit['slope_ms']:.4g}",
                    f"{fit['constant_ms']:.4g}",
                    f"{fit['constant_share']:.1%}",
                    f"{fit['r2']:.5f}",
                )
                for fit in result.fits
            ],
        )


_FIT = ("shape", "variant", "lists", "slope ms", "constant ms", "constant, of the fastest", "R2")
_KERNEL = (
    "variant",
    "lists",
    "density_computed",
    "counts",
    "time",
    "range",
    "tflops",
    "speedup",
    "error",
    "kernel",
    "note",
)
_OP = (
    "variant", "method", "density_computed", "columns", "mass", "time", "range", "select_over_attend", "speedup",
    "error_over_dense", "note",
)  # fmt: skip
_MODEL = ("variant", "time", "range", "first_call_s", "peak_gib", "speedup", "error", "note")
_HEADS = {
    "density_computed": "density",
    "counts": "blocks in a row",
    "time": "median ms",
    "range": "least to greatest",
    "tflops": "TF/s",
    "mass": "mass kept",
    "speedup": "times faster",
    "select_over_attend": "selection, of attention",
    "error_over_dense": "error over dense",
    "first_call_s": "first call s",
    "peak_gib": "peak GiB",
}


def _cell(record: Record, name: str) -> str:
    if name == "time":
        return f"{record['median_ms']:.4g}" if "median_ms" in record else ""
    if name == "range":
        return f"{record['min_ms']:.4g} - {record['max_ms']:.4g}" if "min_ms" in record else ""
    if name == "note":
        notes = (("WRONG", "why"), ("failed", "failed"), ("left out", "skipped"))
        return "; ".join(f"{word}: {record[key]}" for word, key in notes if key in record)
    if name == "speedup":
        found: dict[str, Any] = record.get("speedup", {})
        return ", ".join(f"{value:.2f} {other}" for other, value in found.items() if other != "dense")
    value = record.get(name)
    if value is None:
        return ""
    if name == "counts":
        return f"{value[0]} - {value[1]}"
    if name == "select_over_attend":
        return f"{value:.1%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print(title: str, head: Row, rows: Sequence[Row]) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(title, head, rows))
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in head:
        right = name not in ("variant", "method", "lists", "times faster", "kernel", "note", "shape")
        table.add_column(
            name, justify="right" if right else "left", overflow="fold", no_wrap=name in ("variant", "method")
        )
    for row in rows:
        table.add_row(*row, style="red" if row[-1].startswith("WRONG") else None)
    console = Console(markup=False, highlight=False)
    (console if console.is_terminal else Console(width=160, markup=False, file=sys.stdout)).print(table)


def plain(title: str, head: Row, rows: Sequence[Row]) -> str:
    """A table as aligned text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    return "\n".join(["", title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
