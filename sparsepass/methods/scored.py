"""What the methods share whose selection is a score and a rule (``kernels/rules.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sparsepass.methods.base import Method

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.dispatch import BlockLists, Visible
    from sparsepass.kernels.rules import Rule


class ScoredMethod(Method):
    """Base of methods that keep what scores well enough, however much that is.

    ``expected_density``: the share of the visible area that the method was measured to compute on the inputs meant.
    Whether sparse pays is decided by it; it changes nothing in what is computed.
    """

    if TYPE_CHECKING:
        block: int | None
        expected_density: float

    def rule(self) -> Rule:
        """This method's score and rule."""
        raise NotImplementedError

    @property
    def max_density(self) -> float:
        return 1.0

    @property
    def mean_density(self) -> float:
        return self.expected_density

    @classmethod
    def cap(cls, methods: Sequence[Method]) -> Method:
        """As for every method; of expected densities the greatest."""
        most = max((method.mean_density for method in methods), default=1.0)
        if "expected_density" in cls.__annotations__:
            methods = [
                replace(method, expected_density=most) if isinstance(method, cls) else method  # type: ignore[type-var]
                for method in methods
            ]
        return super().cap(methods)

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
        from sparsepass.kernels.dispatch_select import select_scored

        return select_scored(
            query,
            key,
            scale=scale,
            visible=visible,
            rule=self.rule(),
            dial=dial,
            block=self.block,
            counter=counter,
        )
