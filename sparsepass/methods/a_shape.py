"""A-shape: the first tokens and a local window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsepass.methods.base import area_of_last, block_size, last_blocks, whole
from sparsepass.methods.scored import ScoredMethod

if TYPE_CHECKING:
    from sparsepass.kernels.select.rule import Rule


@dataclass(frozen=True, slots=True)
class AShape(ScoredMethod):
    """First tokens plus local window (StreamingLLM, arXiv 2309.17453; MInference, 2407.02490): the cheap baseline.

    ``window``: tokens before (and, where the mask shows them, after) each query that it sees, its own included.
    ``sink``: first tokens of what a query may see, of its own document where several are packed. Both in tokens,
    rounded up to whole blocks. ``block``: 64 or 128 tokens, ``None``: the device's default. ``last``: query blocks at
    the end that compute everything visible, as in ``threshold``. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "a_shape"
    dial: ClassVar[str | None] = "window"
    dial_at_all: ClassVar[float] = float(1 << 30)
    window: int = 4096
    sink: int = 128
    block: int | None = None
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", whole(self.name, "window", self.window, 1))
        object.__setattr__(self, "sink", whole(self.name, "sink", self.sink, 0))
        object.__setattr__(self, "block", block_size(self.name, self.block))
        object.__setattr__(self, "last", last_blocks(self.name, self.last))

    @property
    def mean_density(self) -> float:
        """That at 16K tokens; ``density_at`` knows others."""
        return self.density_at(16384)

    def density_at(self, length: int) -> float:
        seen = min(self.window + self.sink + (self.block or 128) / 2, length) / max(length, 1)
        if seen <= 0:
            return 1.0
        return min(1.0, seen * (2.0 - seen) + area_of_last(self.last, length, self.block) * (1.0 - seen))

    def rule(self) -> Rule:
        from sparsepass.kernels.select.rule import Rule

        return Rule("window", float(self.window), sink=self.sink, sink_in_tokens=True, last=self.last)
