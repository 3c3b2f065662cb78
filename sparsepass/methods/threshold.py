"""Threshold on the mass of pooled keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsepass.errors import PolicyError
from sparsepass.methods.base import block_size, expected, last_blocks, similarity, whole
from sparsepass.methods.scored import ScoredMethod

if TYPE_CHECKING:
    from sparsepass.kernels.select.rule import Rule


@dataclass(frozen=True, slots=True)
class Threshold(ScoredMethod):
    """Every query against mean-pooled keys; blocks with at least ``alpha`` of the row's best mass (FlashPrefill).

    No sort and no top-k. ``alpha``: in [0, 1], published 0.08 to 0.18; 0 computes everything.
    ``sink``: first visible blocks of a row always computed. ``window``: blocks from the diagonal backwards always
    computed, itself included. ``last``: query blocks at the end that compute everything.
    ``block``: 64 or 128 tokens, ``None``: the device's default. ``self_similarity``: key blocks whose tokens' mean
    cosine is under it are always computed (SpargeAttn, arXiv 2502.18137). Raises ``PolicyError``.
    """

    name: ClassVar[str] = "threshold"
    dial: ClassVar[str | None] = "alpha"
    dial_at_all: ClassVar[float] = 0.0
    measured_last: ClassVar[int] = 2
    alpha: float = 0.08
    sink: int = 2
    window: int = 4
    last: int = 2
    block: int | None = None
    self_similarity: float | None = None
    expected_density: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not 0 <= self.alpha <= 1:
            raise PolicyError(f"threshold alpha is {self.alpha!r}; accepted is a number from 0 (everything) to 1.")
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "sink", whole(self.name, "sink", self.sink, 0))
        object.__setattr__(self, "window", whole(self.name, "window", self.window, 1))
        object.__setattr__(self, "last", last_blocks(self.name, self.last))
        object.__setattr__(self, "self_similarity", similarity(self.name, self.self_similarity))
        object.__setattr__(self, "expected_density", expected(self.name, self.expected_density))
        object.__setattr__(self, "block", block_size(self.name, self.block))

    def rule(self) -> Rule:
        from sparsepass.kernels.select.rule import Rule

        return Rule(
            "threshold",
            self.alpha,
            "mass",
            sink=self.sink,
            window=self.window,
            last=self.last,
            self_similarity=self.self_similarity,
        )
