"""What happened: every attention site of every compiled graph, with its budget, its reason and its achieved density."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from sparsepass.errors import SparsepassError, shown
from sparsepass.host.files import parse_json
from sparsepass.methods.rows import decode_rows
from sparsepass.reports.draw_graph import DrawNode
from sparsepass.reports.jsonable import DecodeError, decode, encode
from sparsepass.types import BY_ROW, EXACT, Phase, PlanEntry, Skip

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = "sparsepass.report"
FORMAT_VERSION = 1

NOTHING_COMPILED = (
    "Nothing was compiled: the sparsepass backend was not called, so every attention ran as the model wrote it. "
    "The usual cause is torch.compile(model).generate(): generate is bound to the original module, so it never enters "
    'the compiled one. Use model.compile(backend="sparsepass"), or '
    'model.forward = torch.compile(model.forward, backend="sparsepass"), and call the model again. '
    "Other causes: the environment variable that turns sparsepass off is set, another backend was named, or Dynamo has "
    "given the code up at its recompile limit (torch._dynamo.config.recompile_limit; TORCH_LOGS=recompiles says why)."
)


class ReportError(SparsepassError, ValueError):
    """A text that is not a report, or a report that cannot be drawn as asked."""


class Outcome(StrEnum):
    """What became of an attention site, in the words of the report and the picture."""

    SPARSE = "sparse"
    DENSE_MASKED = "dense_masked"
    DENSE = "dense"
    DECODE = "decode"
    REFUSED = "refused"

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Outcome.SPARSE: "sparse",
    Outcome.DENSE_MASKED: "dense with the mask recognized",
    Outcome.DENSE: "left dense",
    Outcome.DECODE: "decode",
    Outcome.REFUSED: "not matched",
}


@dataclass(frozen=True)
class RowReport:
    """One row of a mixed batch at one site."""

    task: str
    budget: str
    """What it computes, as text; ``dense``: every visible block, in the sparse kernel."""
    density: float
    """Share of the visible blocks asked for, mean over heads."""
    replaced: bool = False
    """Its class has a budget of another method or block size; it got that of the costliest class instead."""


@dataclass(frozen=True)
class SiteReport:
    """One attention site of one graph. Blocks are (query block, key block) pairs summed over batch, heads and runs."""

    entry: PlanEntry
    density_asked: float | None
    """Share of the visible blocks that the budget asked for; ``None`` when dense."""
    density_achieved: float | None
    """``blocks_computed / blocks_visible``, counted from what ran; ``None`` if it never ran."""
    blocks_computed: int
    blocks_visible: int
    near_misses: tuple[Skip, ...] = ()
    rows: tuple[RowReport, ...] = ()
    """The rows of the last call, where budgets differ by row."""
    kernel: str | None = None
    """The kernel that ran: hopper, triton, native (C++) or gathered (torch); ``None`` if no sparse one did."""

    @property
    def plan_words(self) -> str:
        """The method, and whether it is the cap of budgets that differ by row."""
        text = str(self.entry.budget.params.get("table", ""))
        if self.entry.budget.method != BY_ROW:
            return self.entry.budget.method
        return f"{decode_rows(text).cap.method}, by row"

    @property
    def outcome(self) -> Outcome:
        if self.entry.site.phase is Phase.DECODE:
            return Outcome.DECODE
        if not self.entry.rewritten:
            return Outcome.DENSE
        exact = self.entry.budget.dense or self.entry.budget == EXACT
        return Outcome.DENSE_MASKED if exact else Outcome.SPARSE


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo captured and sparsepass compiled: one task (or mix), one length bucket, one plan."""

    index: int
    name: str
    task: str
    bucket: str
    plan_key: str
    guards: tuple[str, ...]
    """Texts of the guards that sparsepass installed; empty when there is no hint guard (``notes`` says why)."""
    sites: tuple[SiteReport, ...]
    refused: tuple[Skip, ...]
    """Softmax or SDPA anchors that no pattern matched, with the near miss."""
    decode_sites: int
    runs: int
    compile_seconds: float
    notes: tuple[str, ...]
    nodes: tuple[DrawNode, ...] = ()
    """The captured graph, for the picture; empty when it was not kept."""
    rows: tuple[str, ...] = ()
    """Class of each row of the last call, where the hint was a list of several."""

    @property
    def title(self) -> str:
        """``Graph 0``, with the name if it says more."""
        number = f"Graph {self.index}"
        return number if self.name.lower() in ("", number.lower()) else f"{number}: {self.name}"

    def counts(self) -> Counter[Outcome]:
        """Sites per outcome. Decode sites are taken from ``decode_sites``, whether or not ``sites`` lists them."""
        counts: Counter[Outcome] = Counter(s.outcome for s in self.sites if s.outcome is not Outcome.DECODE)
        counts[Outcome.DECODE] = self.decode_sites
        counts[Outcome.REFUSED] = len(self.refused)
        return +counts


