"""Recognizes the mask of an attention site from the graph that computes it: band, key padding, packed documents.

The mask is read symbolically (`sparsepass.masks.reader`) into a conjunction of terms, and each term must be one that
the kernels know. What is returned describes the mask exactly, for every size that the graph accepts; anything else is a
`Skip` that names the term. No mask is sampled or materialized and no guard is added: sizes stay symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sparsepass.masks.views  # noqa: F401  registers the handlers of the reader
from sparsepass.graph.canonical import Operand, canonical_op, mutates, value
from sparsepass.graph.mutation import mutated_nodes, touched_by
from sparsepass.graph.sizes import same_size
from sparsepass.masks.ir import Bool, Choice, Logic, Pred, Prover, Size, Value, expr_of
from sparsepass.masks.reader import ONE, ZERO, MaskReader, sizes_of, tensor_of, title
from sparsepass.masks.terms import Found, Refused, TermReader
from sparsepass.patterns.pattern import HIDES, Term
from sparsepass.types import UNBOUNDED, Align, Band, MaskSummary, Skip


@dataclass(frozen=True)
class MaskTerms:
    """An attention mask as the conjunction of its terms: a key is visible where all of them hold.

    With no padding and no segments, and a band that is unbounded on both sides, every key is visible.
    """

    band: Band
    padding: tuple[fx.Node, ...] = ()
    """Existing boolean nodes, True = key visible; all must hold. Mostly [B or 1, Skv], but one may also be [Skv], have
    dimensions of size 1 in between ([B, 1, 1, Skv]) or more keys at the end: always right is
    ``node.reshape(-1, node.shape[-1])[:, :kv_len]``."""
    segments: fx.Node | None = None
    """Existing integer node [B or 1, S] (Sq == Skv == S): a key is visible where its id is that of the query. Like
    padding it may have other dimensions of size 1."""

    whole: tuple[Term, ...] = ()
    """Tensors that are not understood, or not only: they act besides the other terms, each [B|1, H|1, Sq|1, Skv|1] once
    dimensions of 1 are put in front."""
    why: tuple[Skip, ...] = ()
    """Why each of them is not understood."""

    @property
    def summary(self) -> MaskSummary:
        """What the report says about the mask."""
        kinds = [is_bool(term.operand) for term in self.whole]
        return MaskSummary(
            band=self.band,
            padding=bool(self.padding),
            packed=self.segments is not None,
            tensor=any(kinds),
            bias=not all(kinds),
        )


def recognize_mask(mask: fx.Node, *, q_len: Size, kv_len: Size) -> MaskTerms | Skip:
    """Describe the node that an attention site takes as its mask, without any tensor that is not understood.

    Args:
        mask: Node of a graph that Dynamo captured, whose tensor broadcasts to [B, H, Sq, Skv]: boolean with True =
            visible, or floating-point with 0 = visible and ``HIDES`` or less = hidden.
        q_len: Query length Sq of the site.
        kv_len: Key length Skv of the site.

    Returns:
        The terms, equal to the mask at every element of every run of the graph; or a `Skip` with the reason. Rows that
        a floating-point mask hides entirely are the exception: softmax makes those uniform, hiding them gives 0.
    """
    terms = recognize_masks((Term(mask),), q_len=q_len, kv_len=kv_len)
    return terms.why[0] if terms.why else terms


def recognize_masks(
    masks: tuple[Term, ...], *, q_len: Size, kv_len: Size, is_causal: bool = False, split: bool = False
) -> MaskTerms:
    """Describe all that is added to the scores of a site or hides keys there, and holds together.

    What is not understood is in ``whole``; bounds of it that are understood still are in the band. ``split``: a sum
    that is not understood is taken apart. ``is_causal``: key <= query, counted from the first, holds besides.
    """
    pending, parts = list(masks), list[Term]()
    read: list[tuple[Term, _Reading]] = []
    while pending:
        term = pending.pop(0)
        reading = _read(term, q_len, kv_len)
        inner = _summands(term) if split and reading.values else None
        if inner is not None:
            pending[:0] = inner
            continue
        parts.append(term)
        read.append((term, reading))
    try:
        return _together(read, q_len, kv_len, is_causal)
    except Refused as refused:  # two that do not go together, such as two kinds of segments: each on its own
        whole = tuple(term for term, _ in read)
        return MaskTerms(Band(right=0) if is_causal else Band(), whole=whole, why=(refused.skip,) * len(whole))


def is_bool(operand: Operand) -> bool:
    """Whether an operand is a boolean tensor, rather than numbers to be added."""
    held = value(operand)
    return isinstance(held, torch.Tensor) and held.dtype is torch.bool


@dataclass
class _Reading:
    """One mask as far as it is understood."""

    found: Found | None = None
    recognizer: _Recognizer | None = None
    segments: fx.Node | None = None
    refused: Skip | None = None
    values: bool = False
    """It holds numbers of its own."""


def _read(term: Term, q_len: Size, kv_len: Size) -> _Reading:
    mask = term.operand
    if not isinstance(mask, fx.Node):
        return _Reading(refused=Skip(f"'{mask.name}' is rearranged to [batch, heads, queries, keys]", (mask.name,)))
    tensor = tensor_of(mask)
    if tensor is None or not 1 <= tensor.dim() <= 4:
        skip = Skip(f"The attention mask '{mask.name}' is not a tensor of one to four dimensions.", (mask.name,))
        return _Reading(refused=skip)
    try:
        return _Recognizer(mask, tensor, q_len, kv_len, term.sign).run()
    except _Values as refused:
        return _Reading(refused=refused.skip, values=True)
    except Refused as refused:
        return _Reading(refused=refused.skip)
    except RecursionError:
        return _Reading(
            refused=Skip(
                f"The attention mask '{mask.name}' is computed by too deep a chain of operations.", (mask.name,)
            )
        )


def _summands(term: Term) -> list[Term] | None:
    """The two tensors whose sum (or difference) a float term is."""
    node = term.operand
    if not isinstance(node, fx.Node):
        return None
    op = canonical_op(node)
    if op.name not in ("add", "sub") or mutates(node) or not all(tensor_of(one) is not None for one in op.operands):
        return None
    if any(not value(one).is_floating_point() for one in op.operands):
        return None
    signs = (term.sign, term.sign if op.name == "add" else -term.sign)
    return [Term(one, sign) for one, sign in zip(op.operands, signs, strict=True)]


def _together(read: list[tuple[Term, _Reading]], q_len: Size, kv_len: Size, is_causal: bool) -> MaskTerms:
    bands, padding, whole, why = [Band(right=0)] if is_causal else [], list[fx.Node](), list[Term](), list[Skip]()
    segments: fx.Node | None = None
    for term, reading in read:
        if reading.refused is not None:
            whole.append(term)
            why.append(reading.refused)
        if reading.found is None or reading.recognizer is None:
            continue
        bands.append(reading.recognizer.band(reading.found))
        if reading.refused is not None:
            continue
        padding += reading.found.padding
        if reading.segments is not None:
            if segments not in (None, reading.segments):
                raise Refused("The masks compare several kinds of segment ids.", reading.segments)
            segments = reading.segments
    return MaskTerms(
        _tightest(bands, same_size(q_len, kv_len)), tuple(dict.fromkeys(padding)), segments, tuple(whole), tuple(why)
    )


def _tightest(bands: list[Band], square: bool) -> Band:
    """The band that all of them leave."""
    bounded = [band for band in bands if band != Band()]
    if not bounded:
        return Band()
    aligned = {band.align for band in bounded}
    if len(aligned) > 1 and not square:
        raise Refused("The masks have bands from different corners.")
    lefts = [band.left for band in bounded if band.left != UNBOUNDED]
    rights = [band.right for band in bounded if band.right != UNBOUNDED]
    align = Align.TOP_LEFT if square else bounded[0].align
    return Band(left=min(lefts, default=UNBOUNDED), right=min(rights, default=UNBOUNDED), align=align)


class _Values(Refused):
    """The mask holds numbers of its own: a bias."""


class _Recognizer:
    def __init__(self, mask: fx.Node, tensor: torch.Tensor, q_len: Size, kv_len: Size, sign: float = 1.0) -> None:
        self.mask = mask
        self.sign = sign
        self.dtype = tensor.dtype
        self.logic = Logic(())
        self.prover = Prover(next(_shape_envs(mask, tensor, q_len, kv_len), None))
        variables = [self.logic.variable(name) for name in ("b", "h", "q", "k")]
        sizes = (ONE,) * (4 - tensor.dim()) + sizes_of(tensor)
        index = tuple(ZERO if size == 1 else variable for variable, size in zip(variables, sizes, strict=True))
        self.index = index[4 - tensor.dim() :]
        queries = self._length(sizes[2], expr_of(q_len), "queries")
        keys = self._length(sizes[3], expr_of(kv_len), "keys")
        domain = dict(zip(variables, (*sizes[:2], queries, keys), strict=True))
        self.offset = sympy.expand(keys - queries)
        self.reader = MaskReader(self.logic, self.prover, domain, batch=variables[0], key=variables[3])
        self.terms = TermReader(mask, self.reader, *variables)

    def _length(self, size: sympy.Expr, length: sympy.Expr, side: str) -> sympy.Expr:
        """Number of ``side``: the mask's own, unless it is broadcast over them.

        Where the two are not known to be equal they are so in any run that the original program survives.
        """
        if size == 1:
            return length
        if size.is_Integer and length.is_Integer and size != length:
            raise Refused(f"The mask '{self.mask.name}' has {size} {side}, the scores have {length}.", self.mask)
        if not self.prover.equal(size, length) and not self.prover.nonpositive(2 - size):
            raise Refused(f"It is not known whether the mask '{self.mask.name}' has 1 or {length} {side}.", self.mask)
        return size

    def run(self) -> _Reading:
        visible = self._visible(self.reader.read(self.mask, self.index))
        found, segments, refused = self.terms.terms(visible)
        self._check_unchanged(found, segments)
        try:
            self.band(found)
        except Refused as unbounded:
            return _Reading(refused=unbounded.skip)
        return _Reading(found, self, segments, refused)

    def _visible(self, value: Value) -> Pred:
        """Where the mask lets a key through."""
        match value:
            case Bool(pred) if self.dtype is torch.bool:
                return pred if self.sign > 0 else self.logic.negate(pred)
            case Choice(pred, yes, no) if self.dtype.is_floating_point:
                meanings = [self._shows(number) for number in (yes, no)]
                if pred is self.logic.true or meanings[0] == meanings[1]:
                    return self.logic.true if meanings[0] else self.logic.false
                return pred if meanings[0] else self.logic.negate(pred)
        if not self.dtype.is_floating_point:
            raise Refused(f"The mask '{self.mask.name}' holds integers, neither truth values nor a bias.", self.mask)
        why = next((opaque.why for opaque in self.logic.opaques.values()), "its values vary")
        raise _Values(f"The mask '{self.mask.name}' is a bias with values of its own: {why}.", self.mask)

    def _shows(self, number: float) -> bool:
        if number == 0:
            return True
        if self.sign * number <= HIDES:
            return False
        raise _Values(
            f"The mask '{self.mask.name}' adds {number:g} to scores; only 0 (visible), and {HIDES:g} or less (hidden), "
            "is exact.",
            self.mask,
        )

    def band(self, found: Found) -> Band:
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
        bounds = [f"up to {most}"] * (most is not None) + [f"from {least}"] * (least is not None)
        raise Refused(
            f"The mask '{self.mask.name}' shows keys {' and '.join(bounds)} relative to the query. That is no fixed "
            f"whole number on both sides of the diagonal, be it from the first key or (shifted by {self.offset}) to "
            "the last: a strict bound, an offset of another kind, or a window that is a dynamic integer (mark it "
            "static).",
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
            raise Refused(f"Which of the mask's bounds is the tightest is not known: {listed}.", self.mask)
        return None

    def _whole(self, expr: sympy.Expr) -> int | None:
        expr = self.prover.simplify(expr)
        if not expr.is_Integer and self.prover.equal(expr, ZERO):
            expr = ZERO
        return int(expr) if expr.is_Integer and expr >= 0 else None

    def _check_unchanged(self, found: Found, segments: fx.Node | None) -> None:
        """Refuse a mask that is read from, or described by, memory that the graph has written to by then."""
        visited = self.reader.visited
        kept = {self.mask, *found.padding} | ({segments} if segments is not None else set())
        if not visited & mutated_nodes(self.mask.graph).keys():
            return
        order = {node: position for position, node in enumerate(self.mask.graph.nodes)}
        for writer in order:
            for node in visited & touched_by(writer).keys():
                if node is writer:
                    continue  # read as the operation that it is, of what was there before
                late = any(user in visited and order[user] > order[writer] for user in node.users)
                if late or (node in kept and order[node] < order[writer]):
                    raise Refused(f"The mask depends on '{node.name}', which {title(writer)} changes in place.", node)


def _shape_envs(mask: fx.Node, tensor: torch.Tensor, *lengths: Size) -> Iterator[ShapeEnv]:
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
