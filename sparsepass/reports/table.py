"""The report as a table: equal sites share a row, refusals are sentences under it."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sparsepass.methods.rows import decode_rows
from sparsepass.reports.draw_graph import without_number
from sparsepass.reports.report import NOTHING_COMPILED, GraphReport, Outcome, Report, RowReport, SiteReport, plural
from sparsepass.types import AttentionSite, Skip, TaskClass

MAX_EMPTY = 2
"""Graphs without attention that are listed; more of them share one line."""

STYLES = {
    Outcome.SPARSE: "green",
    Outcome.DENSE_MASKED: "cyan",
    Outcome.DENSE: "yellow",
    Outcome.REFUSED: "red",
    Outcome.DECODE: "blue",
}
SHORT = {
    Outcome.SPARSE: "sparse",
    Outcome.DENSE_MASKED: "dense, mask known",
    Outcome.DENSE: "left dense",
    Outcome.REFUSED: "not matched",
    Outcome.DECODE: "decode",
}
ASCII_HEAD = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""A line under the head and nothing else, as ``box.SIMPLE_HEAD``, for logs that are not UTF-8."""
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def report_table(report: Report, *, verbose: bool = False, ascii_only: bool = False) -> RenderableType:
    """The whole report: summary, one table per graph, sentences under each, versions at the end."""
    if not report.compiled:
        return Group(Text(NOTHING_COMPILED, style="bold yellow"), *_bullets("", report.notes))
    parts: list[RenderableType] = [Text(report.summary(), style="bold")]
    empty = [] if verbose else [g for g in report.graphs if not g.counts() and not g.decode_sites]
    folded = empty if len(empty) > MAX_EMPTY else []
    for graph in report.graphs:
        if graph not in folded:
            parts += ["", *_graph(graph, verbose=verbose, ascii_only=ascii_only)]
    if folded:
        parts += ["", _without_attention(folded)]
    if report.notes:
        parts += ["", *_bullets("Notes", report.notes)]
    tail = [report.device] if report.device else []
    tail += [f"{name} {version}" for name, version in report.versions.items()]
    if tail:
        parts += ["", Text(", ".join(tail), style="dim")]
    return Group(*parts)


def _without_attention(graphs: Sequence[GraphReport]) -> Text:
    runs, seconds = sum(graph.runs for graph in graphs), sum(graph.compile_seconds for graph in graphs)
    numbers = index_ranges([graph.index for graph in graphs])
    words = f"no attention in them; {plural(runs, 'run')}, compiled in {seconds:.1f} s"
    return Text(f"Graphs {numbers} (x{len(graphs)}): {words}", overflow="fold")


def plain_text(renderable: RenderableType, width: int) -> str:
    """The renderable without colors, trailing blanks stripped, no line longer than ``width`` columns."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _graph(graph: GraphReport, *, verbose: bool, ascii_only: bool) -> list[RenderableType]:
    title = Text(graph.title, style="bold")
    task = "unknown (no hint)" if graph.task == TaskClass.UNKNOWN else graph.task
    title.append(f"  task {task}, length bucket {graph.bucket}", style="not bold")
    ran = f"  {plural(graph.runs, 'run')}, compiled in {graph.compile_seconds:.1f} s, plan {graph.plan_key}"
    parts: list[RenderableType] = [title, Text(ran, style="dim", overflow="fold")]
    parts += [Text.assemble("  guard: ", (guard, "magenta"), overflow="fold") for guard in graph.guards]
    if not graph.guards:
        parts.append(Text("  guard: none installed by sparsepass"))
    if graph.sites:
        groups = [(s,) for s in graph.sites] if verbose else fold_sites(graph.sites)
        parts += ["", _sites(groups, ascii_only=ascii_only)]
        parts += _bullets("Rows", _row_budgets(groups))
        parts += _bullets("Why dense", _dense_reasons(groups))
        if verbose:
            parts += _bullets("Modules", [f"site {s.entry.site.index}: {_module(s.entry.site)}" for s in graph.sites])
            parts += _bullets("Near misses", _near_misses(graph.sites))
    if graph.refused:
        parts += _bullets("Softmax or SDPA that no pattern matched", _refusals(graph.refused))
    if graph.decode_sites:
        parts += _bullets("", [f"{plural(graph.decode_sites, 'decode site')} (one query per step): dense for now."])
    if not graph.counts():
        parts.append(Text("  no attention in this graph"))
    return [*parts, *_bullets("", graph.notes)]


def _sites(groups: Sequence[tuple[SiteReport, ...]], *, ascii_only: bool) -> Table:
    table = Table(
        box=ASCII_HEAD if ascii_only else box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("Sites", overflow="fold", min_width=5)
    table.add_column("Attention", overflow="fold", min_width=21)
    table.add_column("Mask", overflow="fold", min_width=10, max_width=16)
    table.add_column("Plan", overflow="fold", min_width=11, max_width=13)
    table.add_column("Density\nasked", justify="right", no_wrap=True)
    table.add_column("\nachieved", justify="right", no_wrap=True)
    table.add_column("Blocks\ncomputed", justify="right", no_wrap=True)
    for group in groups:
        first, site = group[0], group[0].entry.site
        plan = Text(SHORT[first.outcome], style=STYLES[first.outcome])
        if first.outcome is Outcome.SPARSE:
            plan.append(f"\n{first.plan_words}")
        if first.kernel is not None:
            plan.append(f"\n{first.kernel} kernel")
        table.add_row(
            index_ranges([s.entry.site.index for s in group]) + (f"\nx{len(group)}" if len(group) > 1 else ""),
            f"{site.spelling}, {site.phase}\n{site.q_len} x {site.kv_len}\n{_heads(site)}",
            "not recognized" if site.mask is None else str(site.mask),
            plan,
            "-" if first.density_asked is None else f"{first.density_asked:.3f}",
            _span([s.density_achieved for s in group]),
            _blocks(group),
        )
    return table


def fold_sites(sites: Iterable[SiteReport]) -> list[tuple[SiteReport, ...]]:
    """Groups of sites that differ only in layer and in what was counted, in the order of each group's first site."""
    groups: dict[tuple[object, ...], list[SiteReport]] = {}
    for report in sites:
        site, entry = report.entry.site, report.entry
        shape = (site.q_len, site.kv_len, site.heads, site.kv_heads, site.head_dim, site.v_head_dim, site.dtype)
        what = (site.spelling, site.phase, site.device, site.mask)
        plan = (str(entry.budget), without_number(entry.reason), entry.rewritten, report.density_asked)
        ran = (report.rows, report.kernel)
        groups.setdefault((*shape, *what, *plan, *ran), []).append(report)
    return [tuple(group) for group in groups.values()]


