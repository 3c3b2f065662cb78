"""No selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsepass.methods.base import Method


@dataclass(frozen=True, slots=True)
class Dense(Method):
    """Everything visible, by the dense kernel."""

    name: ClassVar[str] = "dense"

    @property
    def max_density(self) -> float:
        return 1.0

    @property
    def computes_all(self) -> bool:
        return True
