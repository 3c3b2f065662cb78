"""Attention written out: a product of queries and keys, steps on the scores, a softmax, a product with the values.

Where a traced pattern fixes one spelling, this reads any: the steps above the softmax (``score_chain``), the dimensions
of both products (``products``, ``axes``), then what they mean together. Products are matmul, bmm, baddbmm or einsum, in
any layout, heads merged into the batch or not; steps are a scale, a soft cap, biases, masks in every form, sinks.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Op, Operand, called_name, is_scalar, value
from sparsepass.graph.sizes import same_size, shape
from sparsepass.patterns.axes import Atom, Axes, Dims, NotRegrouped
from sparsepass.patterns.below import Below, read_below
from sparsepass.patterns.gate import with_gate
from sparsepass.patterns.known import known_spelling
from sparsepass.patterns.pattern import Attention, Match, NearMiss, Pattern, Term, used_outside
from sparsepass.patterns.products import Product, product_of
from sparsepass.patterns.repeat_kv import both_without_repeat
from sparsepass.patterns.score_chain import Chain, Kind, NoProduct, Step, Unclear, read_chain
from sparsepass.types import Skip


@dataclass
class _Reading:
    """What the steps amount to: ``cap * tanh(scale * q k / cap)``, then the terms, then sinks."""

    scale: Operand = 1.0
    """A number, or what yields one: under ``dynamic=True`` a module's numbers are symbols."""
    outer: Operand = None
    """Factor behind the tanh, once there is one."""
    query_factors: list[tuple[Operand, Dims, float]] = field(default_factory=list)
    terms: list[tuple[Operand, Dims, float]] = field(default_factory=list)
    sink: tuple[Operand, Dims] | None = None
    constant: Operand = 0.0
    """Added to every score: the same to a softmax, but not to sinks."""


def check(match: Match) -> Attention | Skip | NearMiss:
    (softmax,) = match.nodes
    try:
        chain = read_chain(match.view, softmax)
    except NoProduct as unclear:
        known = known_spelling(match.view, softmax, unclear.reason)
        return Skip(known, unclear.nodes) if known else NearMiss("written_out", 0, unclear.reason, unclear.nodes)
    except Unclear as unclear:
        return _refused(match.view, softmax, unclear.reason, unclear.nodes)
    try:
        return _Assembly(match, softmax, chain).run()
    except Unclear as unclear:
        return _refused(match.view, softmax, unclear.reason, unclear.nodes)
    except NotRegrouped as moved:
        reason = f"the dimensions of this attention are not followed: {moved}"
        return _refused(match.view, softmax, reason, (softmax.name,))


def _refused(view: CanonicalGraph, softmax: fx.Node, reason: str, nodes: tuple[str, ...]) -> Skip:
    return Skip(known_spelling(view, softmax, reason) or reason, nodes)


