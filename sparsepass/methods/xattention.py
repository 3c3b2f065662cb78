"""XAttention: antidiagonal scores, covered by mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsepass.methods.base import block_size, expected, last_blocks, share
from sparsepass.methods.scored import ScoredMethod
from sparsepass.methods.top_p import stride_of

if TYPE_CHECKING:
    from sparsepass.kernels.select.rule import Rule


@dataclass(frozen=True, slots=True)
class XAttention(ScoredMethod):
    """Blocks by the softmax mass of their antidiagonals (XAttention, arXiv 2503.16428).

    ``tau``: share of each row's estimated mass that the computed blocks reach, in (0, 1]; 1 computes everything,
    published 0.9 to 0.95. ``stride``: tokens folded into one, 4 to 32; the selection's cost falls with it. The row's
    first visible block and the diagonal one are always computed and count towards ``tau``. ``block``: 64 or 128
    tokens, ``None``: the device's default. ``last``: query blocks at the end that compute everything visible, as for
    ``threshold``. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "xattention"
    dial: ClassVar[str | None] = "tau"
    tau: float = 0.9
    stride: int = 16
    block: int | None = None
    expected_density: float | None = None
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tau", share(self.name, "tau", self.tau))
        object.__setattr__(self, "stride", stride_of(self.name, self.stride))
        object.__setattr__(self, "expected_density", expected(self.name, self.expected_density))
        object.__setattr__(self, "block", block_size(self.name, self.block))
        object.__setattr__(self, "last", last_blocks(self.name, self.last))

    @property
    def effort(self) -> float:
        return 16 / self.stride

    def rule(self) -> Rule:
        from sparsepass.kernels.select.rule import Rule

        return Rule("coverage", self.tau, "antidiagonal", sink=1, window=1, stride=self.stride, last=self.last)
