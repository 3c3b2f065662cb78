"""One model in one phase: attention counted in the eager run, then compiled at two densities and counted again.

A graph is captured once and rewritten twice: at density 1 with full lists, where the output must equal eager, and at
density 0.5, where fewer blocks must be computed than the mask has. Neither goes through Inductor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sparsepass.graph import torch_private
from sparsepass.measure.coverage.count import SHORTEST, AttentionCounter, anchors
from sparsepass.measure.coverage.hidden import HiddenRowsGiveZero
from sparsepass.measure.coverage.inputs import Call
from sparsepass.measure.coverage.reasons import (
    CAPTURED_LESS,
    CAPTURED_MORE,
    CAPTURED_OTHERWISE,
    HIDDEN_ROWS,
    NOT_SEEN,
    NOTHING_LEFT_OUT,
    general,
)
from sparsepass.measure.coverage.special import HIDDEN, INTERMEDIATE, VOCABULARY
from sparsepass.pipeline import backend
from sparsepass.planning import options as names
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.rewriting.compiled import CompiledGraph
from sparsepass.rewriting.counters import Counts
from sparsepass.sites import TOO_FEW
from sparsepass.types import Budget
from sparsepass.types import Phase as SitePhase

Record = dict[str, Any]
FULL, HALF = 1.0, 0.5
BLOCK = 64
CLOSE = 2e-4
"""Largest difference from eager at density 1, over the largest value: rounding of two fp32 models."""


def _policy(density: float) -> Policy:
    budget = Budget("pooled_topk", {"density": density, "block": BLOCK})
    return Policy(f"coverage {density}", (Rule(None, budget),))


class TwoBudgets:
    """A backend that rewrites each captured graph at both densities; ``active`` says which one runs."""

    def __init__(self, fused: bool = False) -> None:
        self.active = 0
        self.graphs: list[tuple[Any, Any]] = []
        self.anchors = 0
        """Softmax and SDPA nodes in the graphs that ran in the last call, each as often as it ran."""
        self.fused: int | None = 0 if fused else None
        """What Inductor's own fuse_attention replaces; None where that is not asked for, or fails."""

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        made = []
        for density in (FULL, HALF):
            options = {names.INDUCTOR: False, names.ALWAYS_SPARSE: True, names.POLICY: _policy(density)}
            made.append(backend(gm, examples, options=options))
        self.graphs.append((made[0], made[1]))
        if self.fused is not None:
            try:
                self.fused += torch_private.fused_attention(gm, examples)
            except Exception:  # Inductor's matter: the measurement goes on
                self.fused = None
        inside = anchors(gm)

        def call(*args: Any) -> Any:
            self.anchors += inside
            return made[self.active](*args)

        return call

    def compiled(self) -> list[CompiledGraph]:
        """The graphs at the density in force that hold attention."""
        made = [graph[self.active] for graph in self.graphs]
        return [one for one in made if isinstance(one, CompiledGraph) and (one.findings.sites or one.findings.refused)]


def measure(model: Any, call: Call, *, decode: bool = False, fused: bool = False) -> Record:
    """The record of one model and one call. Raises what the model raises when it runs uncompiled."""
    began = time.monotonic()
    record: Record = {}
    with torch.no_grad():
        counter = AttentionCounter((HIDDEN, INTERMEDIATE, VOCABULARY))
        args, kwargs = call.arguments()
        torch.manual_seed(0)
        with counter:
            wanted = model(*args, **kwargs)
        record["sites"] = sum(counter.sites.values())
        record["called"] = dict(counter.sites)
        small = sum(count for (_, rows, keys), count in counter.shapes.items() if rows == 1 or keys <= BLOCK)
        if small and not decode:
            record["small"] = small
        if not record["sites"]:  # a state-space model, say: nothing to rewrite, and slow to capture
            return record | {"matched": 0, "rewritten": 0, "reasons": {}, "equal": True, "difference": 0.0}
        record["eager_seconds"] = round(time.monotonic() - began, 2)
        torch_private.forget()
        both = TwoBudgets(fused)
        compiled = torch.compile(model, backend=both, dynamic=False)
        try:
            got, _ = _run(compiled, both, call)
            record |= _difference(wanted, got, call.real)
            if not record.get("equal", True) and call.real is not None:
                args, kwargs = call.arguments()
                torch.manual_seed(0)
                with HiddenRowsGiveZero():
                    again = _difference(model(*args, **kwargs), got, call.real)
                if again.get("equal"):
                    record |= again | {"note": HIDDEN_ROWS}
            if not decode:
                both.active = 1
                _, before = _run(compiled, both, call)
                record |= _sites(both, before, record["sites"])
            else:
                record |= _sites(both, {}, record["sites"], decode=True)
            if not record.get("equal", True):
                record |= _captured(model, call, got)
        finally:
            torch_private.forget()
        record["graphs"] = len(both.graphs)
        if both.fused is not None:
            record["fused"] = both.fused
    record["seconds"] = round(time.monotonic() - began, 2)
    return record