class _Assembly:
    def __init__(self, match: Match, softmax: fx.Node, chain: Chain) -> None:
        self.view: CanonicalGraph = match.view
        self.maker = match.maker
        self.softmax = softmax
        self.chain = chain
        self.axes = Axes()
        self.reading = _Reading()

    def run(self) -> Attention:
        product = product_of(self.view, self.chain.product, self.axes)
        if product is None:
            raise Unclear(
                f"{self.chain.product.name!r} is no product of queries and keys over one dimension", self.chain.product
            )
        dims = self._scores(product)
        axis = dict(self.view.ops[self.softmax].params)["dim"]
        if not isinstance(axis, int) or len(self.axes.of(dims)[axis]) != 1:
            raise Unclear("the softmax is not over one dimension of the scores", self.softmax)
        (key_atom,) = self.axes.of(dims)[axis]
        below = read_below(self.view, self.softmax, self.axes, dims, key_atom, self.reading.sink is not None)
        if self.reading.sink is None:
            below = with_gate(self.view, self.softmax, below, self.axes, dims)
        self._check_inside(below)
        return self._attention(product, dims, key_atom, below)

    # The scores, from the product down

    def _scores(self, product: Product) -> Dims:
        """Takes in every step; returns the dims that the softmax sees."""
        dims, reading = product.out, self.reading
        reading.scale = product.alpha
        if product.added is not None and called_name(product.added) != "zeros":
            reading.terms.append((product.added, self.axes.seen(shape(product.added), dims), product.beta))
        for step in self.chain.steps:
            if reading.sink is not None and step.kind is not Kind.NOTHING:
                raise Unclear("the scores are changed after the sinks joined them", step.node)
            match step.kind:
                case Kind.VIEW:
                    dims = self._viewed(dims, step.node)
                case Kind.SCALE:
                    self._scaled(step, dims)
                case Kind.TANH:
                    if reading.outer is not None or reading.terms:
                        raise Unclear("the scores are capped after a mask or a bias is added to them", step.node)
                    reading.outer = 1.0
                case Kind.ADD | Kind.HIDE:
                    seen = self.axes.seen(shape(step.operand), dims)
                    sign = step.sign if step.kind is Kind.ADD else -step.sign
                    reading.terms.append((step.operand, seen, sign))
                case Kind.SINK:
                    reading.sink = step.operand, dims
                case Kind.NOTHING:
                    self._nothing(step)
        return dims

    def _nothing(self, step: Step) -> None:
        """A constant added inside a soft cap would matter, the row's maximum taken off before sinks join too."""
        later = {other.kind for other in self.chain.steps[self.chain.steps.index(step) :]}
        if Kind.TANH in later:
            raise Unclear("a constant is added to the scores before they are capped", step.node)
        if step.also and Kind.SINK in later:
            raise Unclear("the row's maximum is taken off the scores before sinks join them", step.node)
        if step.operand is not None and self.reading.sink is None:
            known = isinstance(step.operand, float) and isinstance(self.reading.constant, float)
            call = operator.add if known else functools.partial(self.maker.call, operator.add)
            self.reading.constant = call(self.reading.constant, step.operand)

    def _viewed(self, dims: Dims, node: fx.Node) -> Dims:
        op = self.view.ops[node]
        if op.name == "transpose":
            moved = list(dims)
            first, second = dict(op.params)["dims"]
            moved[first], moved[second] = moved[second], moved[first]
            return tuple(moved)
        if op.name == "permute":
            return tuple(dims[axis] for axis in dict(op.params)["dims"])
        return self.axes.viewed(dims, shape(node))

    def _scaled(self, step: Step, dims: Dims) -> None:
        reading, factor = self.reading, step.operand
        if isinstance(factor, float):
            if factor <= 0:
                raise Unclear(f"the scores are scaled by {factor:g}; a scale is above 0", step.node)
            self._multiply(factor, 1.0)
            reading.constant = self._by(reading.constant, factor)
            reading.terms = [(term, seen, self._times(term, sign, factor)) for term, seen, sign in reading.terms]
            return
        if is_scalar(factor):
            if reading.terms:
                raise Unclear("the scores are scaled by a dynamic number after a mask or a bias", step.node)
            self._multiply(factor, step.sign)
            reading.constant = self._by(reading.constant, factor, step.sign)
            return
        if reading.outer is not None or reading.terms:
            raise Unclear("the scores are scaled by a tensor after a cap, a mask or a bias", step.node)
        reading.query_factors.append((factor, self.axes.seen(shape(factor), dims), step.sign))

    def _multiply(self, factor: Operand, sign: float) -> None:
        """Scale what is there, before or after the cap; ``sign`` -1 divides."""
        if self.reading.outer is None:
            self.reading.scale = self._by(self.reading.scale, factor, sign)
        else:
            self.reading.outer = self._by(self.reading.outer, factor, sign)

    def _by(self, number: Operand, factor: Operand, sign: float = 1.0) -> Operand:
        target = operator.mul if sign > 0 else operator.truediv
        if isinstance(number, float) and isinstance(factor, float):
            return target(number, factor)
        if isinstance(number, float) and (number == 0.0 or (number == 1.0 and sign > 0)):
            return factor if number else number
        return self.maker.call(target, number, factor)

    @staticmethod
    def _times(term: Operand, sign: float, factor: float) -> float:
        return sign if _is_bool(term) else sign * factor

    # The whole

    def _check_inside(self, below: Below) -> None:
        inside = self._inside() | below.inside
        for node in sorted(inside - {below.output}, key=self.view.order.__getitem__):
            for user in self.view.users(node):
                if user not in inside:
                    raise Unclear(used_outside(node, user), node, user)

    def _inside(self) -> set[fx.Node]:
        found = {self.softmax, *self.view.parts.get(self.softmax, ()), self.chain.product}
        for step in self.chain.steps:
            found |= {step.node, *step.also}
        return found

    def _attention(self, product: Product, dims: Dims, key_atom: Atom, below: Below) -> Attention:
        axes = self.axes
        sides = [self._straight(product.left, product.left_dims), self._straight(product.right, product.right_dims)]
        holds = [any(key_atom in dim for dim in axes.of(side[1])) for side in sides]
        if sum(holds) != 1:
            raise Unclear("the softmax is over a dimension that is not one of the keys alone", self.softmax)
        (key, key_dims), (query, query_dims) = sides if holds[0] else sides[::-1]
        query_atoms = {atom for dim in axes.of(query_dims) for atom in dim}
        key_atoms = {atom for dim in axes.of(key_dims) for atom in dim}
        value_atoms = {atom for dim in axes.of(below.value_dims) for atom in dim}
        (summed,) = axes.of([(product.summed,)])[0]
        order = [atom for dim in axes.of(dims) for atom in dim]
        rows = [atom for atom in order if atom in query_atoms and atom not in key_atoms]
        if not rows:
            raise Unclear("the scores have no dimension of queries", self.chain.product)
        row = rows[-1]
        lead = [atom for atom in order if atom not in (row, key_atom)]
        batch, heads = _split(lead, key_atoms | value_atoms)
        shared = key_atoms | value_atoms
        if len(lead) == 1 and (found := self._unmerged(lead[0], query, query_dims, key, key_dims)) is not None:
            batch, heads = found
            shared |= {*batch, *heads}
        held = [atom for atom in heads if atom in shared]
        own = tuple(held) if tuple(heads[: len(held)]) == tuple(held) else tuple(heads)
        groups = (tuple(batch), tuple(heads), (row,))
        made_query = self._arranged(query, query_dims, (*groups, (summed,)))
        made_key = self._arranged(key, key_dims, (groups[0], own, (key_atom,), (summed,)))
        made_value = self._arranged(
            *self._straight(below.value, below.value_dims), (groups[0], own, (key_atom,), (below.size,))
        )
        made_query = self._with_factors(made_query, groups)
        whole = (*groups, (key_atom,))
        terms = tuple(Term(self._term(term, seen, whole), sign) for term, seen, sign in self.reading.terms)
        output, restore = self._output(below, (*groups, (below.size,)), made_query)
        scale, softcap = self.reading.scale, self.reading.outer
        if softcap is not None:
            scale = self._by(scale, softcap)
        made_key, made_value = both_without_repeat(self.view, made_key, made_value)
        return Attention(
            spelling="eager_softmax",
            query=made_query,
            key=made_key,
            value=made_value,
            output=output,
            scale=scale,
            masks=terms,
            softcap=softcap,
            sinks=self._sinks(below, groups),
            restore=restore,
            dropout_p=below.dropout_p,
            region=frozenset(self._inside() | below.inside | {output}),
        )

    def _straight(self, operand: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
        """The operand before its last two dimensions were swapped for the product."""
        node = self.view.resolve(operand)
        while (op := self.view.ops[node]).name == "transpose" and dict(op.params)["dims"] == (-2, -1):
            node, dims = self.view.resolve(op.operands[0]), (*dims[:-2], dims[-1], dims[-2])
        return node, dims

    def _unmerged(
        self, lead: Atom, query: fx.Node, query_dims: Dims, key: fx.Node, key_dims: Dims
    ) -> tuple[list[Atom], list[Atom]] | None:
        """[B * H, S, D] as it was before the merge, where a query of [B, H, S, D] was reshaped to it."""
        for operand, dims in ((query, query_dims), (key, key_dims)):
            origin = operand
            op = self.view.ops[origin]
            if op.name != "reshape" or self.axes.of(dims)[0] != (lead,) or len(shape(origin)) != 3:
                continue
            before, after = shape(self.view.resolve(op.operands[0])), shape(origin)
            merged = len(before) == 4 and all(same_size(a, b) for a, b in zip(before[2:], after[1:], strict=True))
            if merged and isinstance(before[1], int) and same_size(before[0] * before[1], after[0]):
                pair = self.axes.new(before[0]), self.axes.new(before[1])
                self.axes.parts[lead] = pair
                return [pair[0]], [pair[1]]
        return None

    def _arranged(self, source: Operand, dims: Dims, groups: Dims) -> Operand:
        steps = self.axes.steps(dims, groups)
        behind = source
        while steps and (op := self.view.ops[behind]).name in ("transpose", "permute"):
            behind, dims = self.view.resolve(op.operands[0]), _before(op, dims)
            if not self.axes.steps(dims, groups):
                return behind  # transposed only to be transposed back
        if len(steps) == 1 and steps[0][0] == "unflatten" and isinstance(source, fx.Node):
            before = self.view.ops[source]
            origin = self.view.resolve(before.operands[0]) if before.name == "reshape" else None
            if isinstance(origin, fx.Node) and _same_sizes(shape(origin), [self.axes.size(dim) for dim in groups]):
                return origin  # merged only to be split again
        return self._made(source, steps)

    def _made(self, source: Operand, steps: tuple[tuple[Any, ...], ...]) -> Operand:
        try:
            return self.maker.steps(source, steps)
        except Exception as error:
            raise NotRegrouped(f"{source.name!r}: {error}") from error

    def _with_factors(self, query: Operand, groups: Dims) -> Operand:
        for factor, seen, sign in self.reading.query_factors:
            arranged = self._made(factor, self.axes.steps(seen, (*groups, ()), fill=False))
            query = self.maker.call(torch.mul if sign > 0 else torch.div, query, arranged)
        return query

    def _term(self, term: Operand, seen: Dims, whole: Dims) -> Operand:
        """As it is where its dimensions are the last of the scores', else in their order."""
        expected = self.axes.of(whole)[4 - len(seen) :] if len(seen) <= 4 else None
        if expected is not None and all(
            not mine or mine == wanted for mine, wanted in zip(self.axes.of(seen), expected, strict=True)
        ):
            return term
        return self._made(term, self.axes.steps(seen, whole, fill=False))

    def _sinks(self, below: Below, groups: Dims) -> Operand | None:
        """[H], or [B or 1, H or 1, Sq or 1] where they are computed; ``groups``: the atoms of batch, heads, queries."""
        if below.sink is not None:
            operand, dims = below.sink
        elif self.reading.sink is not None:
            operand, dims = self.reading.sink
            dims = (*dims[:-1], ())
        else:
            return None
        source, kept = self._unexpanded(operand, self.axes.of(dims)[len(dims) - len(shape(operand)) :])
        by_head = all(atom in groups[1] for dim in kept for atom in dim)
        sinks = self._made(
            source, self.axes.steps(kept, (groups[1],)) if by_head else self.axes.steps(kept, groups, fill=False)
        )
        constant = self.reading.constant
        return sinks if isinstance(constant, float) and not constant else self.maker.call(torch.sub, sinks, constant)

    def _unexpanded(self, operand: Operand, dims: Dims) -> tuple[Operand, Dims]:
        """The tensor behind ``expand``, with no atom where it is broadcast."""
        node = self.view.resolve(operand)
        if isinstance(node, fx.Node) and self.view.ops[node].name == "expand":
            source = self.view.resolve(node.all_input_nodes[0])
            if len(shape(source)) == len(dims):
                pairs = zip(shape(source), dims, strict=True)
                return source, tuple(() if same_size(size, 1) else dim for size, dim in pairs)
        pairs = zip(shape(node), dims, strict=True)
        return node, tuple(() if same_size(size, 1) else dim for size, dim in pairs)

    def _output(self, below: Below, groups: Dims, query: Operand) -> tuple[fx.Node, tuple[tuple[Any, ...], ...]]:
        """The node to replace, and the calls that give its shape; a view back to four dimensions is taken along."""
        node, steps = below.output, self.axes.steps(groups, below.out)
        users = self.view.users(node)
        if steps and len(users) == 1 and self.view.ops[users[0]].name == "reshape":
            wanted = [self.axes.size(dim) for dim in groups]
            if _same_sizes(shape(users[0]), wanted) and all(len(dim) <= 1 for dim in self.axes.of(groups)):
                return users[0], ()
        if any(called_name(user) in ("view", "view_as") for user in node.users):
            steps = (*steps, ("contiguous",))  # the op lays heads out behind positions; such a view may not be possible
        return node, steps


def _before(op: Op, dims: Dims) -> Dims:
    """The dims that a transposed tensor had before."""
    order = list(range(len(dims)))
    if op.name == "transpose":
        first, second = dict(op.params)["dims"]
        order[first], order[second] = order[second], order[first]
    else:
        order = [axis % len(dims) for axis in dict(op.params)["dims"]]
    return tuple(dims[order.index(axis)] for axis in range(len(dims)))


def _split(lead: list[Atom], shared: set[Atom]) -> tuple[list[Atom], list[Atom]]:
    """Batch and heads of the leading dimensions: heads are the last, and those that share keys and values."""
    alone = 0
    while alone < len(lead) and lead[-1 - alone] not in shared:
        alone += 1
    cut = max(1, len(lead) - alone - 1)
    return lead[:cut], lead[cut:]


def _same_sizes(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


def _is_bool(operand: Operand) -> bool:
    return getattr(value(operand), "dtype", None) is torch.bool


WRITTEN_OUT = Pattern(name="written_out", anchor="softmax", check=check)
