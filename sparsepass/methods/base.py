"""What every selection method has: its name, its parameters as a budget and as text, and how it selects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from sparsepass.errors import PolicyError
from sparsepass.types import Budget

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.dispatch import BlockLists, Visible

BLOCKS = (64, 128)
"""Block sizes, in tokens, that block lists may have."""


class Method:
    """Base of every selection method. Subclasses are frozen dataclasses; override what the defaults get wrong."""

    name: ClassVar[str]

    @property
    def max_density(self) -> float:
        """The largest share of the visible area any head computes: decides buffer sizes."""
        raise NotImplementedError

    @property
    def mean_density(self) -> float:
        """The share of the visible area computed over all heads: what the time follows."""
        return self.max_density

    def for_head(self, head: int) -> Method:
        """This method as query head ``head`` sees it."""
        return self

    def uniform(self) -> Method:
        """This method with every head given what the costliest head has."""
        return self

    def prepare(self, device: torch.device) -> None:
        """Put on the device what ``select`` needs there. Called at compile time: a CUDA graph may not copy."""

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scale: float,
        visible: Visible,
        counter: torch.Tensor | None,
    ) -> BlockLists:
        """Block lists for query [B, H, Sq, D] and key [B, Hkv, Skv, D]: the method itself. No host synchronization."""
        raise NotImplementedError(f"{self.name} selects no blocks")

    def budget(self) -> Budget:
        """This method as a budget, in its one canonical form: parameters at their default are left out."""
        params = {
            spec.name: value
            for spec in parameters(type(self))
            if (value := getattr(self, spec.name)) != spec.default or spec.default is MISSING
        }
        return Budget(self.name, params)

    def text(self) -> str:
        """This method as one line, for instance ``pooled_topk(density=0.1)``; equal text means an equal method."""
        budget = self.budget()
        inner = ", ".join(f"{name}={value!r}" for name, value in budget.params.items())
        return f"{budget.method}({inner})" if inner else budget.method

    @classmethod
    def merge_heads(cls, heads: Sequence[Method]) -> Method:
        """One method for a whole site from one per query head. Raises ``PolicyError`` if this one cannot differ."""
        if len(set(heads)) == 1:
            return heads[0]
        raise cannot_differ(cls, heads)


def parameters(method: type[Method]) -> tuple[Field[Any], ...]:
    """A method's parameters: the fields of its dataclass."""
    return fields(method)  # type: ignore[arg-type]  # every registered method is a dataclass


def share(method: str, parameter: str, value: Any) -> float:
    """``value`` as a float in (0, 1]. Raises ``PolicyError`` that names the method and the parameter."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not 0 < value <= 1:
        raise PolicyError(f"{method} {parameter} is {value!r}; accepted is a number above 0 and at most 1.")
    return float(value)


def cannot_differ(method: type[Method], heads: Sequence[Method]) -> PolicyError:
    """The error for a layer whose heads have methods that cannot run together."""
    given = ", ".join(sorted({head.text() for head in heads}))
    return PolicyError(f"The heads of one layer have budgets that {method.name} cannot run together: {given}.")
