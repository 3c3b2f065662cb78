"""Plots of a result, each a PNG file. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError
from sparsepass.host.files import check_folder, write_figure
from sparsepass.measure.bench.result import Record, Result, shape_of, timed

Series = dict[str, list[tuple[float, Record]]]


def draw(result: Result, folder: Path, stem: str = "") -> list[Path]:
    """Writes the plots that the records allow; returns their files. Raises ``OptionError`` without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise OptionError('Plots need matplotlib: pip install matplotlib, or "sparsepass[plots]".') from error
    check_folder(folder, OptionError)
    written = []
    for name, paint in PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        axes.set_prop_cycle(color=colors())
        if paint(axes, result):
            for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
                if scale == "log":
                    axis.set_major_formatter(LogFormatter())
                    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
            device = result.environment.get("device", "")
            axes.set_title(f"{device}, {result.environment.get('date', '')}", fontsize="small", loc="right")
            file = folder / f"{stem or result.what}-{name}.png"
            write_figure(file, figure, 130, OptionError)
            written.append(file)
        pyplot.close(figure)
    return written


def colors() -> list[Any]:
    """Twenty colors, no two alike: matplotlib's own ten, then a lighter one of each, the eleventh unlike the first."""
    import matplotlib

    twenty = matplotlib.colormaps["tab20"]
    return [twenty(n) for n in (*range(0, 20, 2), *range(9, 20, 2), *range(1, 9, 2))]


def _series(result: Result, keep: Callable[[Record], bool]) -> Series:
    """Records with a time by label, in the order of their computed density."""
    several = len({shape_of(record) for record in result.records}) > 1
    found: Series = {}
    for record in result.records:
        if timed(record) and keep(record):
            parts = [record["variant"], record.get("method_name", ""), record.get("lists", "")]
            parts += [_shape(record)] if several else []
            label = ", ".join(part for part in parts if part)
            found.setdefault(label, []).append((float(record.get("density_computed") or 0.0), record))
    return {label: sorted(points, key=lambda point: point[0]) for label, points in found.items()}


def _shape(record: Record) -> str:
    length = record["length"]
    text = f"{length // 1024}K" if length % 1024 == 0 else str(length)
    return f"{text}, d {record['head_dim']}, {record['dtype']}" if "head_dim" in record else text


def _sparse(record: Record) -> bool:
    return record.get("does") in ("lists", "op") and "density_computed" in record


def _speedup(axes: Any, result: Result) -> bool:
    series = _series(result, lambda record: _sparse(record) and "dense" in record.get("speedup", {}))
    for label, points in series.items():
        axes.plot([x for x, _ in points], [one["speedup"]["dense"] for _, one in points], "o-", label=label)
    if series:
        densities = sorted({x for points in series.values() for x, _ in points})
        axes.plot(densities, [1 / x for x in densities], "k--", label="ideal: 1 / density")
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="computed share of the visible blocks", ylabel="times faster")
        axes.set_title("Speedup over the fastest dense kernel", loc="left")
    return bool(series)


def _rate(axes: Any, result: Result) -> bool:
    series = _series(result, lambda record: record.get("does") == "lists" and "tflops" in record)
    for label, points in series.items():
        axes.plot([x for x, _ in points], [one["tflops"] for _, one in points], "o-", label=label)
    for label, points in _series(result, lambda record: record.get("does") == "dense").items():
        if series and "tflops" in points[0][1]:
            axes.axhline(points[0][1]["tflops"], linestyle=":", label=f"{label} (dense)")
    axes.set(
        xscale="log",
        xlabel="computed share of the visible blocks",
        ylabel="TF/s over the computed area",
        ylim=(0, None),
    )
    return bool(series)


def _time(axes: Any, result: Result) -> bool:
    series = _series(result, _sparse)
    longer = {label: points for label, points in series.items() if len(points) > 1}
    for label, points in longer.items():
        (line,) = axes.plot([x for x, _ in points], [one["median_ms"] for _, one in points], "o", label=label)
        fit = _fit_of(result, points[0][1])
        if fit is not None:
            ends = [0.0, points[-1][0]]
            text = f"{fit['slope_ms']:.4g} ms x density + {fit['constant_ms']:.3g} ms"
            axes.plot(
                ends, [fit["constant_ms"] + fit["slope_ms"] * x for x in ends], color=line.get_color(), label=text
            )
    axes.set(xlabel="computed share of the visible blocks", ylabel="median time, ms", xlim=(0, None), ylim=(0, None))
    return bool(longer)


def _fit_of(result: Result, record: Record) -> Record | None:
    wanted = (shape_of(record), record["variant"], record.get("lists"), record.get("method_name"))
    for fit in result.fits:
        if (shape_of(fit), fit["variant"], fit.get("lists"), fit.get("method_name")) == wanted:
            return fit
    return None


def _selection(axes: Any, result: Result) -> bool:
    series = _series(result, lambda record: "select_share" in record and record.get("does") in ("op", "select"))
    for label, points in series.items():
        axes.plot([x for x, _ in points], [100 * one["select_share"] for _, one in points], "o-", label=label)
    axes.set(
        xscale="log", xlabel="computed share of the visible blocks", ylabel="selection, % of selection and attention"
    )
    axes.set_ylim(0, None)
    return bool(series)


def _error(axes: Any, result: Result) -> bool:
    series = _series(result, lambda record: "error_over_dense" in record)
    for label, points in series.items():
        points = sorted(points, key=lambda point: float(point[1]["median_ms"]))
        axes.plot(
            [one["median_ms"] for _, one in points], [one["error_over_dense"] for _, one in points], "o-", label=label
        )
    for label, points in _series(result, lambda record: record.get("does") == "dense").items():
        if series:
            axes.axvline(points[0][1]["median_ms"], linestyle=":", color="gray", label=f"{label} (dense)")
    axes.set(
        xscale="log", yscale="log", xlabel="median time, selection included, ms", ylabel="relative error over dense"
    )
    return bool(series)


PLOTS: dict[str, Callable[[Any, Result], bool]] = {
    "speedup": _speedup,
    "rate": _rate,
    "time": _time,
    "selection": _selection,
    "error": _error,
}
"""Name of the file, and what paints it: False if there is nothing to paint."""
