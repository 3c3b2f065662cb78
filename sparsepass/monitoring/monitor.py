"""``sparsepass.monitor``: how much of the attention mass a budget keeps, layer by layer, and a floor under it.

A few query rows of each sparse layer are computed exactly as well: the log-sum-exp over what the kernel summed against
that over everything gives the share of the softmax's mass that was kept. A wrong hint shows there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparsepass.errors import OptionError
from sparsepass.request import observer as watch
from sparsepass.types import TaskClass

if TYPE_CHECKING:
    from rich.console import RenderableType

MOST_ROWS = 1024

NOTHING_WATCHED = (
    "Nothing was watched: no compiled graph with sparse attention ran in the monitor's scope. Dense lengths and hints "
    "keep everything and are not watched; a model that is not compiled with sparsepass cannot be."
)


@dataclass(frozen=True, slots=True)
class LayerMass:
    """What one layer kept under one class."""

    hint: TaskClass
    """As given."""
    used: TaskClass
    """Whose budgets held: another one once the monitor raised it."""
    layer: int | None
    """None where it is not known, or several share the graph."""
    site: str
    """Path of the module, or the graph node's name where Dynamo knows none."""
    rows: int
    """Sampled rows counted, over calls, requests and heads."""
    mean: float
    """Share of the attention mass kept, mean over the rows: 0 to 1."""
    lowest: float
    """The lowest mean of one head in one request."""
    least: float
    """The lowest mean of one request: what a floor is held against."""
    heads: tuple[float, ...]
    """Mean of each query head."""
    floor: float | None
    """What the mean of a call had to reach; None where any would do."""


@dataclass(frozen=True, slots=True)
class MassReport:
    """What a monitor has seen. ``print`` gives a table, ``to_json`` the figures."""

    calls: int
    layers: tuple[LayerMass, ...]
    raised: tuple[watch.Raised, ...]
    """When the floor made later calls denser."""
    unseen: int = 0
    """Calls that the user captured in a CUDA graph: they cannot be read."""

    @property
    def worst(self) -> LayerMass | None:
        """The layer with the lowest mean; None if nothing was watched."""
        return min(self.layers, key=lambda layer: layer.mean, default=None)

    def mean(self, hint: str | None = None, used: str | None = None) -> float:
        """Mean over the layers, of one class given or in force or of all; NaN if there is none."""
        means = [
            layer.mean
            for layer in self.layers
            if (hint is None or layer.hint == hint) and (used is None or layer.used == used)
        ]
        return sum(means) / len(means) if means else float("nan")

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(asdict(self), indent=indent)

    def table(self, *, ascii_only: bool = False) -> RenderableType:
        """A rich renderable: a row per class and layer, then a sentence per escalation."""
        from sparsepass.monitoring.table import mass_table

        return mass_table(self, ascii_only=ascii_only)

    def __str__(self) -> str:
        from sparsepass.reports.table import plain_text

        return plain_text(self.table(ascii_only=True), 100)

    def __rich__(self) -> RenderableType:
        return self.table()


class Monitor:
    """What ``monitor`` returns: a context manager that can be entered once at a time, and its report."""

    def __init__(self, floor: float | None, rows: int) -> None:
        self._watch = watch.Watch(rows, floor)
        self._token: Any = None

    def __enter__(self) -> Monitor:
        if self._token is not None:
            raise OptionError("This monitor is in force already; make another one by sparsepass.monitor().")
        self._token = watch.enter(self._watch)
        return self

    def __exit__(self, *exc: object) -> None:
        token, self._token = self._token, None
        watch.leave(token)

    @property
    def raised(self) -> dict[TaskClass, TaskClass]:
        """The classes that run under another one's budgets by now. Waits for the calls made so far."""
        self._watch.settle()
        return dict(self._watch.raised)

    def lower(self) -> None:
        """Let every hint have its own budgets again; what was seen stays in the report."""
        self._watch.lower()

    def report(self) -> MassReport:
        """What was seen so far. Waits for the calls made so far."""
        seen = self._watch
        seen.settle()
        layers = [
            LayerMass(
                hint=hint,
                used=used,
                layer=layer,
                site=site,
                rows=kept.rows,
                mean=kept.mean,
                lowest=kept.lowest,
                least=kept.least,
                heads=tuple((kept.heads[:, 0] / kept.heads[:, 1]).tolist()),
                floor=seen.floors.get((used, site, layer)),
            )
            for (hint, used, site, layer), kept in list(seen.kept.items())
        ]
        layers.sort(key=lambda one: one.hint)  # stable: within a hint in the order of the calls
        return MassReport(seen.calls, tuple(layers), tuple(seen.events), seen.unseen)


def monitor(*, floor: float | None = None, rows: int = 32) -> Monitor:
    """Watch what share of the attention mass the sparse layers keep: ``with sparsepass.monitor() as m: ...``, then
    ``print(m.report())``.

    Graphs called in the block sample ``rows`` query rows per layer (1 to 1024, spread over the sequence, the last row
    among them) and compute those rows' log-sum-exp over all keys too. They are graphs of their own, compiled at their
    first call under a monitor; without one nothing is sampled. Nothing in a graph waits for the device.

    ``floor``: the least share, 0 to 1, that each layer has to keep in a request, mean over its heads and sampled rows.
    ``None``: that of the policy's rule (``floor``), if it has one. Where a layer keeps less, the calls that follow in
    the block run that hint under the next denser class's budgets, dense at last, until every layer keeps enough. A call
    waits until the one before it is done. The call that fell short is not repeated: look at ``raised``.

    The monitor holds in this thread or asyncio task, and in those that copy its context. Of nested ones the inner one
    counts. Raises ``OptionError``.
    """
    if floor is not None and (isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1):
        raise OptionError(
            f"A monitor's floor is {floor!r}; accepted is a share of the attention mass, 0 to 1, or None."
        )
    if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= MOST_ROWS:
        raise OptionError(f"A monitor's rows is {rows!r}; accepted is a whole number from 1 to {MOST_ROWS}.")
    return Monitor(None if floor is None else float(floor), rows)
