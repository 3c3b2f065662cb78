"""The monitor's report as a table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsepass.monitoring.monitor import NOTHING_WATCHED, LayerMass, MassReport
from sparsepass.reports.report import plural
from sparsepass.reports.table import ASCII_HEAD


def mass_table(report: MassReport, *, ascii_only: bool = False) -> RenderableType:
    """One row per class and layer, then a sentence for each time the floor made later calls denser."""
    parts: list[RenderableType] = []
    if report.layers:
        parts.append(Text(_summary(report), style="bold"))
        table = Table(box=ASCII_HEAD) if ascii_only else Table()
        for name in ("hint", "budgets of", "layer", "mean", "lowest head", "floor", "rows"):
            table.add_column(name, justify="left" if name in ("hint", "budgets of") else "right")
        for layer in report.layers:
            table.add_row(*_cells(layer))
        parts.append(table)
    else:
        parts.append(Text(NOTHING_WATCHED, style="bold yellow"))
    parts += [Text(f"- {sentence}", overflow="fold") for sentence in sentences(report)]
    return Group(*parts)


def sentences(report: MassReport) -> list[str]:
    """What happened besides: escalations, and calls that could not be read."""
    told = [
        f"After call {one.call}: {one.hint} runs under the budgets of {one.to}, no longer {one.before}: layer "
        f"{one.layer} kept {one.mass:.3f} of the attention mass, under the floor of {one.floor:.3f}."
        for one in report.raised
    ]
    if report.unseen:
        told.append(f"{plural(report.unseen, 'call')} captured in a CUDA graph of your own could not be read.")
    return told


def _summary(report: MassReport) -> str:
    worst = report.worst
    assert worst is not None  # the caller looked
    return (
        f"{plural(report.calls, 'call')} watched: {report.mean():.3f} of the attention mass kept, mean over layers; "
        f"least in layer {worst.layer}: {worst.mean:.3f}."
    )


def _cells(layer: LayerMass) -> tuple[Text, ...]:
    low = layer.floor is not None and layer.mean < layer.floor
    return (
        Text(str(layer.hint)),
        Text(str(layer.used) if layer.used is not layer.hint else "its own"),
        Text("?" if layer.layer is None else str(layer.layer)),
        Text(f"{layer.mean:.3f}", style="red" if low else "green"),
        Text(f"{layer.lowest:.3f}"),
        Text("" if layer.floor is None else f"{layer.floor:.3f}"),
        Text(str(layer.rows)),
    )
