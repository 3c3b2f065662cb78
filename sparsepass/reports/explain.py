"""``explain``: run a model once and say what happened at every attention site."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsepass.graph import torch_private
from sparsepass.methods import encode_budget, make_method
from sparsepass.methods.rows import decode_rows
from sparsepass.pipeline import backend
from sparsepass.planning import options as names
from sparsepass.planning.site import budget_text
from sparsepass.policies.policy import Policy
from sparsepass.reports.compiled_inside import is_compiled
from sparsepass.reports.draw_graph import DrawNode
from sparsepass.reports.report import GraphReport, Outcome, Report, RowReport, SiteReport
from sparsepass.request import hints
from sparsepass.rewriting import record
from sparsepass.rewriting.compiled import CompiledGraph
from sparsepass.rewriting.counters import Counts
from sparsepass.types import BY_LENGTH, BY_ROW, Phase, Plan, PlanEntry

NOT_USED = (
    "policy= and options= of explain were not used: what was called is compiled already, or compiles a part of itself, "
    "and ran under its own."
)
NO_INDUCTOR = "Run without Inductor: times and peak memory are those of the rewritten graph, unfused."


def explain(
    target: Callable[..., Any],
    *args: Any,
    task: hints.Hints = None,
    policy: str | Path | Policy | None = None,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Call ``target(*args, **kwargs)`` once, without gradients, and report every attention site.

    ``target`` is a model, a function, or something that is compiled already (by ``torch.compile(...,
    backend="sparsepass")`` or ``model.compile(...)``), whole or in parts such as single layers: it then runs as it is,
    under its own policy and options. A model or function in which nothing is compiled is compiled for this one call,
    without Inductor. A method such as ``model.generate`` runs as it is: if nothing in it is compiled, the report says
    so. ``task``: hint in force during the call, or a list of one per row of the batch. ``options``: as for
    ``torch.compile``. Raises ``OptionError``, ``PolicyError`` or ``HintError`` for what is not accepted.
    """
    runnable, notes = _prepare(target, policy, options)
    breaks = torch_private.graph_breaks()
    with record.recording() as recording, _PeakMemory() as peak, torch.no_grad():
        if task is None:
            runnable(*args, **kwargs)
        else:
            with hints.task(task):
                runnable(*args, **kwargs)
    graphs = tuple(
        graph_report(index, graph, before, runs)
        for index, (graph, before, runs) in enumerate(
            zip(recording.ran, recording.before, recording.runs_before, strict=True)
        )
    )
    if graphs and not any(graph.sites for graph in graphs):
        notes.insert(0, _no_site(recording.ran, torch_private.graph_breaks() - breaks))
    return Report(
        graphs=graphs,
        notes=tuple(note for note in notes if graphs or note is NOT_USED),
        peak_memory_bytes=peak.value,
        device=peak.device_name,
        versions=versions(),
    )


def _prepare(
    target: Callable[..., Any], policy: str | Path | Policy | None, options: dict[str, Any] | None
) -> tuple[Callable[..., Any], list[str]]:
    """What to call, and what the report has to say of that."""
    chosen = {names.INDUCTOR: False, **(options or {})}
    if policy is not None:
        chosen[names.POLICY] = policy
    names.parse(None, chosen)  # a wrong one is an error here, not inside a compilation
    if is_compiled(target) or _is_other_method(target):
        return target, [NOT_USED] if policy is not None or options else []
    notes = [] if chosen[names.INDUCTOR] else [NO_INDUCTOR]
    return torch.compile(target, backend=functools.partial(backend, options=chosen)), notes


def _no_site(graphs: Sequence[CompiledGraph], breaks: Counter[str]) -> str:
    """Why nothing was made sparse, though the backend was called, in one line."""
    reasons = []
    if any(graph.findings.refused for graph in graphs):
        reasons.append("what looks like attention is listed as not matched")
    elif inside := list(dict.fromkeys(g.elsewhere.module for g in graphs if g.elsewhere and g.elsewhere.module)):
        reasons.append(f"parts of {', '.join(inside[:3])} are in the graphs, but the attention itself is not")
    if breaks:
        reasons.append(f"Dynamo broke the graph, for instance: {next(iter(breaks))}")
    why = "; ".join(reasons) or "they hold no softmax of scores and no call of an attention function"
    return f"No attention was matched in what was compiled, so nothing is sparse: {why}."


def _is_other_method(target: Callable[..., Any]) -> bool:
    """A bound method of a module other than forward, such as ``generate``: run as it is, never compiled whole."""
    return isinstance(getattr(target, "__self__", None), nn.Module) and getattr(target, "__name__", "") != "forward"


