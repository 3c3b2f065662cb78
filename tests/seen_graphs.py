"""Compile with the backend, forced to the sparse kernel, and look at the graphs that it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

import sparsepass
from sparsepass.pipeline import backend
from sparsepass.rewriting.compiled import CompiledGraph

POLICY = sparsepass.Policy.from_json(
    {"version": 1, "rules": [{"task": "*", "budget": {"method": "pooled_topk", "density": 1.0, "block": 64}}]}
)
"""Full lists: what the sparse kernel gives equals dense attention."""


class Seen:
    """``function`` compiled; ``graphs`` are those of the calls so far."""

    def __init__(self, function: Callable[..., Any], inductor: bool = False, mode: str | None = None) -> None:
        self.graphs: list[CompiledGraph] = []
        self.options: dict[str, Any] = {
            "sparsepass.policy": POLICY,
            "sparsepass.always_sparse": True,
            "sparsepass.inductor": inductor,
        }
        torch._dynamo.reset()
        self.mode = mode
        self.compiled = torch.compile(function, backend=self._backend)

    def _backend(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graph = backend(gm, examples, mode=self.mode, options=self.options)
        if isinstance(graph, CompiledGraph):
            self.graphs.append(graph)
        return graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with sparsepass.task("multi_hop"):
            return self.compiled(*args, **kwargs)

    @property
    def sparse(self) -> int:
        """Sites that go through the sparse kernel."""
        entries = [entry for graph in self.graphs for entry in graph.plan.current.entries]
        return sum(not entry.budget.dense for entry in entries)

    @property
    def reasons(self) -> str:
        """Why other attention was left alone, all reasons as one text."""
        refused = [str(skip.reason) for graph in self.graphs for skip in graph.findings.refused]
        return " ".join(refused + [e.reason or "" for graph in self.graphs for e in graph.plan.current.entries])

    @property
    def nodes(self) -> list[fx.Node]:
        """Of the rewritten graphs, where no compiler took them."""
        return [node for graph in self.graphs for node in graph.compiled.__self__.graph.nodes]  # type: ignore[attr-defined]