def index_ranges(indices: Sequence[int]) -> str:
    """``0-31``, ``0,2,..,30`` (every second), ``0-3,7``."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    if len(runs) > 2 and all(len(r) == 1 for r in runs):
        step = runs[1][0] - runs[0][0]
        if all(b[0] - a[0] == step for a, b in itertools.pairwise(runs)):
            return f"{runs[0][0]},{runs[1][0]},..,{runs[-1][0]}"
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _span(values: Sequence[float | None]) -> str:
    ran = [v for v in values if v is not None]
    if not ran:
        return "-"
    low, high = f"{min(ran):.3f}", f"{max(ran):.3f}"
    return low if low == high else f"{low}-{high}"


def _blocks(group: Sequence[SiteReport]) -> str:
    visible = sum(s.blocks_visible for s in group)
    if not visible:
        return "-"
    return f"{_count(sum(s.blocks_computed for s in group))}\nof {_count(visible)}"


def _count(number: int) -> str:
    """Three significant digits with a decimal suffix: 950, 12.3k, 4.56M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= limit:
            return f"{number / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return str(number)


def _dense_reasons(groups: Iterable[Sequence[SiteReport]]) -> list[str]:
    return [
        f"{_site_names(group)}: {group[0].entry.reason}"
        for group in groups
        if group[0].entry.reason and group[0].outcome is not Outcome.DECODE
    ]


def _row_budgets(groups: Iterable[Sequence[SiteReport]]) -> list[str]:
    """Per group of sites the cap, then what the rows compute, rows of one class together."""
    lines = []
    for group in groups:
        if not (rows := group[0].rows):
            continue
        kinds: dict[RowReport, list[int]] = {}
        for number, row in enumerate(rows):
            kinds.setdefault(row, []).append(number)
        cap = decode_rows(str(group[0].entry.budget.params["table"])).cap
        parts = [f"{_site_names(group)}: cap {cap}"]
        for row, numbers in kinds.items():
            budget = "every visible block" if row.budget == "dense" else row.budget
            why = " (its own method differs)" if row.replaced else ""
            noun = "row" if len(numbers) == 1 else "rows"
            parts.append(f"{noun} {index_ranges(numbers)} {row.task}: {budget}, density {row.density:.3f}{why}")
        lines.append("; ".join(parts))
    return lines


def _site_names(group: Sequence[SiteReport]) -> str:
    indices = [s.entry.site.index for s in group]
    return f"site {indices[0]}" if len(group) == 1 else f"sites {index_ranges(indices)} (x{len(group)})"


def _refusals(refused: Iterable[Skip]) -> list[str]:
    folded: dict[str, list[Skip]] = {}
    for skip in refused:
        folded.setdefault(without_number(skip.reason), []).append(skip)
    return [
        (f"{skips[0].reason}" if len(skips) == 1 else f"x{len(skips)}, for instance: {skips[0].reason}")
        + (f" [{_where(skips[0])}]" if skips[0].nodes else "")
        for skips in folded.values()
    ]


def _where(skip: Skip) -> str:
    """The module and the nodes, which are named after variables in its code."""
    return (f"module {skip.module}: " if skip.module else "") + ", ".join(skip.nodes)


def _near_misses(sites: Iterable[SiteReport]) -> list[str]:
    return [f"site {s.entry.site.index}: {miss.reason}" for s in sites for miss in s.near_misses]


def _bullets(title: str, lines: Sequence[str]) -> list[RenderableType]:
    if not lines:
        return []
    head: list[RenderableType] = [Text(f"  {title}:")] if title else []
    # Text objects, not strings: a reason may hold brackets, which rich would read as markup.
    return head + [Padding(_hanging(line), (0, 0, 0, 4 if title else 2)) for line in lines]


def _hanging(line: str) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column()
    grid.add_column(overflow="fold")
    grid.add_row("-", Text(line))
    return grid


def _heads(site: AttentionSite) -> str:
    heads = f"GQA {site.heads}/{site.kv_heads}" if site.grouped else f"{site.heads} heads"
    dim = str(site.head_dim) if site.head_dim == site.v_head_dim else f"{site.head_dim}/{site.v_head_dim}"
    return f"{heads}, d {dim}, {_dtype(site.dtype)}"


def _dtype(dtype: str) -> str:
    name = dtype.removeprefix("torch.")
    return _DTYPES.get(name, name)


def _module(site: AttentionSite) -> str:
    return f"{site.module or 'unknown module'}, node {site.name}"
