"""The terms of a mask: which part of its conjunction is a band, key padding or packed documents; why one is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy  # type: ignore[import-untyped]
from torch import fx

from sparsepass.masks.ir import Kind, Opaque, Pred
from sparsepass.masks.reader import ZERO, MaskReader, title
from sparsepass.masks.segments import numbers_runs_of
from sparsepass.types import Skip


class Refused(Exception):
    """The mask is none that the kernels know."""

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.skip = Skip(reason, tuple(dict.fromkeys(node.name for node in nodes)))


@dataclass
class Found:
    """Bounds on ``key - query`` and the other terms, collected over the conjunction."""

    at_most: list[sympy.Expr] = field(default_factory=list)
    at_least: list[sympy.Expr] = field(default_factory=list)
    padding: list[fx.Node] = field(default_factory=list)
    segments: list[Opaque] = field(default_factory=list)
    """The segment ids as the query side reads them."""
    chunks: list[fx.Node] = field(default_factory=list)
    """Nodes of the keys' chunk numbers, where attention stays within chunks of a fixed length."""


@dataclass
class TermReader:
    """Splits one mask, read over the indices ``b, h, q, k``, into its terms."""

    mask: fx.Node
    reader: MaskReader
    b: sympy.Symbol
    h: sympy.Symbol
    q: sympy.Symbol
    k: sympy.Symbol

    def __post_init__(self) -> None:
        self.logic = self.reader.logic
        self.prover = self.reader.prover

    def terms(self, visible: Pred) -> tuple[Found, fx.Node | None, Skip | None]:
        """The bounds and padding of ``visible``, the node of its segment ids, and why a term is none of these.

        Raises:
            Refused: nothing of the mask is understood.
        """
        found = Found()
        atoms = list(self._conjuncts(visible))
        # Documents first: they are what positions inside a document are understood by.
        for atom in atoms:
            if (ids := self._same_document(atom)) is not None:
                found.segments.append(ids)
            elif (chunks := self._same_chunk(atom)) is not None:
                found.chunks.append(chunks)
        refused: Skip | None = None
        for atom in atoms:
            if self._same_document(atom) is None and self._same_chunk(atom) is None:
                try:
                    self._classify(atom, found)
                except Refused as why:
                    refused = refused or why.skip
        try:
            return found, self._segments(found), refused
        except Refused as why:
            return found, None, refused or why.skip

    def _conjuncts(self, pred: Pred) -> Iterator[Pred]:
        """The terms of the conjunction that are not true everywhere."""
        pending, seen = [pred], set[Pred]()
        while pending:
            term = pending.pop()
            if term in seen:
                continue
            seen.add(term)
            if term.kind is Kind.AND:
                pending += reversed(term.parts)
            elif term.kind is Kind.FALSE:
                raise Refused(f"The mask '{self.mask.name}' hides every key.", self.mask)
            elif term.kind is Kind.OR and (rest := self._pruned(term)) is not term:
                pending.append(rest)
            elif not self._holds(term):
                yield term

    def _holds(self, term: Pred) -> bool:
        """Whether the term is true at every index, by the sizes alone."""
        if term.kind is Kind.TRUE:
            return True
        if term.kind is Kind.LE:
            return self.reader.never_positive(term.expr)
        if term.kind is Kind.EQ:
            return self.reader.never_positive(term.expr) and self.reader.never_positive(-term.expr)
        if term.kind is Kind.NE:
            return self.reader.never_positive(term.expr + 1) or self.reader.never_positive(1 - term.expr)
        return False

    def _pruned(self, union: Pred) -> Pred:
        """``union`` without the parts that are false everywhere; true if one of them is true everywhere."""
        if any(self._holds(part) for part in union.parts):
            return self.logic.true
        kept = [part for part in union.parts if not self._holds(self.logic.negate(part))]
        return union if len(kept) == len(union.parts) else self.logic.any_of(*kept)

    def _same_document(self, atom: Pred) -> Opaque | None:
        """The ids on the query side, if the term says that query and key have the same one."""
        if atom.kind is not Kind.EQ:
            return None
        pair = self._same_node(atom.expr)
        return pair[0] if pair is not None and pair[2] == 0 else None

    def _same_chunk(self, atom: Pred) -> fx.Node | None:
        """The keys' chunk numbers, if the term says that query and key are in one chunk of a fixed length.

        ``(key + a) // length == (query + a) // length`` with as many queries as keys: those numbers are segment ids.
        """
        if atom.kind is not Kind.EQ or not self.prover.equal(self.reader.domain[self.q], self.reader.domain[self.k]):
            return None
        opaques = self.logic.opaques_in(atom.expr)
        if len(opaques) != 2 or any(opaque.what != "floordiv" for opaque in opaques):
            return None
        query, key = sorted(opaques, key=lambda opaque: self.k in opaque.depends)
        if (
            sympy.expand(atom.expr - key.symbol + query.symbol) != 0
            and sympy.expand(atom.expr + key.symbol - query.symbol) != 0
        ):
            return None
        start = sympy.expand(key.index[0] - self.k)
        mirrored = tuple(sympy.expand(part.subs(self.k, self.q)) for part in key.index)
        same = mirrored == tuple(sympy.expand(part) for part in query.index)
        if not same or not start.is_Integer or start < 0 or not key.index[1].is_Integer:
            return None
        sizes = self.reader.sizes(key.node)
        fits = sizes and self.prover.equal(sizes[-1], self.reader.domain[self.k])
        return key.node if fits and all(size == 1 for size in sizes[:-1]) else None

    def _same_node(self, expr: sympy.Expr) -> tuple[Opaque, Opaque, sympy.Expr, int] | None:
        """``sign * (x[b, k] - x[b, q]) + rest`` as (x[b, q], x[b, k], rest, sign)."""
        opaques = self.logic.opaques_in(expr)
        if len(opaques) != 2 or any(opaque.what != "read" for opaque in opaques):
            return None
        first, second = opaques
        if first.node is not second.node:
            return None
        query, key = (first, second) if self.q in first.depends else (second, first)
        if (
            not query.index
            or query.index[-1] != self.q
            or key.index[-1] != self.k
            or query.index[:-1] != key.index[:-1]
        ):
            return None
        if not set(query.index[:-1]) <= {self.b, ZERO}:
            return None
        sign = expr.coeff(key.symbol, 1)
        rest = sympy.expand(expr - sign * (key.symbol - query.symbol))
        if sign not in (1, -1) or rest.has(key.symbol) or rest.has(query.symbol):
            return None
        return query, key, rest, int(sign)

    def _classify(self, atom: Pred, found: Found) -> None:
        if atom.kind in (Kind.LE, Kind.EQ) and not self.logic.opaques_in(atom.expr) and self._bound(atom, found):
            return
        carrier = self.reader.carriers.get(atom)
        if atom.depends <= {self.b, self.k} and carrier is not None:
            found.padding.append(carrier.node)
            return
        if atom.kind is Kind.LE and self._bound_inside_documents(atom, found):
            return
        raise self._refusal(atom)

    def _bound(self, atom: Pred, found: Found) -> bool:
        """Take in ``key - query <= c``, ``>= c`` or ``== c``."""
        slope = atom.expr.coeff(self.k, 1)
        rest = sympy.expand(atom.expr - slope * (self.k - self.q))
        if slope not in (1, -1) or self.logic.depends(rest):
            return False
        if slope == 1 or atom.kind is Kind.EQ:
            found.at_most.append(sympy.expand(-rest * slope))
        if slope == -1 or atom.kind is Kind.EQ:
            found.at_least.append(sympy.expand(rest if slope == -1 else -rest))
        return True

    def _bound_inside_documents(self, atom: Pred, found: Found) -> bool:
        """A bound on the distance of two user-given positions, where documents are the runs in which they rise by one.

        Within such a document the distance of positions is the distance of indices.
        """
        pair = self._same_node(atom.expr)
        if pair is None or self.logic.depends(pair[2]) or self.logic.opaques_in(pair[2]):
            return False
        query, _, rest, sign = pair
        if not any(numbers_runs_of(ids, query, self.reader) for ids in found.segments):
            return False
        inside = self.logic.le_zero(sign * (self.k - self.q) + rest)
        return inside.kind is Kind.TRUE or self._holds(inside) or self._bound(inside, found)

    def _refusal(self, atom: Pred) -> Refused:
        """Why the term is none that the kernels know."""
        opaques = self.logic.opaques_in(atom.expr)
        nodes = [opaque.node for opaque in opaques]
        for opaque in opaques:
            if opaque.what != "read":
                return Refused(f"The mask is not a band: {opaque.why}.", *nodes)
        if self.h in atom.depends:
            return Refused("The mask differs from head to head: " + self._cause(opaques), *nodes)
        if atom.kind is Kind.OR:
            return Refused(
                f"The mask '{self.mask.name}' is a union of terms (an 'or'), not a conjunction of a band, key padding "
                "and segments.",
                self.mask,
            )
        if atom.depends <= {self.b, self.k} and self.k in atom.depends:
            what = self._cause(opaques) if opaques else "a limit on the key index."
            return Refused(
                "A term of the mask depends on the key alone, but no boolean tensor of [batch, keys] in the graph "
                "holds it: " + what,
                *nodes,
            )
        if atom.kind is Kind.LE and len(opaques) == 1 and not opaques[0].depends & {self.q, self.k, self.h}:
            return Refused("The offset between queries and keys is data: " + self._cause(opaques), *nodes)
        if atom.kind is Kind.LE and self._same_node(atom.expr) is not None:
            return Refused(
                "The mask compares position ids that are data, and no segment term shows that they count up by one: "
                + self._cause(opaques),
                *nodes,
            )
        if opaques:
            return Refused("A term of the mask is not understood: " + self._cause(opaques), *nodes)
        return Refused(
            f"The mask '{self.mask.name}' has a term that is not a band along the diagonal: {self._text(atom)}.",
            self.mask,
        )

    @staticmethod
    def _cause(opaques: list[Opaque]) -> str:
        return "; ".join(dict.fromkeys(opaque.why for opaque in opaques)) + "." if opaques else "a term of its own."

    def _text(self, atom: Pred) -> str:
        names = {symbol: sympy.Symbol(symbol.name) for symbol in self.logic.indices}
        relation = {Kind.LE: "<= 0", Kind.EQ: "== 0", Kind.NE: "!= 0"}.get(atom.kind, "")
        return f"{atom.expr.subs(names)} {relation}".strip()

    def _segments(self, found: Found) -> fx.Node | None:
        """The one node of segment ids, checked to be [B or 1, S]."""
        nodes = list(dict.fromkeys([*(ids.node for ids in found.segments), *found.chunks]))
        if not nodes:
            return None
        if nodes == found.chunks:
            return nodes[0]
        if len(nodes) > 1:
            raise Refused("The mask compares several kinds of segment ids.", *nodes)
        ids, sizes = found.segments[0], self.reader.sizes(nodes[0])
        lengths = (self.reader.domain[self.q], self.reader.domain[self.k])
        fits = len(sizes) == 2 and all(self.prover.equal(sizes[1], length) for length in lengths)
        if fits and sizes[0] != 1:
            fits = ids.index[0] == self.b and self.prover.equal(sizes[0], self.reader.domain[self.b])
        if not fits:
            raise Refused(
                f"The segment ids {title(nodes[0])} are not [batch, length] of as many queries as keys.", nodes[0]
            )
        return nodes[0]
