"""Mass-covering top-p over any block score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsepass.errors import PolicyError, shown
from sparsepass.methods.base import block_size, expected, last_blocks, share, similarity, whole
from sparsepass.methods.scored import ScoredMethod

if TYPE_CHECKING:
    from sparsepass.kernels.select.rule import Rule, Score

STRIDES = (4, 8, 16, 32)
"""Tokens that antidiagonal scoring may fold into one."""


def stride_of(method: str, value: object) -> int:
    """``value`` if it is a stride. Raises ``PolicyError``."""
    if isinstance(value, bool) or value not in STRIDES:
        raise PolicyError(f"{method} stride is {shown(value)}; accepted are {', '.join(map(str, STRIDES))}.")
    return int(value)  # type: ignore[call-overload,no-any-return]  # one of STRIDES


@dataclass(frozen=True, slots=True)
class TopP(ScoredMethod):
    """The fewest blocks whose estimated mass reaches ``coverage`` in each row (as in FlexPrefill, arXiv 2502.20766).

    ``coverage``: in (0, 1]; 1 computes everything. Blocks always computed count towards it. ``score``: where the mass
    is estimated from: ``pooled`` (mean query against mean key), ``mass`` (every query against mean key, as
    ``threshold``) or ``antidiagonal`` (as ``xattention``, with its ``stride``). ``sink`` and ``window``: blocks always
    computed, as for ``threshold``. ``block``: 64 or 128 tokens, ``None``: the device's default. ``self_similarity``:
    blocks whose tokens' mean cosine is under it are always computed (SpargeAttn). ``last``: query blocks at the end
    that compute everything visible, as for ``threshold``. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "top_p"
    dial: ClassVar[str | None] = "coverage"
    coverage: float = 0.9
    score: Score = "pooled"
    sink: int = 1
    window: int = 2
    stride: int = 16
    block: int | None = None
    self_similarity: float | None = None
    expected_density: float | None = None
    last: int = 0

    def __post_init__(self) -> None:
        from sparsepass.kernels.select.rule import SCORES

        object.__setattr__(self, "coverage", share(self.name, "coverage", self.coverage))
        if self.score not in SCORES:
            raise PolicyError(f"top_p score is {self.score!r}; accepted are {', '.join(map(repr, SCORES))}.")
        object.__setattr__(self, "sink", whole(self.name, "sink", self.sink, 0))
        object.__setattr__(self, "window", whole(self.name, "window", self.window, 1))
        object.__setattr__(self, "stride", stride_of(self.name, self.stride))
        object.__setattr__(self, "self_similarity", similarity(self.name, self.self_similarity))
        if self.self_similarity is not None and self.score == "antidiagonal":
            raise PolicyError("top_p self_similarity is for scores from means, not for 'antidiagonal': leave it out.")
        object.__setattr__(self, "expected_density", expected(self.name, self.expected_density))
        object.__setattr__(self, "block", block_size(self.name, self.block))
        object.__setattr__(self, "last", last_blocks(self.name, self.last))

    @property
    def curve(self) -> str:
        return "xattention" if self.score == "antidiagonal" else f"{self.name}, {self.score}"

    @property
    def effort(self) -> float:
        return 16 / self.stride if self.score == "antidiagonal" else 1.0

    def rule(self) -> Rule:
        from sparsepass.kernels.select.rule import Rule

        return Rule(
            "coverage",
            self.coverage,
            self.score,
            sink=self.sink,
            window=self.window,
            stride=self.stride,
            last=self.last,
            self_similarity=self.self_similarity,
        )
