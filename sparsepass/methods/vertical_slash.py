"""Vertical-slash: single keys that everyone reads, and fixed distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsepass.errors import PolicyError, shown
from sparsepass.methods import densities
from sparsepass.methods.base import Method, block_size, share, whole

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.types import BlockLists, Visible


def sampled(method: str, value: Any) -> int:
    """``value`` as a number of queries that can be sampled. Raises ``PolicyError``."""
    number = whole(method, "queries", value, 64)
    if number % 64 or number > 1024:
        raise PolicyError(f"{method} queries is {shown(value)}; accepted is a multiple of 64 from 64 to 1024.")
    return number


@dataclass(frozen=True, slots=True)
class VerticalSlash(Method):
    """Vertical-slash (MInference, arXiv 2407.02490; The Sparse Frontier, arXiv 2504.17768).

    ``density``: share of the visible area computed at most, in (0, 1]: half as single keys (verticals, gathered), half
    as blocks that the best diagonals (slashes) touch. At 1 every block is listed.
    ``columns``, ``slashes``: at most so many verticals and token diagonals; ``None``: as many as ``density`` allows.
    ``queries``: how many of the last queries are sampled, a multiple of 64.
    ``block``: tokens per block, 64 or 128; ``None``: the device's default. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "vertical_slash"
    dial: ClassVar[str | None] = "density"
    density: float
    columns: int | None = None
    slashes: int | None = None
    queries: int = 256
    block: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", share(self.name, "density", self.density))
        for parameter in ("columns", "slashes"):
            value = getattr(self, parameter)
            if value is not None:
                object.__setattr__(self, parameter, whole(self.name, parameter, value, 1))
        object.__setattr__(self, "queries", sampled(self.name, self.queries))
        object.__setattr__(self, "block", block_size(self.name, self.block))

    @property
    def max_density(self) -> float:
        return self.density

    def cost_at(self, length: int) -> float:
        """Of the share that it computes on structured inputs, mostly less than ``density``, and of its selection."""
        effort = max(1.0, self.queries / 256)
        computed = densities.density(self.name, self.density, 1.0, length)
        return computed + densities.extra(self.name, self.density, length, linear=True, effort=effort)

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
        from sparsepass.kernels.slash.api import select_vertical_slash

        return select_vertical_slash(
            query,
            key,
            scale=scale,
            visible=visible,
            density=self.density,
            columns=self.columns,
            slashes=self.slashes,
            queries=self.queries,
            block=self.block,
            dial=dial,
            counter=counter,
        )
