"""One model, many budgets: a backend that rewrites each captured graph for all of them and runs the one in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparsepass import options as names
from sparsepass.pipeline import CompiledGraph, backend
from sparsepass.policy import Policy
from sparsepass.policy_rules import Rule
from sparsepass.types import Budget


class BudgetSwitch:
    """A ``torch.compile`` backend. ``active`` is the budget that calls run under, None for exact attention.

    A graph is captured once and rewritten for every budget: the plan ignores where sparse pays, since it is the
    selection that is calibrated. Decode graphs are the same under all of them. Without Inductor unless ``inductor``.
    """

    def __init__(self, budgets: Sequence[Budget], *, inductor: bool = False) -> None:
        self.budgets = tuple(dict.fromkeys(budgets))
        self.active: Budget | None = None
        self.sparse_graphs = 0
        """Captured graphs that have sparse attention under some budget."""
        self._options = {names.INDUCTOR: inductor, names.ALWAYS_SPARSE: True}

    def __call__(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        dense = self._compile(gm, examples, Policy("dense"))
        if not isinstance(dense, CompiledGraph) or not dense.findings.prefill:
            return dense
        made: dict[Budget | None, Any] = {None: dense}
        for budget in self.budgets:
            made[budget] = self._compile(gm, examples, Policy("one budget", (Rule(None, budget),)))
        self.sparse_graphs += any(_is_sparse(graph) for graph in made.values())

        def call(*args: Any) -> Any:
            return made[self.active](*args)

        return call

    def _compile(self, gm: fx.GraphModule, examples: Sequence[Any], policy: Policy) -> Any:
        return backend(gm, examples, options={**self._options, names.POLICY: policy})


def _is_sparse(graph: Any) -> bool:
    return isinstance(graph, CompiledGraph) and any(not entry.budget.dense for entry in graph.plan.current.entries)
