"""The ``torch.compile`` backend: capture, find sites, plan, guard, rewrite, verify, Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import value
from sparsepass.host import compile_time
from sparsepass.host.versions import warn_of_untested
from sparsepass.planning import options as options_module
from sparsepass.planning.layer_numbers import number_layers
from sparsepass.planning.plan import GraphPlan, budget_text, plan_graph
from sparsepass.planning.watched import watched_graph
from sparsepass.policies.fingerprint import warn_of_sites
from sparsepass.rewriting import counters, record
from sparsepass.rewriting.call_sizes import CallSizes
from sparsepass.rewriting.compiled import AddedInputs, CompiledGraph
from sparsepass.rewriting.inline import written_out
from sparsepass.rewriting.ops import prepare
from sparsepass.rewriting.rewriter import Rewriter
from sparsepass.rewriting.row_inputs import RowSource
from sparsepass.rewriting.verify import verify
from sparsepass.sites import Findings, find_nested, find_sites
from sparsepass.types import PlanEntry

log = logging.getLogger("sparsepass")


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a captured graph with its attention rewritten; everything else goes to Inductor.

    Use it by name (``torch.compile(model, backend="sparsepass")``) once installed, or as
    ``backend=sparsepass.backend``. ``mode`` is Inductor's; ``options`` are Inductor's own and those under
    ``sparsepass.``: ``sparsepass.policy``, ``sparsepass.task``, ``sparsepass.always_sparse``, ``sparsepass.inductor``.
    Raises ``OptionError``, ``PolicyError`` or ``HintError`` for what is not accepted.
    """
    started = compile_time.clock()
    warn_of_untested()
    settings, patches, use_inductor = options_module.parse(mode, options)
    torch_private.raise_recompile_limit()
    torch_private.count_compile()
    if options_module.disabled():
        log.info("%s is set: compiling with plain Inductor", options_module.DISABLE_VARIABLE)
        return torch_private.inductor(gm, example_inputs, patches)

    gm, captured = written_out(gm), gm
    findings = find_sites(gm.graph)
    findings = replace(findings, refused=findings.refused + find_nested(gm))
    findings, layers = number_layers(findings, settings.policy)
    warn_of_sites(settings.policy, [found.site for found in findings.prefill])
    plan = plan_graph(findings, settings)
    rewritten, slots, inputs, sites = _rewrite(gm, findings, plan)
    watched = watched_graph(sites, findings, plan, settings) if sites else None
    if rewritten is gm:
        rewritten = captured
    examples = [*example_inputs, *inputs.examples]
    compiled = torch_private.inductor(rewritten, examples, patches) if use_inductor else rewritten.forward
    hint_guard = None if plan.registry_key is None else torch_private.install_plan_guard(plan.registry_key)
    sizes = CallSizes.of(gm.graph, plan, example_inputs)
    graph = CompiledGraph(
        compiled, gm, findings, plan, settings, slots, hint_guard, inputs.sources, watched, layers, sizes
    )
    graph.compile_seconds = compile_time.clock() - started
    compile_time.add(graph.compile_seconds)
    record.compiled(graph)
    log.info("%s", graph.summary())
    return graph


def _rewrite(
    gm: fx.GraphModule, findings: Findings, plan: GraphPlan
) -> tuple[fx.GraphModule, counters.Slots | None, AddedInputs, tuple[int, ...]]:
    """A rewritten clone of ``gm`` (or ``gm`` itself where nothing changes), the counter slots of its sites, the
    inputs that were added, and the sites that sample rows, each of which adds an output at the end."""
    entries = plan.current.entries
    if not any(entry.rewritten for entry in entries):
        return gm, None, AddedInputs(), ()
    for found, entry in zip(findings.sites, entries, strict=True):
        if not entry.budget.dense:
            heads = torch_private.hint_value(found.query_shape[1])
            prepare(budget_text(entry.budget), heads, torch.device(entry.site.device))
    slots = counters.reserve(_content(gm, findings, entries), len(entries))
    twin, copies = torch_private.clone(gm)
    rewriter = Rewriter(twin.graph, copies, slots.first, sampled=plan.sampled)
    expected = {found.site.name: value(found.attention.output) for found in findings.sites}
    rewriter.apply(findings.sites, entries)
    verify(gm.graph, twin.graph, rewriter.replaced, expected, [node.name for node in rewriter.rows.values()])
    twin.recompile()
    sources = [
        RowSource(torch.device(given.device), torch_private.size_reader(gm.graph, given.size), given.own)
        for given in rewriter.rows
    ]
    added = AddedInputs(tuple(value(node) for node in rewriter.rows.values()), tuple(sources))
    return twin, slots, added, tuple(rewriter.masses)


def _content(gm: fx.GraphModule, findings: Findings, entries: Sequence[PlanEntry]) -> str:
    """What tells a rewritten graph from others: its code, and each site with its shapes, dtype, device and budget."""
    sites = [
        f"{entry.site} {found.query_shape} {found.key_shape} {budget_text(entry.budget)}"
        for found, entry in zip(findings.sites, entries, strict=True)
    ]
    return "\n".join([gm.code, *sites])
