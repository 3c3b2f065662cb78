"""The vocabulary that every layer shares: sites, masks, hints, budgets, plans. Plain frozen data, no behavior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

UNBOUNDED = -1
"""``Band.left`` or ``Band.right`` without a limit on that side."""


class Phase(StrEnum):
    """Which part of a request a site serves. Decode sites are counted apart and stay dense."""

    PREFILL = "prefill"
    DECODE = "decode"


class TaskClass(StrEnum):
    """Task classes by scope and dispersion (The Sparse Frontier, arXiv 2504.17768), the hardest last."""

    DENSE = "dense"
    SINGLE_QA = "single_qa"
    MULTI_QA = "multi_qa"
    MULTI_HOP = "multi_hop"
    AGGREGATION = "aggregation"
    UNKNOWN = "unknown"


TASKS = tuple(TaskClass)
"""Every class; its place here is its number on the device."""

Rows = tuple[TaskClass, ...]
"""The class of each row of a batch."""


class Align(StrEnum):
    """Where query row 0 stands among the keys when there are fewer queries than keys.

    ``TOP_LEFT``: at key 0 (``is_causal`` of SDPA). ``BOTTOM_RIGHT``: at key ``kv_len - q_len`` (chunked prefill).
    """

    TOP_LEFT = "top_left"
    BOTTOM_RIGHT = "bottom_right"


@dataclass(frozen=True, slots=True)
class Band:
    """Keys visible by position: query at position p sees keys p - left .. p + right (inclusive).

    ``UNBOUNDED`` lifts a side. Causal is ``right=0``; a causal sliding window of W keys is ``left=W-1, right=0``.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    align: Align = Align.TOP_LEFT

    @property
    def causal(self) -> bool:
        return self.right == 0

    def __str__(self) -> str:
        if self.left == UNBOUNDED and self.right == UNBOUNDED:
            return "full"
        if self.right == 0:
            return "causal" if self.left == UNBOUNDED else f"causal window {self.left + 1}"
        left = "inf" if self.left == UNBOUNDED else str(self.left)
        right = "inf" if self.right == UNBOUNDED else str(self.right)
        return f"band -{left}..+{right}"


CAUSAL = Band(right=0)
FULL = Band()


@dataclass(frozen=True)
class Budget:
    """How much of the attention a site computes: a method's name and that method's own parameters.

    ``Budget("dense")`` computes everything with the dense kernel. ``Budget("pooled_topk", {"density": 0.1})`` keeps a
    tenth of the visible area. Parameter names and ranges are those of the method (``sparsepass.methods``).
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> bool:
        return self.method == "dense"

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={value!r}" for key, value in sorted(self.params.items()))
        return f"{self.method}({inner})" if inner else self.method

    def __hash__(self) -> int:
        return hash(str(self))


EXACT = Budget("full")
"""Every visible block, by the block-sparse kernel: exact too."""

DENSE = Budget("dense")

BY_LENGTH = "by_length"
"""Method name of a budget that the op picks from the real key length; its ``table`` is the op's text."""

BY_ROW = "by_row"
"""Method name of a budget that differs by row of the batch; its ``table`` is the op's text."""


@dataclass(frozen=True, slots=True)
class LengthBucket:
    """Key lengths from ``low`` (exclusive) to ``high`` (inclusive; ``None``: no upper edge), in tokens."""

    low: int
    high: int | None

    def __contains__(self, length: int) -> bool:
        return length > self.low and (self.high is None or length <= self.high)

    def __str__(self) -> str:
        return f"({self.low}, {'inf' if self.high is None else self.high}]"


@dataclass(frozen=True, slots=True)
class Skip:
    """Why a site stays as it is. ``reason`` is a full sentence for the user; ``nodes`` names the graph nodes meant.

    ``module``: path of the module whose code made the first of them, where it is known (``layers.3.self_attn``).
    """

    reason: str
    nodes: tuple[str, ...] = ()
    module: str = ""


@dataclass(frozen=True, slots=True)
class MaskSummary:
    """What a site's mask was recognized as, for the report; the graph nodes themselves stay in the matcher."""

    band: Band = FULL
    padding: bool = False
    packed: bool = False
    tensor: bool = False
    """A boolean tensor is read besides: a mask that is not understood, or not in every term."""
    bias: bool = False
    """Numbers are added to the scores."""

    def __str__(self) -> str:
        parts = [str(self.band)]
        if self.padding:
            parts.append("padding")
        if self.packed:
            parts.append("packed")
        if self.tensor:
            parts.append("tensor")
        if self.bias:
            parts.append("bias")
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One place in a captured graph where attention is computed. Sizes are ints, or the symbol's text if dynamic."""

    index: int
    name: str
    """Name of the graph node that yields the attention output."""
    spelling: str
    """The pattern that matched, for instance ``sdpa`` or ``eager_softmax``."""
    phase: Phase
    q_len: int | str
    kv_len: int | str
    heads: int | str
    kv_heads: int | str
    head_dim: int
    v_head_dim: int
    dtype: str
    device: str
    mask: MaskSummary | None
    """``None`` when the mask was not recognized."""
    module: str = ""
    """Path of the module it came from, where Dynamo knows it."""

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one key/value head."""
        return self.heads != self.kv_heads


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What happens to one site: a budget, or dense with the reason."""

    site: AttentionSite
    budget: Budget
    reason: str = ""
    """Why the site is dense; empty when it is sparse."""
    rewritten: bool = False
    """True when the node is replaced: by the block-sparse op, or by the dense kernel with its mask recognized."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions for one captured graph under one task class, or one class per row, and one length bucket."""

    task: TaskClass | Rows
    bucket: LengthBucket | None
    """``None``: the length could not be guarded; the op picks the bucket from the real length."""
    entries: tuple[PlanEntry, ...]
    key: str
    """What the guard compares: equal keys mean the same compiled graph serves both."""
