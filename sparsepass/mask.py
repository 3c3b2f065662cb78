"""Recognizes the mask of an attention site from the graph that computes it: band, key padding, packed documents.

The mask is read symbolically (`sparsepass.mask_read`) into a conjunction of terms, and each term must be one that the
kernels know. What is returned describes the mask exactly, for every size that the graph accepts; anything else is a
`Skip` that names the term. No mask is sampled or materialized and no guard is added: sizes stay symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

import sparsepass.mask_views  # noqa: F401  registers the handlers of the reader
from sparsepass.mask_ir import Bool, Choice, Kind, Logic, Opaque, Pred, Prover, Size, Value, expr_of
from sparsepass.mask_mutation import mutated_nodes
from sparsepass.mask_read import ZERO, MaskReader, sizes_of, tensor_of, title
from sparsepass.mask_segments import numbers_runs_of
from sparsepass.types import UNBOUNDED, Align, Band, MaskSummary, Skip


@dataclass(frozen=True)
class MaskTerms:
    """An attention mask as the conjunction of its terms: a key is visible where all of them hold.

    With no padding and no segments, and a band that is unbounded on both sides, every key is visible.
    """

    band: Band
    padding: tuple[fx.Node, ...] = ()
    """Existing boolean nodes, True = key visible; all must hold. ``node.reshape(-1, kv_len)`` is [B or 1, Skv]: mostly
    the node has that shape already, it may also be [Skv] or have dimensions of size 1 in between ([B, 1, 1, Skv])."""
    segments: fx.Node | None = None
    """Existing integer node [B or 1, S] (Sq == Skv == S): a key is visible where its id is that of the query."""

    @property
    def summary(self) -> MaskSummary:
        """What the report says about the mask."""
        return MaskSummary(band=self.band, padding=bool(self.padding), packed=self.segments is not None)


def recognize_mask(mask: fx.Node, *, q_len: Size, kv_len: Size) -> MaskTerms | Skip:
    """Describe the node that an attention site takes as its mask.

    Args:
        mask: Node of a graph that Dynamo captured, whose tensor broadcasts to [B, H, Sq, Skv]: boolean with True =
            visible, or floating-point with 0 = visible and the dtype's lowest number or -inf = hidden.
        q_len: Query length Sq of the site.
        kv_len: Key length Skv of the site.

    Returns:
        The terms, equal to the mask at every element of every run of the graph; or a `Skip` with the reason. Rows that
        a floating-point mask hides entirely are the exception: softmax makes those uniform, hiding them gives 0.
    """
    tensor = tensor_of(mask)
    if tensor is None or not 1 <= tensor.dim() <= 4:
        return Skip(f"The attention mask '{mask.name}' is not a tensor of one to four dimensions.", (mask.name,))
    try:
        return _Recognizer(mask, tensor, q_len, kv_len).run()
    except _Refused as refused:
        return refused.skip
    except RecursionError:
        return Skip(f"The attention mask '{mask.name}' is computed by too deep a chain of operations.", (mask.name,))


class _Refused(Exception):
    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.skip = Skip(reason, tuple(dict.fromkeys(node.name for node in nodes)))


@dataclass
class _Found:
    """Bounds on ``key - query`` and the other terms, collected over the conjunction."""

    at_most: list[sympy.Expr] = field(default_factory=list)
    at_least: list[sympy.Expr] = field(default_factory=list)
    padding: list[fx.Node] = field(default_factory=list)
    segments: list[Opaque] = field(default_factory=list)
    """The segment ids as the query side reads them."""


class _Recognizer:
    def __init__(self, mask: fx.Node, tensor: torch.Tensor, q_len: Size, kv_len: Size) -> None:
        self.mask = mask
        self.dtype = tensor.dtype
        prover = Prover(next(_shape_envs(mask, tensor, q_len, kv_len), None))
        self.logic = Logic(())
        names = ("b", "h", "q", "k")
        variables = [self.logic.variable(name) for name in names]
        sizes = (ZERO + 1,) * (4 - tensor.dim()) + sizes_of(tensor)
        # A dimension that is not broadcast has the size of the scores, or the original program is in error.
        lengths = {2: expr_of(q_len), 3: expr_of(kv_len)}
        domain = {}
        for position, (variable, size) in enumerate(zip(variables, sizes, strict=True)):
            domain[variable] = lengths.get(position, size) if size == 1 else size
            if position in lengths and size.is_Integer and lengths[position].is_Integer and size != 1:
                if size != lengths[position]:
                    side = "queries" if position == 2 else "keys"
                    raise _Refused(
                        f"The attention mask '{mask.name}' has {size} {side}, the scores have {lengths[position]}.",
                        mask,
                    )
            elif position in lengths and size != 1 and not prover.equal(size, lengths[position]):
                if not prover.nonpositive(2 - size):
                    raise _Refused(
                        f"It is not known whether the mask '{mask.name}' is broadcast over its {size}.", mask
                    )
        index = tuple(ZERO if size == 1 else variable for variable, size in zip(variables, sizes, strict=True))
        self.index = index[4 - tensor.dim() :]
        self.b, self.h, self.q, self.k = variables
        self.reader = MaskReader(self.logic, prover, domain)
        self.reader.key = self.k
        self.reader.batch = self.b
        self.prover = prover
        self.offset = sympy.expand(domain[self.k] - domain[self.q])

    def run(self) -> MaskTerms:
        visible = self._visible(self.reader.read(self.mask, self.index))
        found = _Found()
        atoms = list(self._conjuncts(visible))
        # Documents first: they are what positions inside a document are understood by.
        for atom in atoms:
            if (ids := self._same_document(atom)) is not None:
                found.segments.append(ids)
        for atom in atoms:
            if self._same_document(atom) is None:
                self._classify(atom, found)
        segments = self._segments(found)
        terms = MaskTerms(self._band(found), tuple(dict.fromkeys(found.padding)), segments)
        self._check_unchanged()
        return terms

    def _visible(self, value: Value) -> Pred:
        """Where the mask lets a key through."""
        match value:
            case Bool(pred):
                return pred
            case Choice(pred, yes, no) if self.dtype.is_floating_point:
                meanings = [self._shows(number) for number in (yes, no)]
                if pred is self.logic.true or meanings[0] == meanings[1]:
                    return self.logic.true if meanings[0] else self.logic.false
                return pred if meanings[0] else self.logic.negate(pred)
        if not self.dtype.is_floating_point:
            raise _Refused(f"The mask '{self.mask.name}' holds integers, neither truth values nor a bias.", self.mask)
        why = next((opaque.why for opaque in self.logic.opaques.values()), "its values vary")
        raise _Refused(f"The mask '{self.mask.name}' is a bias with values of its own: {why}.", self.mask)

    def _shows(self, number: float) -> bool:
        if number == 0:
            return True
        if not math.isnan(number) and number <= torch.finfo(self.dtype).min:
            return False
        raise _Refused(
            f"The mask '{self.mask.name}' adds {number:g} to scores; only 0 (visible), and -inf or the lowest number "
            f"of {self.dtype} (hidden), are exact.",
            self.mask,
        )

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
                raise _Refused(f"The mask '{self.mask.name}' hides every key.", self.mask)
            elif term.kind is Kind.OR:
                rest = self._pruned(term)
                pending += [] if rest is self.logic.true else [rest] if rest is not term else []
                if rest is term:
                    yield term
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

    # Terms

    def _same_document(self, atom: Pred) -> Opaque | None:
        """The ids on the query side, if the term says that query and key have the same one."""
        if atom.kind is not Kind.EQ:
            return None
        pair = self._same_node(atom.expr)
        return pair[0] if pair is not None and pair[2] == 0 else None

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

    def _classify(self, atom: Pred, found: _Found) -> None:
        if atom.kind in (Kind.LE, Kind.EQ) and not self.logic.opaques_in(atom.expr) and self._bound(atom, found):
            return
        carrier = self.reader.carriers.get(atom)
        if atom.depends <= {self.b, self.k} and carrier is not None:
            found.padding.append(carrier.node)
            return
        if atom.kind is Kind.LE and self._bound_inside_documents(atom, found):
            return
        raise self._refusal(atom)

    def _bound(self, atom: Pred, found: _Found) -> bool:
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

    def _bound_inside_documents(self, atom: Pred, found: _Found) -> bool:
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

    def _refusal(self, atom: Pred) -> _Refused:
        """Why the term is none that the kernels know."""
        opaques = [] if atom.expr is None else self.logic.opaques_in(atom.expr)
        nodes = [opaque.node for opaque in opaques]
        for opaque in opaques:
            if opaque.what != "read":
                return _Refused(f"The mask is not a band: {opaque.why}.", *nodes)
        if self.h in atom.depends:
            return _Refused("The mask differs from head to head: " + self._cause(opaques), *nodes)
        if atom.kind is Kind.OR:
            return _Refused(
                f"The mask '{self.mask.name}' is a union of terms (an 'or'), not a conjunction of a band, key padding "
                "and segments.",
                self.mask,
            )
        if atom.depends <= {self.b, self.k} and self.k in atom.depends:
            what = self._cause(opaques) if opaques else "a limit on the key index."
            return _Refused(
                "A term of the mask depends on the key alone, but no boolean tensor of [batch, keys] in the graph "
                "holds it: " + what,
                *nodes,
            )
        if atom.kind is Kind.LE and len(opaques) == 1 and not opaques[0].depends & {self.q, self.k, self.h}:
            return _Refused("The offset between queries and keys is data: " + self._cause(opaques), *nodes)
        if atom.kind is Kind.LE and self._same_node(atom.expr) is not None:
            return _Refused(
                "The mask compares position ids that are data, and no segment term shows that they count up by one: "
                + self._cause(opaques),
                *nodes,
            )
        if opaques:
            return _Refused("A term of the mask is not understood: " + self._cause(opaques), *nodes)
        return _Refused(
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

    # Results

    def _segments(self, found: _Found) -> fx.Node | None:
        """The one node of segment ids, checked to be [B or 1, S]."""
        nodes = list(dict.fromkeys(ids.node for ids in found.segments))
        if not nodes:
            return None
        if len(nodes) > 1:
            raise _Refused("The mask compares several kinds of segment ids.", *nodes)
        ids, sizes = found.segments[0], sizes_of(tensor_of(nodes[0]))  # type: ignore[arg-type]
        lengths = (self.reader.domain[self.q], self.reader.domain[self.k])
        if (
            len(sizes) != 2
            or not all(self.prover.equal(sizes[1], length) for length in lengths)
            or not (
                sizes[0] == 1 or (ids.index[0] == self.b and self.prover.equal(sizes[0], self.reader.domain[self.b]))
            )
        ):
            raise _Refused(
                f"The segment ids {title(nodes[0])} are not [batch, length] of as many queries as keys.", nodes[0]
            )
        return nodes[0]

    def _band(self, found: _Found) -> Band:
        """The tightest bounds, as whole numbers from one of the two diagonals."""
        most = self._tightest(found.at_most, sign=1)
        least = self._tightest(found.at_least, sign=-1)
        if most is None and least is None:
            return Band()
        square = self.prover.equal(self.offset, ZERO)
        bands = []
        for align, start in ((Align.TOP_LEFT, ZERO), (Align.BOTTOM_RIGHT, self.offset)):
            right = UNBOUNDED if most is None else self._whole(most - start)
            left = UNBOUNDED if least is None else self._whole(start - least)
            if right is not None and left is not None:
                bands.append(Band(left=left, right=right, align=align))
            if square:
                break
        if bands:
            return next((band for band in bands if band.causal), bands[0])
        parts = [("below", most), ("above", least)]
        text = " and ".join(
            f"{'at most' if side == 'below' else 'at least'} query + ({bound})"
            for side, bound in parts
            if bound is not None
        )
        raise _Refused(
            f"The mask '{self.mask.name}' shows keys {text}, which is no fixed whole number of keys around the diagonal "
            f"from the first key or to the last one ({self.offset} more keys than queries).",
            self.mask,
        )

    def _tightest(self, bounds: list[sympy.Expr], sign: int) -> sympy.Expr | None:
        """The least of upper bounds (``sign`` 1), or the greatest of lower ones (-1)."""
        bounds = list(dict.fromkeys(self.prover.simplify(bound) for bound in bounds))
        for bound in bounds:
            if all(self.prover.nonpositive(sign * (bound - other)) for other in bounds):
                return bound
        if bounds:
            listed = ", ".join(map(str, bounds))
            raise _Refused(f"Which of the mask's bounds is the tightest is not known: {listed}.", self.mask)
        return None

    def _whole(self, expr: sympy.Expr) -> int | None:
        expr = self.prover.simplify(expr)
        if not expr.is_Integer and self.prover.equal(expr, ZERO):
            expr = ZERO
        return int(expr) if expr.is_Integer and expr >= 0 else None

    def _check_unchanged(self) -> None:
        mutated = mutated_nodes(self.mask.graph)
        for node in self.reader.visited:
            if node in mutated:
                raise _Refused(
                    f"The mask is computed from '{node.name}', which {title(mutated[node])} changes in place.", node
                )


def _shape_envs(
    mask: fx.Node, tensor: torch.Tensor, *lengths: Size
) -> Iterator[torch.fx.experimental.symbolic_shapes.ShapeEnv]:
    """The shape environment of the graph, wherever a symbol shows it."""
    for size in (*lengths, *tensor.shape):
        if isinstance(size, torch.SymInt):
            yield size.node.shape_env
    pending, seen = [mask], {mask}
    while pending:
        node = pending.pop()
        value = node.meta.get("example_value", node.meta.get("val"))
        parts = value.shape if isinstance(value, torch.Tensor) else (value,)
        for part in parts:
            if isinstance(part, torch.SymInt):
                yield part.node.shape_env
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
