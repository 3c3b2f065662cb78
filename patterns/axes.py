"""Dimensions by identity: which dimension of which tensor is the batch, the heads, the queries, the keys.

An atom is a dimension that is never split again; a dimension of a tensor is a tuple of atoms, several where it merges
them ([B * H, S, S] of ``bmm``), none where its size is 1 by broadcasting. Views regroup atoms. What a kernel needs,
[B, H, S, D], is one regrouping more, written as calls of tensor methods that need no symbolic size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsepass.graph.sizes import same_size

Size = int | torch.SymInt
Atom = int
Dims = tuple[tuple[Atom, ...], ...]
Steps = tuple[tuple[Any, ...], ...]
"""Calls in order, each (method, arguments...)."""


class NotRegrouped(Exception):
    """A view, or an order of dimensions, that is not followed; the text says which, as a fragment of a sentence."""


@dataclass
class Axes:
    """The atoms of one attention site."""

    sizes: list[Size] = field(default_factory=list)
    parts: dict[Atom, tuple[Atom, ...]] = field(default_factory=dict)
    """What an atom turned out to be: others that it merges, or another's name for it."""

    def new(self, size: Size) -> Atom:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def of(self, dims: Sequence[tuple[Atom, ...]]) -> Dims:
        """``dims`` in the atoms that are known now."""
        return tuple(tuple(inner for atom in dim for inner in self._inner(atom)) for dim in dims)

    def _inner(self, atom: Atom) -> tuple[Atom, ...]:
        if atom not in self.parts:
            return (atom,)
        return tuple(inner for part in self.parts[atom] for inner in self._inner(part))

    def size(self, atoms: Sequence[Atom]) -> Size:
        product: Size = 1
        for atom in atoms:
            product = product * self.sizes[atom]
        return product

    def seen(self, shape: Sequence[Size], dims: Sequence[tuple[Atom, ...]]) -> Dims:
        """The dims of a tensor of ``shape`` that is broadcast to ``dims``, aligned at the right."""
        last = self.of(dims)[len(dims) - len(shape) :]
        kept = []
        for size, atoms in zip(shape, last, strict=True):
            if same_size(size, self.size(atoms)):
                kept.append(atoms)
            elif same_size(size, 1):
                kept.append(())
            else:
                raise NotRegrouped(f"a size of {size} where {self.size(atoms)} or 1 is expected")
        return tuple(kept)

    def viewed(self, dims: Sequence[tuple[Atom, ...]], shape: Sequence[Size]) -> Dims:
        """The dims after a view to ``shape``. Splits atoms where the view does."""
        left = [atom for dim in self.of(dims) for atom in dim]
        made: list[tuple[Atom, ...]] = []
        for size in reversed(shape):
            made.append(self._take(left, size))
        if any(not same_size(self.sizes[atom], 1) for atom in left):
            raise NotRegrouped(f"a view to {list(shape)} that regroups dimensions")
        return self.of(made[::-1])

    def _take(self, left: list[Atom], size: Size) -> tuple[Atom, ...]:
        """Atoms from the end of ``left`` that make up a dimension of ``size``."""
        if left and same_size(self.sizes[left[-1]], size):
            return (left.pop(),)
        if same_size(size, 1):
            return ()
        taken: list[Atom] = []
        while left and not same_size(self.size(taken), size):
            if same_size(self.sizes[left[-1]], 1):
                left.pop()
                continue
            inner = self._split(left[-1], size, self.size(taken))
            if inner is not None:
                left[-1:] = inner
            taken.insert(0, left.pop())
        if not same_size(self.size(taken), size):
            raise NotRegrouped(f"a view with a dimension of {size} that regroups dimensions")
        return tuple(taken)

    def _split(self, atom: Atom, size: Size, taken: Size) -> tuple[Atom, Atom] | None:
        """``atom`` as (rest, what is missing to ``size``), where it is larger than that."""
        whole = self.sizes[atom]
        if not isinstance(size, int) or not isinstance(taken, int) or size % taken:
            return None
        missing = size // taken
        larger = whole > missing if isinstance(whole, int) else True
        if not larger or not same_size(whole // missing * missing, whole) or same_size(whole, missing):
            return None
        pair = self.new(whole // missing), self.new(missing)
        self.parts[atom] = pair
        return pair

    def steps(
        self, before: Sequence[tuple[Atom, ...]], after: Sequence[tuple[Atom, ...]], *, fill: bool = True
    ) -> Steps:
        """Calls from a tensor with dims ``before`` to one with dims ``after``.

        A dimension of ``after`` of which ``before`` has no atom becomes 1, or with ``fill`` its full size.
        """
        before, after = self.of(before), self.of(after)
        steps: list[tuple[Any, ...]] = []
        for place in reversed(range(len(before))):
            if len(before[place]) > 1:
                steps.append(("unflatten", place, self._lengths(before[place])))
        single = (
            [(atom,) for dim in before for atom in dim]
            if all(before)
            else [(atom,) if atom is not None else () for dim in before for atom in (dim or (None,))]
        )
        for place in reversed(range(len(single))):
            if not single[place]:
                steps.append(("squeeze", place))
        held = [dim[0] for dim in single if dim]
        wanted = [atom for dim in after for atom in dim if atom in held]
        if sorted(wanted) != sorted(held):
            raise NotRegrouped("a dimension that the scores do not have")
        order = [held.index(atom) for atom in wanted]
        if order != sorted(order):
            steps.append(("permute", tuple(order)))
        return tuple(steps) + self._filled(after, held, fill)

    def _filled(self, after: Dims, held: list[Atom], fill: bool) -> Steps:
        """Missing atoms added, those of one dimension merged."""
        steps: list[tuple[Any, ...]] = []
        lengths: list[int] = []
        groups: list[tuple[int, int]] = []
        for dim in after:
            start = len(lengths)
            whole = fill or any(atom in held for atom in dim)
            for atom in dim if whole else ():
                if atom not in held:
                    steps.append(("unsqueeze", len(lengths)))
                lengths.append(-1 if atom in held else self._static(atom))
            if len(lengths) == start:
                steps.append(("unsqueeze", start))
                lengths.append(-1)
            groups.append((start, len(lengths) - 1))
        if any(length not in (-1, 1) for length in lengths):
            steps.append(("expand", *lengths))
        steps += [("flatten", start, end) for start, end in reversed(groups) if end > start]
        return tuple(steps)

    def _lengths(self, atoms: Sequence[Atom]) -> tuple[int, ...]:
        """Sizes of atoms for ``unflatten``: one of them may be symbolic."""
        sizes = [self.sizes[atom] for atom in atoms]
        if sum(not isinstance(size, int) for size in sizes) > 1:
            raise NotRegrouped("a dimension that merges two dynamic ones")
        return tuple(size if isinstance(size, int) else -1 for size in sizes)

    def _static(self, atom: Atom) -> int:
        size = self.sizes[atom]
        if not isinstance(size, int):
            raise NotRegrouped("a tensor broadcast over a dynamic dimension")
        return size
