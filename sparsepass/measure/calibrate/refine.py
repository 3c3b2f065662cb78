"""A budget by layer, and by head: where a class loses too much, often few layers are why. Those stay as they were.

Greedy. Each layer alone is made sparse; what loses too much alone stays. The others are made sparse together, or where
that loses too much one after the other, the one that lost least first. Then the same with the heads of the layers that
stayed, if asked for. What comes out is verified on held-out samples; where that fails the last change is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsepass.measure.calibrate.cell import Cell
from sparsepass.measure.calibrate.search import Search
from sparsepass.measure.calibrate.setting import Layered, Setting
from sparsepass.methods.pooled_topk import PooledTopK
from sparsepass.types import Budget

METHOD = "layers"
"""What cells that were refined have for a method."""

Refine = Literal["", "layers", "heads"]

SPARSEST_HEAD = 0.01
"""Density of a sparse head: its first and its last blocks, in effect."""


@dataclass
class Refinement:
    """One task at one length. ``base``: what layers have that are not made sparse; ``low``: what the others get."""

    search: Search
    layers: int
    heads: int
    base: Budget | None
    low: Budget

    def run(self, start: Setting | None, by_head: bool) -> Cell | None:
        """The cell of the sparsest setting found; ``None`` where no layer can be sparse.

        ``start``: what was found at a length nearby, tried first. A search of its own follows only where that is likely
        unsafe: where no setting can be told from dense, it would ask about every layer and head for nothing.
        """
        steps = self._from(start) if isinstance(start, Layered) else None
        if steps is None:
            steps = self._found(by_head)
        if not steps:
            return None
        self.search.budgets = steps
        return self.search.verify(0)

    def _from(self, start: Layered) -> list[Layered] | None:
        """The setting and denser ones, from the first that is likely safe; ``None`` if it is likely unsafe itself."""
        steps = [start, *self._way_back(start)]
        for place, step in enumerate(steps):
            if self.search.probe(step):
                return steps[place:]
            if place == 0 and self.search.trials[-1].low > self.search.goal.loss:
                return None
        return []

    def _found(self, by_head: bool) -> list[Layered]:
        """The sparsest setting that is likely safe, then denser ones, one change taken back after the other."""
        base = Layered((self.base,) * self.layers)
        taken = self._greedy(base, [_Change(layer, self.low) for layer in range(self.layers)])
        if not by_head:
            return taken
        now = taken[0] if taken else base
        finer: list[Layered] = []
        for layer in range(self.layers):
            if now.budgets[layer] == self.base:
                changes = [_Change(layer, self._without(head), head) for head in range(self.heads)]
                finer = self._greedy(now, changes) + finer
                now = finer[0] if finer else now
        third = -(-len(finer) // 3)
        return [*finer[:: max(1, third)], *taken]  # few are verified

    def _greedy(self, base: Layered, changes: Sequence[_Change]) -> list[Layered]:
        """Settings with more and more of the changes, the most first."""
        alone = []
        for change in changes:
            if self.search.probe(change.on(base)):
                alone.append((self.search.trials[-1].loss, change))
        order = [change for _, change in sorted(alone, key=lambda one: one[0])]
        steps = [base]
        for change in order:
            steps.append(change.on(steps[-1]))
        if len(order) < 2 or self.search.probe(steps[-1]):
            return steps[:0:-1]
        steps = [base, order[0].on(base)]
        for change in order[1:]:
            if self.search.probe(change.on(steps[-1])):
                steps.append(change.on(steps[-1]))
        return steps[:0:-1]

    def _without(self, head: int) -> Budget:
        densities = tuple(SPARSEST_HEAD if one == head else 1.0 for one in range(self.heads))
        block, last = self.low.params.get("block"), int(self.low.params.get("last", 0))
        return PooledTopK(max(densities), block, densities, last=last).budget()

    def _way_back(self, found: Layered) -> list[Layered]:
        """The same with sparse layers taken back, the last ones first."""
        steps = [found]
        for layer in reversed(range(self.layers)):
            if found.budgets[layer] == self.low:
                steps.append(steps[-1].replaced(layer, self.base))
        return steps[1:-1]


@dataclass(frozen=True)
class _Change:
    """A layer's new budget; with ``head``, of a head in it, beside those that were changed before."""

    layer: int
    budget: Budget
    head: int | None = None

    def on(self, setting: Layered) -> Layered:
        before = setting.budgets[self.layer]
        if self.head is None or before is None or "head_densities" not in before.params:
            return setting.replaced(self.layer, self.budget)
        mine = zip(before.params["head_densities"], self.budget.params["head_densities"], strict=True)
        densities = tuple(min(pair) for pair in mine)
        return setting.replaced(
            self.layer, Budget("pooled_topk", {**before.params, "density": max(densities), "head_densities": densities})
        )
