"""Expressions that the elements of a mask are made of: integers, predicates, two-valued numbers over symbolic indices.

An element of a mask is a function of its indices (batch, head, query, key). Here it is a tree over sympy expressions:
``key - query <= 0`` for a causal mask. What is not such a function (a graph input, an operation that is not known) is
an `Opaque` symbol that remembers which node it reads at which indices. Nothing is ever evaluated at sample points.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._sympy.functions import Max, Min

Size = int | torch.SymInt
NOTHING = sympy.Integer(0)


def expr_of(size: Size) -> sympy.Expr:
    """A size or scalar as a sympy expression. Reads the symbol; never specializes it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


class Prover:
    """Facts about sizes that hold for every run of the graph, from the ranges and guards it has. It adds none."""

    def __init__(self, shape_env: ShapeEnv | None) -> None:
        self.shape_env = shape_env

    def nonpositive(self, expr: sympy.Expr) -> bool:
        """Whether ``expr <= 0`` is certain. ``False`` means not known."""
        expr = sympy.expand(expr)
        if expr.is_number:
            return bool(expr <= 0)
        if expr.is_nonpositive:
            return True
        if self.shape_env is None:
            return False
        slack = expr.as_coeff_Add()[0]  # guards are matched as they were written: try without a helpful constant too
        return any(
            statically_known_true(self.shape_env.create_symintnode(stronger, hint=None) <= 0)
            for stronger in ([expr, expr - slack] if slack < 0 else [expr])
        )

    def equal(self, left: sympy.Expr, right: sympy.Expr) -> bool:
        """Whether the two are certainly the same number."""
        if left == right:
            return True
        gap = sympy.expand(left - right)
        if gap.is_number:
            return bool(gap == 0)
        return self.nonpositive(gap) and self.nonpositive(-gap)

    def simplify(self, expr: sympy.Expr) -> sympy.Expr:
        """``expr`` expanded, with each ``Max`` and ``Min`` replaced by the argument known to win."""

        def decide(extreme: sympy.Expr) -> sympy.Expr:
            sign = 1 if isinstance(extreme, (Max, sympy.Max)) else -1
            for winner in extreme.args:
                if all(self.nonpositive(sign * (other - winner)) for other in extreme.args):
                    return winner
            return extreme

        if expr.has(Max, Min, sympy.Max, sympy.Min):
            expr = expr.replace(lambda part: isinstance(part, (Max, Min, sympy.Max, sympy.Min)), decide)
        return sympy.expand(expr)


@dataclass(frozen=True, eq=False)
class Opaque:
    """An element that is not an expression: ``node`` read at ``index``, or the function ``what`` of ``index``."""

    symbol: sympy.Symbol
    node: fx.Node
    index: tuple[sympy.Expr, ...]
    what: str
    """``read`` for an element of ``node``; otherwise the function, such as ``abs`` or ``floordiv``."""
    why: str
    """Sentence fragment: why it could not be expressed."""
    depends: frozenset[sympy.Symbol]
    """Index variables that it varies with."""


class Kind(StrEnum):
    TRUE = "true"
    FALSE = "false"
    LE = "le"  # expr <= 0
    EQ = "eq"  # expr == 0
    NE = "ne"  # expr != 0
    READ = "read"  # the opaque boolean `expr`
    NOT_READ = "not_read"
    AND = "and"
    OR = "or"


@dataclass(frozen=True, eq=False, slots=True)
class Pred:
    """A truth value. Interned by `Logic`: equal predicates are the same object, so graphs that share stay small."""

    kind: Kind
    expr: sympy.Expr = NOTHING
    parts: tuple[Pred, ...] = ()
    depends: frozenset[sympy.Symbol] = frozenset()


