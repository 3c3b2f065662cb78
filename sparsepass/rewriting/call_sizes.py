"""Whether a call has the sizes that a graph was planned for: guards on them may have been dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.planning.plan import GraphPlan
from sparsepass.types import LengthBucket


@dataclass(frozen=True)
class CallSizes:
    """What a sparse plan rests on, read from the arguments of each call."""

    fixed: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    """By place of a tensor among the arguments: its dimensions that are numbers in the graph, each with the size."""
    lengths: tuple[tuple[Callable[[Sequence[Any]], int], LengthBucket], ...]
    """How to read each key length that varies, and the range that the plan holds in."""

    @staticmethod
    def of(graph: fx.Graph, plan: GraphPlan, examples: Sequence[Any]) -> CallSizes | None:
        """What to check of a captured graph's calls; None where its plan holds for all sizes."""
        if not plan.lengths:
            return None
        readers = [
            (torch_private.size_reader(graph, length), span)
            for length, span in plan.lengths
            if not isinstance(length, int)
        ]
        return CallSizes(
            tuple(_fixed(graph, examples)), tuple((reader, span) for reader, span in readers if reader is not None)
        )

    def other(self, arguments: Sequence[Any]) -> str:
        """What of a call is not as planned, in words; nothing where all is."""
        for place, sizes in self.fixed:
            shape = arguments[place].shape
            for dim, size in sizes:
                if shape[dim] != size:
                    return f"dimension {dim} of input {place} is {shape[dim]}, not {size}"
        for read, span in self.lengths:
            if (length := read(arguments)) not in span:
                return f"the key length {length} is outside {span}"
        return ""


def _fixed(graph: fx.Graph, examples: Sequence[Any]) -> list[tuple[int, tuple[tuple[int, int], ...]]]:
    """Parameters are left out: their sizes do not change from call to call."""
    found = []
    for place, node in enumerate(graph.find_nodes(op="placeholder")):
        held = node.meta.get("example_value")
        if not isinstance(held, torch.Tensor) or isinstance(held, torch.nn.Parameter) or place >= len(examples):
            continue
        # The graph may change an input's shape in place: then its example does not have the shape it came with.
        given = examples[place].shape
        sizes = tuple(
            (dim, size)
            for dim, size in enumerate(held.shape)
            if isinstance(size, int) and dim < len(given) and given[dim] == size
        )
        if sizes:
            found.append((place, sizes))
    return found
