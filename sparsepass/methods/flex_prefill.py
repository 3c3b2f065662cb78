"""FlexPrefill: vertical-slash or pooled blocks, as each head's attention asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsepass.errors import PolicyError
from sparsepass.methods import densities
from sparsepass.methods.base import Method, block_size, expected, share, whole
from sparsepass.methods.vertical_slash import sampled

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.types import BlockLists, Visible


@dataclass(frozen=True, slots=True)
class FlexPrefill(Method):
    """FlexPrefill (arXiv 2502.20766): the fewest verticals and slashes that cover ``gamma`` of the sampled attention.

    ``gamma``: share of the estimated attention to cover, in (0, 1]. At 1 every block is listed.
    ``tau``: heads whose block averages predict their attention to a divergence under it add blocks by the averages;
    0: none does. ``min_budget``: tokens kept at least. ``most``: share of the visible area computed at most; it sizes
    the buffers. ``queries``: how many of the last queries are sampled, a multiple of 64. ``block``: tokens per block,
    64 or 128; ``None``: the device's default. ``expected_density``: what the plan counts with, since the share computed
    follows the data; ``None``: that on structured inputs, by ``gamma`` and length. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "flex_prefill"
    dial: ClassVar[str | None] = "gamma"
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    most: float = 0.5
    queries: int = 128
    block: int | None = None
    expected_density: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", share(self.name, "gamma", self.gamma))
        object.__setattr__(self, "most", share(self.name, "most", self.most))
        number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
        if not number or not 0 <= self.tau <= 1:
            raise PolicyError(f"flex_prefill tau is {self.tau!r}; accepted is a number from 0 to 1.")
        object.__setattr__(self, "tau", float(self.tau))
        object.__setattr__(self, "min_budget", whole(self.name, "min_budget", self.min_budget, 0))
        object.__setattr__(self, "queries", sampled(self.name, self.queries))
        object.__setattr__(self, "block", block_size(self.name, self.block))
        object.__setattr__(self, "expected_density", expected(self.name, self.expected_density))

    @property
    def max_density(self) -> float:
        """At ``gamma`` 1 all, whatever ``most`` says."""
        return 1.0 if self.gamma >= 1 else self.most

    @property
    def mean_density(self) -> float:
        """That at 16K tokens; ``density_at`` knows others."""
        return self.density_at(16384)

    def density_at(self, length: int) -> float:
        if self.gamma >= 1:
            return 1.0
        if self.expected_density is not None:
            return min(self.most, self.expected_density)
        return min(self.most, densities.density(self.name, self.gamma, 1.0, length))

    def cost_at(self, length: int) -> float:
        effort = max(1.0, self.queries / 128)
        return self.density_at(length) + densities.extra(self.name, self.gamma, length, linear=True, effort=effort)

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
        from sparsepass.kernels.slash.flex_prefill import select_flex_prefill

        return select_flex_prefill(
            query,
            key,
            scale=scale,
            visible=visible,
            gamma=self.gamma,
            tau=self.tau,
            min_budget=self.min_budget,
            most=self.most,
            queries=self.queries,
            block=self.block,
            dial=dial,
            counter=counter,
        )
