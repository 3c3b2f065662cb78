"""Vertical-slash: single keys that everyone reads, and fixed distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsepass.errors import PolicyError
from sparsepass.methods.base import BLOCKS, Method, share

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.dispatch import BlockLists, Visible


def whole(method: str, parameter: str, value: Any, least: int, accepted: str) -> int:
    """``value`` if it is an integer of at least ``least``. Raises ``PolicyError`` that says what is accepted."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PolicyError(f"{method} {parameter} is {value!r}; accepted is {accepted}.")
    return value


def check_sampled(method: str, queries: Any, block: Any) -> None:
    """Raises ``PolicyError`` for a number of sampled queries, or a block size, that no kernel takes."""
    accepted = "a multiple of 64 from 64 to 1024"
    whole(method, "queries", queries, 64, accepted)
    if queries % 64 or queries > 1024:
        raise PolicyError(f"{method} queries is {queries!r}; accepted is {accepted}.")
    if block is not None and (isinstance(block, bool) or block not in BLOCKS):
        raise PolicyError(f"{method} block is {block!r}; accepted are 64, 128 or null (the default).")


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
                whole(self.name, parameter, value, 1, "a whole number from 1 up, or null (no limit)")
        check_sampled(self.name, self.queries, self.block)

    @property
    def max_density(self) -> float:
        return self.density

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
        from sparsepass.kernels.slash import select_vertical_slash

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
