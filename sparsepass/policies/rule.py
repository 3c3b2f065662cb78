"""One rule of a policy: for which task, lengths, layers and heads it holds, and the budget it gives."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsepass.errors import PolicyError, shown
from sparsepass.host.files import DIGITS
from sparsepass.methods import budget_to_json, make_method
from sparsepass.types import Budget, TaskClass


@dataclass(frozen=True, slots=True)
class Ranges:
    """A set of layer or head numbers: sorted, disjoint (first, last) pairs, both included; a last of ``None``: no end.

    ``Ranges.parse("0-3,7,20-")`` and ``str()`` are inverse; overlapping and unsorted input is merged.
    """

    spans: tuple[tuple[int, int | None], ...]

    def __post_init__(self) -> None:
        merged: list[tuple[int, int | None]] = []
        for first, last in sorted(self.spans, key=lambda span: span[0]):
            if first < 0 or (last is not None and last < first):
                raise PolicyError(f"A range of layers or heads runs from {first} to {last}; numbers rise from 0.")
            if merged and (merged[-1][1] is None or first <= merged[-1][1] + 1):
                start, end = merged[-1]
                merged[-1] = (start, None if end is None or last is None else max(end, last))
            else:
                merged.append((first, last))
        if not merged:
            raise PolicyError("A range of layers or heads is empty; leave it out to mean all.")
        object.__setattr__(self, "spans", tuple(merged))

    @classmethod
    def parse(cls, text: str) -> Ranges:
        """Read ``"0-3,7,20-"``. Raises ``PolicyError``."""
        spans: list[tuple[int, int | None]] = []
        for part in str(text).split(","):
            first, dash, last = (piece.strip() for piece in part.partition("-"))
            if not _is_number(first) or not (last == "" or _is_number(last)):
                raise PolicyError(
                    f"{shown(part)} is no layer or head, nor a range; accepted is for instance '0-3,7,20-'."
                )
            spans.append((int(first), int(last) if last else None if dash else int(first)))
        return cls(tuple(spans))

    def __contains__(self, number: int) -> bool:
        place = bisect.bisect_right(self.spans, number, key=lambda span: span[0]) - 1
        last = self.spans[place][1] if place >= 0 else -1
        return last is None or number <= last

    def __str__(self) -> str:
        return ",".join(
            str(first) if first == last else f"{first}-{'' if last is None else last}" for first, last in self.spans
        )

    def edges(self) -> Iterator[int]:
        """Numbers at which membership changes."""
        for first, last in self.spans:
            yield first
            if last is not None:
                yield last + 1


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= DIGITS


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a policy. ``None`` for task, layers or heads means all.

    ``above`` (exclusive) and ``up_to`` (inclusive; ``None``: no end) are key lengths in tokens. Raises ``PolicyError``.
    """

    task: TaskClass | None
    budget: Budget
    above: int = 0
    up_to: int | None = None
    layers: Ranges | None = None
    heads: Ranges | None = None
    floor: float | None = None
    """The share of the attention mass that a layer has to keep, mean over its heads: a monitor raises the hint where it
    keeps less. ``None``: it may keep any. 0 to 1."""

    def __post_init__(self) -> None:
        if self.task is TaskClass.DENSE:
            raise PolicyError("A rule is for the task 'dense'; that hint is always dense and takes no rule.")
        lengths = (self.above, self.above if self.up_to is None else self.up_to)
        if any(isinstance(one, bool) or not isinstance(one, int) for one in lengths):
            raise PolicyError(f"A rule's lengths are {shown(lengths)}; accepted are whole numbers of tokens.")
        if self.above < 0 or (self.up_to is not None and self.up_to <= self.above):
            raise PolicyError(
                f"A rule's lengths run above {shown(self.above)} up to {shown(self.up_to)}; "
                "accepted is 0 <= above < up_to."
            )
        method = make_method(self.budget)
        if self.heads is not None and getattr(method, "head_densities", None) is not None:
            raise PolicyError("A rule for some heads has a budget with head_densities; accepted is one of the two.")
        if self.floor is not None:
            if isinstance(self.floor, bool) or not isinstance(self.floor, int | float) or not 0 <= self.floor <= 1:
                raise PolicyError(f"A rule's floor is {shown(self.floor)}; accepted is a share of the mass, 0 to 1.")
            if self.heads is not None:
                raise PolicyError(
                    "A rule for some heads has a floor, which is a layer's; put it in a rule without heads."
                )
            object.__setattr__(self, "floor", float(self.floor))
        object.__setattr__(self, "budget", method.budget())


def rule_to_json(rule: Rule) -> dict[str, Any]:
    """A rule as the policy file has it: what means "all" is left out."""
    lengths = {"above": rule.above} if rule.above else {}
    if rule.up_to is not None:
        lengths["up_to"] = rule.up_to
    data: dict[str, Any] = {"task": "*" if rule.task is None else str(rule.task)}
    if lengths:
        data["lengths"] = lengths
    for name in ("layers", "heads"):
        if (ranges := getattr(rule, name)) is not None:
            data[name] = str(ranges)
    floor = {} if rule.floor is None else {"floor": rule.floor}
    return {**data, "budget": budget_to_json(rule.budget), **floor}
