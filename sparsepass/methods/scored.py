"""What the methods share whose selection is a score and a rule (``kernels/select/rule.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from sparsepass.methods import densities
from sparsepass.methods.base import Method, area_of_last

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.select.rule import Rule
    from sparsepass.kernels.types import BlockLists, Visible


class ScoredMethod(Method):
    """Base of methods that keep what scores well enough, however much that is.

    ``expected_density``: the share of the visible area that the method was measured to compute on the inputs meant;
    ``None``: that on structured inputs, by dial and length (``densities``). Whether sparse pays is decided by it; it
    changes nothing in what is computed.
    """

    measured_last: ClassVar[int] = 0
    """``last`` of what was measured: what it computes is in the measured share."""

    if TYPE_CHECKING:
        block: int | None
        last: int
        expected_density: float | None

    @property
    def curve(self) -> str:
        """Name of the measured curve (``densities``)."""
        return self.name

    @property
    def effort(self) -> float:
        """What the selection takes over what it takes at default parameters."""
        return 1.0

    def rule(self) -> Rule:
        """This method's score and rule."""
        raise NotImplementedError

    @property
    def max_density(self) -> float:
        return 1.0

    @property
    def mean_density(self) -> float:
        """That at 16K tokens; ``density_at`` knows others."""
        return self.density_at(16384)

    def density_at(self, length: int) -> float:
        if self.expected_density is not None:
            return self.expected_density
        measured = densities.density(self.curve, getattr(self, str(self.dial)), self.dial_at_all, length)
        area = area_of_last(self.last, length, self.block) - area_of_last(self.measured_last, length, None)
        return min(1.0, measured + max(0.0, area) * (1.0 - measured))

    def cost_at(self, length: int) -> float:
        dial = getattr(self, str(self.dial))
        return self.density_at(length) + densities.extra(self.curve, dial, length, linear=False, effort=self.effort)

    @classmethod
    def cap(cls, methods: Sequence[Method]) -> Method:
        """As for every method; of expected densities the greatest, if any is given."""
        most = max((method.mean_density for method in methods), default=1.0)
        if any(getattr(method, "expected_density", None) is not None for method in methods):
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
        from sparsepass.kernels.select.api import select_scored

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