class Logic:
    """Builds predicates in negation normal form and knows the opaque symbols."""

    def __init__(self, indices: Iterable[sympy.Symbol]) -> None:
        self.indices = set(indices)
        self.opaques: dict[sympy.Symbol, Opaque] = {}
        self._opaque_keys: dict[tuple[object, ...], Opaque] = {}
        self._preds: dict[tuple[object, ...], Pred] = {}
        self._negated: dict[Pred, Pred] = {}
        self.true = Pred(Kind.TRUE)
        self.false = Pred(Kind.FALSE)
        self._negated[self.true] = self.false
        self._negated[self.false] = self.true

    def variable(self, name: str) -> sympy.Symbol:
        """A new index variable."""
        symbol = sympy.Dummy(name, integer=True, nonnegative=True)
        self.indices.add(symbol)
        return symbol

    def depends(self, expr: sympy.Expr) -> frozenset[sympy.Symbol]:
        """Index variables that ``expr`` varies with, through opaque symbols too."""
        found: set[sympy.Symbol] = set()
        for symbol in expr.free_symbols:
            if symbol in self.opaques:
                found |= self.opaques[symbol].depends
            elif symbol in self.indices:
                found.add(symbol)
        return frozenset(found)

    def opaques_in(self, expr: sympy.Expr) -> list[Opaque]:
        found = [self.opaques[symbol] for symbol in expr.free_symbols if symbol in self.opaques]
        return sorted(found, key=lambda opaque: opaque.symbol.name)

    def opaque(self, node: fx.Node, index: tuple[sympy.Expr, ...], why: str, what: str = "read") -> Opaque:
        """The symbol for ``node`` at ``index``; for a function (``what``), equal arguments give the same symbol."""
        key = (what, index) if what != "read" else (what, node, index)
        if key not in self._opaque_keys:
            depends = frozenset[sympy.Symbol]().union(*(self.depends(part) for part in index))
            symbol = sympy.Dummy(f"{what}{len(self.opaques)}", integer=True)
            made = Opaque(symbol, node, index, what, why, depends)
            self._opaque_keys[key] = self.opaques[symbol] = made
        return self._opaque_keys[key]

    def _intern(self, kind: Kind, expr: sympy.Expr, parts: tuple[Pred, ...]) -> Pred:
        key = (kind, expr, tuple(id(part) for part in parts))
        if key not in self._preds:
            depends = self.depends(expr)
            self._preds[key] = Pred(kind, expr, parts, depends.union(*(part.depends for part in parts)))
        return self._preds[key]

    def le_zero(self, expr: sympy.Expr) -> Pred:
        """``expr <= 0``; ``|x| + c <= 0`` is split into its two sides."""
        expr = sympy.expand(expr)
        if expr.is_number:
            return self.true if expr <= 0 else self.false
        for opaque in self.opaques_in(expr):
            if opaque.what == "abs" and expr.coeff(opaque.symbol) == 1:
                rest = expr - opaque.symbol
                return self.all_of(self.le_zero(opaque.index[0] + rest), self.le_zero(rest - opaque.index[0]))
        return self._intern(Kind.LE, expr, ())

    def eq_zero(self, expr: sympy.Expr) -> Pred:
        expr = sympy.expand(expr)
        if expr.is_number:
            return self.true if expr == 0 else self.false
        expr = min(expr, -expr, key=sympy.default_sort_key)
        return self._intern(Kind.EQ, expr, ())

    def read(self, opaque: Opaque) -> Pred:
        return self._intern(Kind.READ, opaque.symbol, ())

    def all_of(self, *parts: Pred) -> Pred:
        return self._join(Kind.AND, self.true, self.false, parts)

    def any_of(self, *parts: Pred) -> Pred:
        return self._join(Kind.OR, self.false, self.true, parts)

    def _join(self, kind: Kind, neutral: Pred, absorbing: Pred, parts: tuple[Pred, ...]) -> Pred:
        if absorbing in parts:
            return absorbing
        kept = tuple(dict.fromkeys(part for part in parts if part is not neutral))
        if len(kept) <= 1:
            return kept[0] if kept else neutral
        return self._intern(kind, NOTHING, kept)

    def negate(self, pred: Pred) -> Pred:
        """The opposite of ``pred``, with the negation pushed to the leaves."""
        if pred not in self._negated:
            made = self._negate(pred)
            self._negated[pred] = made
            self._negated.setdefault(made, pred)
        return self._negated[pred]

    def _negate(self, pred: Pred) -> Pred:
        if pred.kind is Kind.AND:
            return self.any_of(*(self.negate(part) for part in pred.parts))
        if pred.kind is Kind.OR:
            return self.all_of(*(self.negate(part) for part in pred.parts))
        if pred.kind is Kind.LE:
            return self.le_zero(1 - pred.expr)  # integers: not (e <= 0) is 1 - e <= 0
        opposite = {Kind.EQ: Kind.NE, Kind.NE: Kind.EQ, Kind.READ: Kind.NOT_READ, Kind.NOT_READ: Kind.READ}
        return self._intern(opposite[pred.kind], pred.expr, ())


@dataclass(frozen=True)
class Int:
    """An integer element."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Bool:
    """A truth value."""

    pred: Pred


@dataclass(frozen=True)
class Choice:
    """A number with two possible values, as additive masks have: ``yes`` where ``pred`` holds, else ``no``."""

    pred: Pred
    yes: float
    no: float


@dataclass(frozen=True)
class Unknown:
    """A floating-point element about which nothing is known."""

    opaque: Opaque


Value = Int | Bool | Choice | Unknown
