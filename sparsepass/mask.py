"""Recognizes the mask of an attention site from the graph that computes it: band, key padding, packed documents.

The mask is read symbolically (`sparsepass.mask_read`) into a conjunction of terms, and each term must be one that the
kernels know. What is returned describes the mask exactly, for every size that the graph accepts; anything else is a
`Skip` that names the term. No mask is sampled or materialized and no guard is added: sizes stay symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import sparsepass.mask_views  # noqa: F401  registers the handlers of the reader
from sparsepass.mask_ir import Bool, Choice, Logic, Pred, Prover, Size, Value, expr_of
from sparsepass.mask_mutation import mutated_nodes
from sparsepass.mask_read import ONE, ZERO, MaskReader, sizes_of, tensor_of, title
from sparsepass.mask_terms import Found, Refused, TermReader
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
    except Refused as refused:
        return refused.skip
    except RecursionError:
        return Skip(f"The attention mask '{mask.name}' is computed by too deep a chain of operations.", (mask.name,))


class _Recognizer:
    def __init__(self, mask: fx.Node, tensor: torch.Tensor, q_len: Size, kv_len: Size) -> None:
        self.mask = mask
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

    def run(self) -> MaskTerms:
        visible = self._visible(self.reader.read(self.mask, self.index))
        found, segments = self.terms.terms(visible)
        terms = MaskTerms(self._band(found), tuple(dict.fromkeys(found.padding)), segments)
        self._check_unchanged(terms)
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
            raise Refused(f"The mask '{self.mask.name}' holds integers, neither truth values nor a bias.", self.mask)
        why = next((opaque.why for opaque in self.logic.opaques.values()), "its values vary")
        raise Refused(f"The mask '{self.mask.name}' is a bias with values of its own: {why}.", self.mask)

    def _shows(self, number: float) -> bool:
        if number == 0:
            return True
        if not math.isnan(number) and number <= torch.finfo(self.dtype).min:
            return False
        raise Refused(
            f"The mask '{self.mask.name}' adds {number:g} to scores; only 0 (visible), and -inf or the lowest number "
            f"of {self.dtype} (hidden), are exact.",
            self.mask,
        )

    def _band(self, found: Found) -> Band:
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

    def _check_unchanged(self, terms: MaskTerms) -> None:
        """Refuse a mask that is read from, or described by, memory that the graph has written to by then."""
        written = mutated_nodes(self.mask.graph)
        visited = self.reader.visited
        order = {node: position for position, node in enumerate(self.mask.graph.nodes)} if written else {}
        for node in visited & written.keys():
            writer = written[node]
            late = any(user in visited and order[user] >= order[writer] for user in node.users)
            if late or node in (self.mask, terms.segments, *terms.padding):
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
