"""The matcher: attention code, traced into a small graph, is looked for around its anchor in a captured graph.

A pattern is a function written as a model would write it. Matching starts at the anchor (the softmax), unifies what
feeds it, then follows the only path from the anchor to the pattern's output. Each anchor is visited once per form, so
the cost is linear in the graph. What nearly matched is kept as a ``NearMiss`` that names the first difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Op, Operand, canonical_op, is_scalar
from sparsepass.graph.made import Maker
from sparsepass.graph.sizes import same_size, shape
from sparsepass.types import Skip

HIDES = -1e4
"""A number added to a score, or put in its place, that hides the key: its weight is 0 in every type, unless all visible
scores of the row are as low."""


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor that acts on the scores, as they stand in the graph.

    ``operand`` is aligned at the right with scores [B, H, Sq, Skv]: a tensor of at most four dimensions, each of full
    size or 1. Booleans show (``sign`` 1) or hide (``sign`` -1) keys where they are true; numbers are added ``sign``
    times.
    """

    operand: Operand
    sign: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Attention as every pattern hands it on: operands before any repetition of K/V, and what is done to them.

    ``query`` [B, H, Sq, D], ``key`` [B, Hkv, Skv, D], ``value`` [B, Hkv, Skv, Dv]: nodes, or values still to be made of
    nodes. ``output`` is the node to replace: [B, H, Sq, Dv] after the calls of ``restore``. In this order: the scores
    are scaled, capped, the terms of ``masks`` are added or hide, and sinks join.
    """

    spelling: str
    query: Operand
    key: Operand
    value: Operand
    output: fx.Node
    scale: Operand
    """A number, or what yields one; ``None`` stands for 1/sqrt(D)."""
    masks: tuple[Term, ...] = ()
    is_causal: bool = False
    dropout_p: Operand = 0.0
    softcap: Operand = None
    """A number, or what yields one; ``None`` for none."""
    sinks: Operand | None = None
    """A float tensor [H], or [B or 1, H or 1, Sq or 1]: logits that join each row's softmax and have no value."""
    restore: tuple[tuple[Any, ...], ...] = ()
    """Calls from [B, H, Sq, Dv] to what ``output`` yields, each (method or function, arguments...)."""
    region: frozenset[fx.Node] = frozenset()
    """Every node whose value only this attention needs, the output included."""

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        return self.query, self.key, self.value

    @property
    def plain(self) -> bool:
        """Whether scale and masks are all that is done to the scores."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True, slots=True)
class NearMiss:
    """The longest partial match of a pattern: how far it got and what differed."""

    pattern: str
    matched: int
    reason: str
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.pattern}: {self.reason}"


@dataclass(frozen=True)
class Form:
    """One way to write a pattern: ``code`` in plain torch, ``scalars`` the parameters that are numbers."""

    code: Callable[..., Any]
    scalars: frozenset[str] = frozenset({"scale"})

    @cached_property
    def graph(self) -> fx.Graph:
        return fx.symbolic_trace(self.code).graph

    @cached_property
    def view(self) -> CanonicalGraph:
        return CanonicalGraph(self.graph)

    @cached_property
    def output(self) -> fx.Node:
        node: fx.Node = self.view.resolve(next(iter(reversed(self.graph.nodes))).args[0])
        return node


@dataclass(frozen=True)
class Match:
    """A form found in a graph: roles bound to operands, pattern nodes to graph nodes."""

    view: CanonicalGraph
    output: fx.Node
    roles: dict[str, Operand]
    nodes: dict[fx.Node, fx.Node]
    maker: Maker = field(default_factory=Maker)


Check = Callable[[Match], "Attention | Skip | NearMiss"]
"""A ``Skip`` says why this attention stays as it is, a ``NearMiss`` how far it is one; both unless another pattern
matches."""


@dataclass(frozen=True)
class Pattern:
    """One written form of attention: its forms as code, the operation it is anchored at, and a check."""

    name: str
    anchor: str
    check: Check
    forms: tuple[Form, ...] = ()
    """Empty for patterns that are a single node; ``check`` then gets a match with the anchor alone."""

    def find(self, view: CanonicalGraph, anchor: fx.Node, maker: Maker | None = None) -> Attention | Skip | NearMiss:
        """Match at ``anchor``: the attention found, why a complete match is refused, or the nearest miss."""
        maker = maker or Maker()
        if not self.forms:
            return self.check(Match(view, anchor, {}, {anchor: anchor}, maker))
        best: NearMiss | None = None
        for form in self.forms:
            try:
                match = replace(_Search(form, view, self).run(anchor), maker=maker)
            except _Mismatch as miss:
                if best is None or miss.matched > best.matched:
                    best = NearMiss(self.name, miss.matched, miss.reason, miss.nodes)
                continue
            return self.check(match)
        assert best is not None  # forms is not empty
        return best


class _Mismatch(Exception):
    def __init__(self, matched: int, reason: str, nodes: Iterable[fx.Node]) -> None:
        super().__init__(reason)
        self.matched, self.reason, self.nodes = matched, reason, tuple(node.name for node in nodes)


@dataclass
class _Search:
    """One attempt: unify upwards from the anchor, then walk down to the output."""

    form: Form
    view: CanonicalGraph
    pattern: Pattern
    roles: dict[str, Operand] = field(default_factory=dict)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self, anchor: fx.Node) -> Match:
        own = self.form.view.anchors(self.pattern.anchor)
        self.unify(own[0], anchor)
        self.descend(own[0], anchor)
        output = self.nodes[self.form.output]
        inside = {part for node in self.nodes.values() for part in (node, *self.view.parts.get(node, ()))}
        for node in inside - {output}:
            outside = [user for user in self.view.users(node) if user not in inside]
            if outside:
                raise self.mismatch(used_outside(node, outside[0]), node, outside[0])
        return Match(self.view, output, dict(self.roles), dict(self.nodes))

    def mismatch(self, reason: str, *nodes: fx.Node) -> _Mismatch:
        return _Mismatch(len(self.nodes), reason, nodes)

    def unify(self, wanted: Operand, operand: Operand) -> None:
        operand = self.view.resolve(operand)
        if not isinstance(wanted, fx.Node):
            if isinstance(operand, fx.Node) or operand != wanted:
                raise self.mismatch(f"expected the constant {wanted!r}, found {operand!r}")
            return
        if wanted.op == "placeholder":
            self.bind(wanted.name, operand)
            return
        if self.nodes.get(wanted) is operand:
            return
        expected = self.form.view.ops[wanted]
        if not isinstance(operand, fx.Node):
            raise self.mismatch(f"expected {expected}, found the constant {operand!r}")
        found = self.view.ops[operand]
        self.compare(expected, found, operand)
        self.nodes[wanted] = operand
        self.unify_operands(expected, found)

    def compare(self, expected: Op, found: Op, node: fx.Node) -> None:
        if expected.name != found.name or len(expected.operands) != len(found.operands):
            raise self.mismatch(f"expected {expected}, found {found} at {node.name!r}", node)
        if expected.params != found.params:
            raise self.mismatch(f"expected {expected}, found {found} at {node.name!r}", node)

    def unify_operands(self, expected: Op, found: Op) -> None:
        wanted = [self.form.view.resolve(operand) for operand in expected.operands]
        orders = itertools.permutations(found.operands) if expected.commutative else [found.operands]
        first: _Mismatch | None = None
        for order in orders:
            kept = dict(self.roles), dict(self.nodes)
            try:
                for own, operand in zip(wanted, order, strict=True):
                    self.unify(own, operand)
                return
            except _Mismatch as miss:
                self.roles, self.nodes = kept
                first = miss if first is None or miss.matched > first.matched else first
        assert first is not None  # there is at least one order
        raise first

    def bind(self, role: str, operand: Operand) -> None:
        if (role in self.form.scalars) != is_scalar(operand):
            kind = "a number" if role in self.form.scalars else "a tensor"
            shown = operand.name if isinstance(operand, fx.Node) else repr(operand)
            nodes = (operand,) if isinstance(operand, fx.Node) else ()
            raise self.mismatch(f"{role} should be {kind}, found {shown}", *nodes)
        if self.roles.setdefault(role, operand) is not operand:
            raise self.mismatch(f"{role} stands for two different values")

    def descend(self, own: fx.Node, node: fx.Node) -> None:
        """Follow the pattern's path from ``own`` to its output; the graph must offer the same single path."""
        while own is not self.form.output:
            (below,) = self.form.view.users(own)
            users = self.view.users(node)
            if len(users) != 1:
                other = next((u for u in users if self.view.ops[u].name != self.form.view.ops[below].name), node)
                raise self.mismatch(used_outside(node, other), node, other)
            expected, found = self.form.view.ops[below], self.view.ops[users[0]]
            self.compare(expected, found, users[0])
            self.nodes[below] = users[0]
            self.unify_operands(expected, found)
            own, node = below, users[0]


def used_outside(node: fx.Node, user: fx.Node) -> str:
    """Why a region cannot be replaced: a sentence for the user."""
    if user.op == "output":
        return f"{node.name!r}, inside the attention, is returned to the caller (output_attentions, for instance)"
    return f"{node.name!r}, inside the attention, is also used by {user.name!r}"


__all__ = [
    "HIDES",
    "Attention",
    "Form",
    "Match",
    "NearMiss",
    "Pattern",
    "Term",
    "canonical_op",
    "same_size",
    "shape",
    "used_outside",
]
