"""What a model is measured under: one budget at every layer, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsepass.methods import encode_budget
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Ranges
from sparsepass.types import DENSE, Budget, TaskClass


@dataclass(frozen=True, slots=True)
class Layered:
    """A budget for every layer, in order; ``None`` is dense. Heads differ by a budget's own ``head_densities``."""

    budgets: tuple[Budget | None, ...]

    def __str__(self) -> str:
        """For instance ``layers 0-1,3: a_shape(window=64); 2: dense``, the same for equal ones."""
        parts = [f"{ranges}: {encode_budget(budget or DENSE)}" for budget, ranges in self.groups()]
        return f"layers {'; '.join(parts)}"

    def groups(self) -> list[tuple[Budget | None, Ranges]]:
        """The different budgets, each with its layers, in the order of their first layers."""
        layers: dict[Budget | None, list[tuple[int, int | None]]] = {}
        for layer, budget in enumerate(self.budgets):
            layers.setdefault(budget, []).append((layer, layer))
        return [(budget, Ranges(tuple(spans))) for budget, spans in layers.items()]

    def replaced(self, layer: int, budget: Budget | None) -> Layered:
        """The same with another budget at a layer."""
        return Layered((*self.budgets[:layer], budget, *self.budgets[layer + 1 :]))


Setting = Budget | Layered
"""``None`` beside it is dense everywhere."""


def setting_text(setting: Setting | None) -> str:
    """One line; equal settings have equal lines."""
    if isinstance(setting, Layered):
        return str(setting)
    return encode_budget(setting or DENSE)


def layer_budget(setting: Setting | None, layer: int | None) -> Budget | None:
    """What a setting gives a layer; ``None`` is dense. A layer that is not known stays dense."""
    if isinstance(setting, Layered):
        return setting.budgets[layer] if layer is not None and layer < len(setting.budgets) else None
    return setting


def simplest(budgets: Sequence[Budget | None]) -> Setting | None:
    """Budgets by layer as one setting: a single budget where all are the same, ``None`` where all are dense."""
    return budgets[0] if len(set(budgets)) == 1 else Layered(tuple(budgets))


def policy_setting(policy: Policy, task: TaskClass, length: int, layers: int, heads: int) -> Setting | None:
    """What a policy gives a class at a length in a model of so many layers and query heads, whether it pays or not."""
    bucket = policy.bucket(length)
    budgets = [policy.site_budget(task, bucket, layer, heads) for layer in range(max(1, layers))]
    return simplest([None if budget.dense else budget for budget in budgets])