@dataclass(frozen=True)
class Report:
    """What sparsepass did since the counters were last reset, one ``GraphReport`` per compiled graph.

    ``print(report)`` gives plain text at 100 columns, ``rich.print(report)`` the colored table, ``to_json`` and
    ``from_json`` round-trip, ``draw`` writes a picture.
    """

    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...] = ()
    peak_memory_bytes: int | None = None
    """Peak allocated on the accelerators, or resident in the process on the CPU; ``None`` where not measured."""
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def compiled(self) -> bool:
        """False when the backend was never called."""
        return bool(self.graphs)

    def counts(self) -> Counter[Outcome]:
        """Sites per outcome over all graphs."""
        total: Counter[Outcome] = Counter()
        for graph in self.graphs:
            total.update(graph.counts())
        return total

    @property
    def density_achieved(self) -> float | None:
        """Blocks computed over blocks visible, over all sparse sites that ran; ``None`` if none ran."""
        ran = [s for g in self.graphs for s in g.sites if s.outcome is Outcome.SPARSE and s.blocks_visible]
        visible = sum(s.blocks_visible for s in ran)
        return sum(s.blocks_computed for s in ran) / visible if visible else None

    def summary(self) -> str:
        """One line: how many graphs and sites, what became of them, the achieved density, peak memory."""
        if not self.compiled:
            return NOTHING_COMPILED.split(":", 1)[0] + ": 0 graphs (print the report for the usual cause)."
        counts = self.counts()
        parts = [f"{count} {outcome.words}" for outcome in Outcome if (count := counts[outcome])]
        if (density := self.density_achieved) is not None and counts[Outcome.SPARSE]:
            parts[0] += f" (density {density:.3f} achieved)"
        sites = sum(counts.values())
        text = f"{plural(len(self.graphs), 'graph')}, {plural(sites, 'attention site')}"
        text += ": " + ", ".join(parts) if parts else ""
        if self.peak_memory_bytes is not None:
            text += f"; peak memory {self.peak_memory_bytes / 2**30:.2f} GiB"
        return text + "."

    def table(self, *, verbose: bool = False, ascii_only: bool = False) -> RenderableType:
        """A rich renderable. Equal sites share a row unless ``verbose``, which also lists near misses and modules."""
        from sparsepass.reports.table import report_table

        return report_table(self, verbose=verbose, ascii_only=ascii_only)

    def text(self, *, width: int = 100, verbose: bool = False) -> str:
        """The table as plain ASCII text, at most ``width`` columns wide (100 is the least that stays readable)."""
        from sparsepass.reports.table import plain_text

        return plain_text(self.table(verbose=verbose, ascii_only=True), width)

    def __str__(self) -> str:
        return self.text()

    def __rich__(self) -> RenderableType:
        return self.table()

    def to_json(self, *, nodes: bool = True, indent: int | None = 2) -> str:
        """JSON that ``from_json`` reads. ``nodes=False`` leaves out the captured graphs, which only ``draw`` uses."""
        report = self if nodes else replace(self, graphs=tuple(replace(g, nodes=()) for g in self.graphs))
        head = {"format": FORMAT, "version": FORMAT_VERSION, "summary": self.summary()}
        return json.dumps(head | encode(report), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what ``to_json`` wrote.

        Raises:
            ReportError: the text is no JSON, no report, of another version, or has fields of another type.
        """
        data = parse_json(text, "The report", ReportError, finite=False)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ReportError(f'Not a report: the JSON has no "format": "{FORMAT}". Give what Report.to_json() wrote.')
        if data.get("version") != FORMAT_VERSION:
            raise ReportError(
                f"Report format version {shown(data.get('version'))}; this sparsepass reads version {FORMAT_VERSION}. "
                "Write the report again with this version."
            )
        body = {key: item for key, item in data.items() if key not in ("format", "version", "summary")}
        try:
            report: Report = decode(cls, body)
        except DecodeError as error:
            raise ReportError(f"Not a readable report: {error}") from error
        return report

    def draw(self, path: str | Path, graphs: Sequence[int] | None = None) -> Path:
        """Writes a picture (format by suffix: .png, .svg, .pdf) of the captured graphs with their sites marked.

        ``graphs`` picks graphs by ``GraphReport.index``; by default those with attention sites, at most six.

        Raises:
            ReportError: no graph to draw, or an unknown index.
        """
        from sparsepass.reports.draw import MAX_PANELS, Panel, draw_panels

        known = {g.index: g for g in self.graphs}
        if graphs is not None and (unknown := [i for i in graphs if i not in known]):
            raise ReportError(f"No graph has index {unknown[0]}; this report has {sorted(known) or 'none'}.")
        kept = [g for g in self.graphs if g.nodes]
        if graphs is None:
            chosen = [g for g in kept if g.counts()] or kept
            left_out = len(chosen) - MAX_PANELS
            chosen = chosen[:MAX_PANELS]
        else:
            chosen, left_out = [g for g in kept if g.index in graphs], 0
        if not chosen:
            raise ReportError(
                NOTHING_COMPILED
                if not self.compiled
                else "The report holds no captured graph (it was read from JSON "
                "written without nodes). Draw the report that explain() returned."
            )
        footer = f"{plural(left_out, 'more graph')} not drawn: Report.draw(path, graphs=[...])" if left_out > 0 else ""
        panels = [Panel(g.title, f"task {g.task}, length bucket {g.bucket}", g.nodes) for g in chosen]
        return draw_panels(panels, path, footer=footer)


def plural(count: int, noun: str) -> str:
    """``1 graph``, ``2 graphs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
