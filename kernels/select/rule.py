"""A selection as data: which score blocks get, and which rule turns the scores of a row into its list. Torch only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.blocks import ceil_div

Score = Literal["pooled", "mass", "antidiagonal"]
"""How blocks are scored; ``kernels/select/reference.py`` has each as a formula."""

Keep = Literal["window", "threshold", "coverage"]
"""How a row's scores become its list: by position alone, by a share of its best, by the mass covered."""

SCORES: tuple[Score, ...] = ("pooled", "mass", "antidiagonal")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a row lists: the blocks it always lists, and of the others those that ``keep`` takes by their scores.

    Scores are logarithms: a block's share of the row is ``softmax(score)``. Lists never leave the mask.
    """

    keep: Keep
    dial: float
    """``window``: tokens to each side. ``threshold``: the least share of the row's best block. ``coverage``: the mass
    that the listed blocks reach. Where a tensor of dials is given, this is the cap: none computes more."""
    score: Score | None = None
    sink: int = 1
    """First blocks of a row always listed; counted over those that the mask allows."""
    sink_in_tokens: bool = False
    """``sink`` counts tokens, rounded up to blocks."""
    window: int = 2
    """Blocks always listed from the one at the position of the row's last query backwards (not for ``window``)."""
    last: int = 0
    """Query blocks at the end that list everything."""
    stride: int = 16
    """Tokens that ``antidiagonal`` folds into one."""
    self_similarity: float | None = None
    """Query and key blocks whose tokens' mean cosine is under it are computed whole."""

    def sink_blocks(self, kv_block: int) -> int:
        """``sink`` in blocks."""
        return ceil_div(self.sink, kv_block) if self.sink_in_tokens else self.sink

    def width(self, q_block: int, kv_block: int, kv_blocks: int) -> int:
        """Entries that a row of the lists may need."""
        if self.keep != "window" or self.last:
            return kv_blocks
        near = ceil_div(q_block + 2 * int(self.dial), kv_block) + 1
        return max(1, min(kv_blocks, self.sink_blocks(kv_block) + near))


def check_rule(rule: Rule, q_block: int, kv_block: int) -> None:
    """Raises ``KernelInputError`` for a rule that no kernel takes."""
    if (rule.score is None) != (rule.keep == "window") or (rule.score is not None and rule.score not in SCORES):
        raise KernelInputError(f"score is {rule.score!r} for {rule.keep!r}; accepted are {', '.join(SCORES)}.")
    if rule.score == "antidiagonal" and (
        rule.stride < 2 or rule.stride & (rule.stride - 1) or q_block % rule.stride or kv_block % rule.stride
    ):
        raise KernelInputError(
            f"stride is {rule.stride} with blocks of {q_block} by {kv_block} tokens; accepted is a power of two from 2 "
            "up that divides both."
        )


def dial_tensor(dial: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """``dial`` float32 [B or 1, H or 1] if it fits. Raises ``KernelInputError``."""
    if dial is None:
        return None
    if dial.dim() != 2 or dial.shape[0] not in (1, batch) or dial.shape[1] not in (1, heads):
        raise KernelInputError(f"dial has shape {tuple(dial.shape)}; accepted is [{batch} or 1, {heads} or 1].")
    return dial
