"""No selection, but block lists: exact attention where the block-sparse kernel is the faster way to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsepass.methods.base import Method

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.types import BlockLists, Visible


@dataclass(frozen=True, slots=True)
class Full(Method):
    """Everything visible, by the block-sparse kernel: as exact as ``dense``, and blocks that a mask hides are skipped.

    The pass takes it by itself for dense budgets, where it was measured to be faster than SDPA.
    """

    name: ClassVar[str] = "full"

    @property
    def max_density(self) -> float:
        return 1.0

    @property
    def computes_all(self) -> bool:
        return True

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scale: float,
        visible: Visible,
        counter: torch.Tensor | None,
        dial: torch.Tensor | None = None,
    ) -> BlockLists:
        from sparsepass.kernels.select.api import select_scored
        from sparsepass.kernels.select.rule import Rule

        everything = Rule("window", float(1 << 29), sink=0)  # more tokens than the kernels address
        return select_scored(query, key, scale=scale, visible=visible, rule=everything, block=None, counter=counter)
