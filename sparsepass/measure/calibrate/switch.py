"""One model, many settings: a backend that rewrites each captured graph once and asks at each call what to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparsepass.measure.calibrate.setting import Setting, layer_budget
from sparsepass.methods import encode_budget
from sparsepass.pipeline import backend
from sparsepass.planning import options as names
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.rewriting import counters
from sparsepass.rewriting.compiled import CompiledGraph
from sparsepass.rewriting.ops import SPARSE_ATTENTION, prepare
from sparsepass.rewriting.rewriter import drop_dead_masks
from sparsepass.types import EXACT, Budget

_BUDGET, _SLOT = 9, 10
"""Places of the budget's text and of the counter's slot among the arguments of the op."""

AFTER_CACHE = counters.CAPACITY - 1
"""Slot of what follows a cache: few rows, computed exactly, which say nothing of the share of a request computed."""

ANY = Budget("pooled_topk", {"density": 0.5})
"""What a graph is rewritten for: which sites can be sparse does not depend on the budget."""


class BudgetSwitch:
    """A ``torch.compile`` backend. ``active`` is the setting that calls run under, None for exact attention.

    A graph is captured once and rewritten twice, whatever the number of settings: densely, and with a sparse op that
    looks up its budget when it runs. The plan ignores where sparse pays, since it is the selection that is calibrated.
    What follows a cache is exact under all settings. Without Inductor, which would compile each budget anew. A layer
    that a setting leaves dense computes every block by the sparse kernel, so that the counters see it.
    """

    def __init__(self) -> None:
        self.active: Setting | None = None
        self.sparse_graphs = 0
        """Captured graphs that have sites which can be sparse."""

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        dense = _compile(gm, examples, Policy("dense"))
        if not isinstance(dense, CompiledGraph) or not dense.findings.prefill:
            return dense
        sparse = _compile(gm, examples, Policy("any", (Rule(None, ANY),)))
        if not isinstance(sparse, CompiledGraph) or all(entry.budget.dense for entry in sparse.plan.current.entries):
            return dense
        self.sparse_graphs += 1
        run = self._switched(sparse)
        exact = _without_dead_masks(dense)

        def call(*args: Any, kept: Any = (dense, sparse)) -> Any:  # what the guards and the sites' counts need
            return exact(*args) if self.active is None else run(*args)

        return call

    def _switched(self, graph: CompiledGraph) -> Callable[..., Any]:
        """The rewritten graph with every sparse op asking for its budget."""
        twin = _module(graph)
        assert graph.slots is not None  # it has sparse sites
        layers = {graph.slots.first + found.site.index: found.layer for found in graph.findings.sites}
        for node in twin.graph.find_nodes(op="call_function", target=SPARSE_ATTENTION):
            slot = int(node.args[_SLOT])  # type: ignore[arg-type]
            node.target = self._site(layers[slot])
        return _without_dead_masks(graph)

    def _site(self, layer: int | None) -> Callable[..., torch.Tensor]:
        prepared: set[str] = set()

        def switched_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            whole = query.shape[2] == args[0].shape[2]
            text = encode_budget((layer_budget(self.active, layer) if whole else None) or EXACT)
            if text not in prepared:
                prepare(text, query.shape[1], query.device)
                prepared.add(text)
            slot = args[_SLOT - 1] if whole else AFTER_CACHE
            return SPARSE_ATTENTION(query, *args[: _BUDGET - 1], text, slot, *args[_SLOT:], **kwargs)  # type: ignore[no-any-return]

        return switched_attention


def counted() -> counters.Counts:
    """What was computed so far, but for queries behind a cache. Waits for the devices."""
    devices = [torch.device("cpu"), *(torch.device("cuda", one) for one in range(torch.cuda.device_count()))]
    found = counters.total()
    for device in devices:
        found = found - counters.read(device, AFTER_CACHE)
    return found


def _compile(gm: fx.GraphModule, examples: Sequence[Any], policy: Policy) -> Any:
    return backend(gm, examples, options={names.INDUCTOR: False, names.ALWAYS_SPARSE: True, names.POLICY: policy})


def _module(graph: CompiledGraph) -> fx.GraphModule:
    """The module that a graph runs: without Inductor the rewritten copy itself."""
    module = getattr(graph.compiled, "__self__", None)
    assert isinstance(module, fx.GraphModule)  # compiled above, without Inductor
    return module


def _without_dead_masks(graph: CompiledGraph) -> Callable[..., Any]:
    """The graph's module without the masks that no site reads any more, which Inductor would have dropped: they grow
    with the square of the length."""
    module = _module(graph)
    if module is not graph.captured:
        drop_dead_masks(module.graph)
        module.recompile()
    return module.forward  # type: ignore[no-any-return]