def graph_report(index: int, graph: CompiledGraph, before: dict[int, Counts], runs_before: int = 0) -> GraphReport:
    """Report on one compiled graph; counts are those added since ``before``."""
    after = graph.counts()
    plan = graph.plan.current
    sites = []
    for entry in plan.entries:
        number = entry.site.index
        ran = after[number] - before.get(number, Counts())
        sites.append(_site_report(entry, ran, _rows(graph, entry), graph.kernel(number) if ran.launches else None))
    notes = []
    if graph.plan.registry_key is None and sites:
        why = "every task class gets the same plan" if graph.findings.prefill else "decode sites stay dense"
        notes.append(f"No hint guard: {why}.")
    if graph.slots is not None and not graph.slots.counted:
        notes.append("Nothing was counted here: the table of counters is full of graphs that are still in use.")
    notes += [*_layer_notes(graph), *graph.measurements]
    return GraphReport(
        index=index,
        name=f"graph {index}",
        task=_task_text(graph),
        bucket=_bucket_text(plan),
        plan_key=plan.key,
        guards=graph.guards,
        sites=tuple(sites),
        refused=graph.findings.refused,
        decode_sites=sum(1 for found in graph.findings.sites if found.site.phase is Phase.DECODE),
        runs=graph.runs - runs_before,
        compile_seconds=graph.compile_seconds,
        notes=tuple(notes),
        nodes=draw_nodes(graph),
        rows=tuple(map(str, graph.rows)) if graph.rows is not None and isinstance(graph.plan.task, tuple) else (),
    )


def _layer_notes(graph: CompiledGraph) -> list[str]:
    """Where a policy has budgets by layer, the sites whose layer is not known."""
    unknown = [str(f.site.index) for f in graph.findings.prefill if f.layer is None]
    if not unknown or len(graph.settings.policy.layer_starts) == 1:
        return []
    sites = f"site {unknown[0]}" if len(unknown) == 1 else f"sites {', '.join(unknown)}"
    return [f"The layer of {sites} is unknown: the policy's most cautious budget of all layers holds there."]


def _task_text(graph: CompiledGraph) -> str:
    if graph.plan.registry_key is None:
        return "any"
    mixed = isinstance(graph.plan.task, tuple) and graph.rows is not None
    return hints.hint_words(graph.rows if mixed and graph.rows is not None else graph.plan.task)


def _bucket_text(plan: Plan) -> str:
    if plan.bucket is not None:
        return str(plan.bucket)
    by_length = any(entry.budget.method == BY_LENGTH for entry in plan.entries)
    return "decided at run time" if by_length else "any"


def _rows(graph: CompiledGraph, entry: PlanEntry) -> tuple[RowReport, ...]:
    """What each row of the last call computes at a site whose budgets differ by row."""
    if entry.budget.method != BY_ROW:
        return ()
    found = graph.findings.sites[entry.site.index]
    rows = graph.rows if found.hint is None else hints.parse_hint_text(found.hint)
    shared = decode_rows(budget_text(entry.budget))
    replaced = {one.task for one in shared.classes if one.replaced}
    length = entry.site.kv_len if isinstance(entry.site.kv_len, int) else None
    return tuple(
        RowReport(str(task), encode_budget(shared.budget(task)), shared.row_density(task, length), task in replaced)
        for task in (rows if isinstance(rows, tuple) else ())
    )


def _site_report(
    entry: PlanEntry, ran: Counts, rows: tuple[RowReport, ...] = (), kernel: str | None = None
) -> SiteReport:
    asked = sum(row.density for row in rows) / len(rows) if rows else None
    if not entry.budget.dense and entry.budget.method not in (BY_LENGTH, BY_ROW):
        method, length = make_method(entry.budget), entry.site.kv_len
        asked = method.density_at(length) if isinstance(length, int) else method.mean_density
    return SiteReport(
        entry=entry,
        density_asked=asked,
        density_achieved=ran.density,
        blocks_computed=ran.computed,
        blocks_visible=ran.visible,
        rows=rows,
        kernel=kernel,
    )


def draw_nodes(graph: CompiledGraph) -> tuple[DrawNode, ...]:
    """The captured graph as records for ``sparsepass.reports.draw``, its attention sites marked."""
    kinds: dict[str, str] = {skip.nodes[0]: Outcome.REFUSED for skip in graph.findings.refused if skip.nodes}
    labels = {}
    for entry in graph.plan.current.entries:
        kinds[entry.site.name] = SiteReport(entry, None, None, 0, 0).outcome
        labels[entry.site.name] = str(entry.budget)
    return tuple(
        DrawNode(
            name=node.name,
            inputs=tuple(used.name for used in node.all_input_nodes),
            kind=kinds.get(node.name, "op"),
            label=labels.get(node.name, ""),
        )
        for node in graph.captured.graph.nodes
    )


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    held = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "sparsepass"):
        try:
            held[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return held


class _PeakMemory:
    """Peak memory of a block: of all CUDA devices, or the process's peak resident set where there is none."""

    value: int | None = None
    device_name: str = ""

    def __enter__(self) -> _PeakMemory:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            self.device_name = torch.cuda.get_device_name()
            for device in self._devices():
                torch.cuda.reset_peak_memory_stats(device)
        else:
            self.device_name = platform.processor() or platform.machine()
            _reset_resident_peak()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.cuda:
            self.value = sum(torch.cuda.max_memory_allocated(device) for device in self._devices())
        else:
            self.value = _resident_peak()

    def _devices(self) -> Iterable[int]:
        return range(torch.cuda.device_count())


def _reset_resident_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls to what is resident now
    except OSError:
        return


def _resident_peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
