"""Pooled block top-k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from sparsepass.errors import PolicyError, shown
from sparsepass.methods.base import Method, area_of_last, block_size, cannot_differ, last_blocks, share, similarity
from sparsepass.methods.dense import Dense
from sparsepass.methods.heads import per_head

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.types import BlockLists, Visible


@dataclass(frozen=True, slots=True)
class PooledTopK(Method):
    """Pooled block top-k ("block-sparse" in The Sparse Frontier, arXiv 2504.17768).

    ``density``: share of the visible blocks kept, in (0, 1]. At 1 every block runs through the sparse kernel.
    ``block``: tokens per block, 64 or 128; ``None``: the device's default.
    ``head_densities``: one density per query head; ``density`` is then their maximum.
    ``self_similarity``: blocks whose tokens' mean cosine is under it are computed whole, besides (SpargeAttn).
    ``last``: query blocks at the end that compute everything visible, besides (FlashPrefill): for answers that depend
    on a question at the end. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "pooled_topk"
    dial: ClassVar[str | None] = "density"
    density: float
    block: int | None = None
    head_densities: tuple[float, ...] | None = None
    self_similarity: float | None = None
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", share(self.name, "density", self.density))
        object.__setattr__(self, "block", block_size(self.name, self.block))
        object.__setattr__(self, "self_similarity", similarity(self.name, self.self_similarity))
        object.__setattr__(self, "last", last_blocks(self.name, self.last))
        if self.head_densities is not None:
            given = self.head_densities
            if not isinstance(given, Sequence) or isinstance(given, str) or not given:
                raise PolicyError(
                    f"pooled_topk head_densities is {shown(given)}; accepted is a list, one number per head."
                )
            heads = tuple(share(self.name, f"head_densities[{head}]", value) for head, value in enumerate(given))
            if max(heads) != self.density:
                raise PolicyError(
                    f"pooled_topk density is {self.density!r} but the largest of head_densities is {max(heads)!r}; "
                    "give density that value."
                )
            object.__setattr__(self, "head_densities", heads)

    @property
    def max_density(self) -> float:
        return self.density

    @property
    def mean_density(self) -> float:
        return self.density if self.head_densities is None else sum(self.head_densities) / len(self.head_densities)

    def density_at(self, length: int) -> float:
        """``mean_density`` and what the last query blocks compute beyond it.

        The other rows keep equally many blocks: of the longest a share s, where s * (2 - s) is the density.
        """
        heads = (self.density,) if self.head_densities is None else self.head_densities
        left_out = sum(math.sqrt(1.0 - one) for one in heads) / len(heads)
        return min(1.0, self.mean_density + area_of_last(self.last, length, self.block) * left_out)

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
        from sparsepass.kernels.select.api import select_pooled_topk

        density: float | torch.Tensor = self.density
        if dial is not None:
            density = dial
        elif self.head_densities is not None:
            density = per_head(self.head_densities, query.device, at_most=True)
        return select_pooled_topk(
            query,
            key,
            scale=scale,
            visible=visible,
            density=density,
            max_density=self.density,
            block=self.block,
            self_similarity=self.self_similarity,
            last=self.last,
            counter=counter,
        )

    def prepare(self, device: torch.device) -> None:
        if self.head_densities is not None:
            per_head(self.head_densities, device, at_most=True)

    def for_head(self, head: int) -> PooledTopK:
        if self.head_densities is None:
            return self
        if not 0 <= head < len(self.head_densities):
            raise PolicyError(
                f"A budget with head_densities for {len(self.head_densities)} heads is used for head {head} (from 0); "
                "give one density per query head of the model."
            )
        return replace(self, density=self.head_densities[head], head_densities=None)

    def uniform(self) -> PooledTopK:
        return replace(self, head_densities=None)

    @classmethod
    def merge_heads(cls, heads: Sequence[Method]) -> Method:
        """Dense heads become density 1 where others are sparse: one launch serves the whole site."""
        if len(set(heads)) == 1:
            return heads[0]
        others = {(head.block, head.self_similarity, head.last) for head in heads if isinstance(head, PooledTopK)}
        if len(others) != 1 or not all(isinstance(head, PooledTopK | Dense) for head in heads):
            raise cannot_differ(cls, heads)
        densities = tuple(head.max_density for head in heads)
        block, self_similarity, last = others.pop()
        return cls(max(densities), block, densities, self_similarity, last)