def _captured(model: Any, call: Call, got: Any) -> Record:
    """A note if the output is that of the graphs as they were captured: then nothing that is ours changed it.

    Some models look at whether they are traced: in transformers 5.17 two leave out the causal mask when they are not.
    """
    torch_private.forget()
    args, kwargs = call.arguments()
    torch.manual_seed(0)
    plain: Any = torch.compile(model, backend="eager", dynamic=False)
    again = _difference(plain(*args, **kwargs), got, call.real)
    return again | {"note": CAPTURED_OTHERWISE} if again.get("equal") else {}


def _run(compiled: Any, both: TwoBudgets, call: Call) -> tuple[Any, dict[int, tuple[int, dict[int, Counts]]]]:
    """The output, and how often each graph had run and what it had counted before."""
    before = {id(graph): (graph.runs, graph.counts()) for graph in both.compiled()}
    args, kwargs = call.arguments()
    both.anchors = 0
    torch.manual_seed(0)
    return compiled(*args, **kwargs), before


def _sites(
    both: TwoBudgets, before: dict[int, tuple[int, dict[int, Counts]]], expected: int, decode: bool = False
) -> Record:
    """Executions matched, rewritten, and not, with the reasons of the latter."""
    matched = rewritten = 0
    computed = visible = 0
    reasons: Counter[str] = Counter()
    spellings: Counter[str] = Counter()
    seen = 0
    for graph in both.compiled():
        runs_before, counts_before = before.get(id(graph), (0, {}))
        runs = graph.runs - runs_before
        after = graph.counts()
        for entry in graph.plan.current.entries:
            site = entry.site
            if isinstance(site.kv_len, int) and site.kv_len < SHORTEST:
                continue
            matched += runs
            seen += runs
            spellings[site.spelling] += runs
            if decode and site.phase is SitePhase.DECODE:
                continue
            ran = after[site.index] - counts_before.get(site.index, Counts())
            if ran.launches and ran.computed < ran.visible:
                rewritten += runs
                computed, visible = computed + ran.computed, visible + ran.visible
            elif ran.launches:
                reasons[NOTHING_LEFT_OUT] += runs
            else:
                reasons[general(entry.reason or "the rewritten site did not run")] += runs
        for skip in graph.findings.refused:
            if TOO_FEW in skip.reason:  # not counted in the uncompiled run either
                continue
            reasons[general(skip.reason)] += runs
            seen += runs
    unseen = max(min(both.anchors, expected) - seen, 0)
    if unseen:
        reasons[NOT_SEEN] += unseen
        seen += unseen
    if seen < expected:
        reasons[CAPTURED_LESS] += expected - seen
    record = {"matched": matched, "rewritten": rewritten, "spellings": dict(spellings), "reasons": dict(reasons)}
    if seen > expected:
        record["seen"] = CAPTURED_MORE.format(seen=seen, expected=expected)
    if visible:
        record["density"] = round(computed / visible, 3)
    return record


def _difference(wanted: Any, got: Any, real: Any) -> Record:
    """The largest difference over the largest value, of every output of the same shape; padding is left out."""
    worst, compared = 0.0, 0
    ours, theirs = _tensors(got), _tensors(wanted)
    if len(ours) != len(theirs):
        return {"error": f"the compiled model returns {len(ours)} tensors, the uncompiled one {len(theirs)}"}
    for mine, reference in zip(ours, theirs, strict=True):
        if mine.shape != reference.shape or not reference.numel():
            continue
        mine, reference = mine.double(), reference.double()
        if real is not None:
            if mine.shape[:2] != real.shape:
                continue
            mine, reference = mine[real], reference[real]
        finite = reference.isfinite()
        if not torch.equal(mine.isfinite(), finite):
            worst = float("inf")
        mine, reference = mine[finite], reference[finite]
        if reference.numel():
            compared += 1
            worst = max(worst, float((mine - reference).abs().max() / reference.abs().max().clamp_min(1e-6)))
    if not compared and not worst:
        return {"error": "no floating-point output to compare with the uncompiled model's"}
    return {"difference": float(f"{worst:.2g}"), "equal": worst <= CLOSE}


def _tensors(output: Any) -> list[torch.Tensor]:
    """Floating-point outputs; of a model's output the logits and states, not its caches."""
    if hasattr(output, "to_tuple"):
        output = {name: output[name] for name in output if name in ("logits", "last_hidden_state", "pooler_output")}
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
