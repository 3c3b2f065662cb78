"""Replace planned sites in a graph. The only module that mutates one, and only a clone of what Dynamo captured.

Nothing is erased but the replaced node: what it needed alone is dead code, which AOTAutograd drops. Dead code is not
eliminated here, because a Dynamo graph holds writes (``index_copy_`` into a cache) that no node reads; without a
compiler ``drop_dead_masks`` takes the masks out.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from sparsepass.graph.canonical import METADATA_CHECK, SDPA, Made, Operand, called_name, mutates, nodes_of, value
from sparsepass.graph.mutation import mutated_nodes
from sparsepass.graph.sizes import same_size, shape
from sparsepass.graph.strides import lies_alike, restoring, unaware_readers
from sparsepass.masks.recognize import MaskTerms, is_bool
from sparsepass.patterns.pattern import Attention, Term
from sparsepass.planning.site import budget_text, by_row
from sparsepass.request.hints import parse_hint_text
from sparsepass.rewriting.ops import SPARSE_ATTENTION, WATCHED_ATTENTION, default_scale
from sparsepass.sites import FoundSite
from sparsepass.types import EXACT, Align, PlanEntry, Rows


@dataclass(frozen=True)
class RowsInput:
    """An input that the rewritten graph has besides those of the captured one: the class number of each row, int32."""

    device: str
    size: int | torch.SymInt = field(compare=False)
    """Rows of the batch, as the graph knows it."""
    size_text: str
    own: Rows | None
    """Given inside the compiled region; None: those of the hint in force at each call."""


@dataclass
class Rewriter:
    """Applies a plan to one graph; ``slot`` numbers the counters of its sites."""

    graph: fx.Graph
    nodes: dict[fx.Node, fx.Node]
    """From the nodes that the findings speak of to the nodes of this graph."""
    slot: int
    sampled: int = 0
    """Query rows whose kept attention mass is measured at each sparse site; 0: nothing is measured."""
    masses: dict[int, fx.Node] = field(default_factory=dict)
    """What those rows kept, by the site's index: further outputs of the graph."""
    replaced: dict[str, fx.Node] = field(default_factory=dict)
    """New node by the site's name."""
    rows: dict[RowsInput, fx.Node] = field(default_factory=dict)
    """The inputs added for mixed batches, in the order in which they follow the graph's own."""
    _segments: dict[tuple[object, ...], tuple[fx.Node | None, fx.Node]] = field(default_factory=dict)
    _made: dict[Made, fx.Node] = field(default_factory=dict)
    _terms: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    @cached_property
    def _written(self) -> dict[fx.Node, fx.Node]:
        """Nodes of the captured graph that are written to: what is made of them holds at one place only."""
        return mutated_nodes(next(iter(self.nodes)).graph)

    @torch.no_grad()
    def apply(self, sites: Sequence[FoundSite], entries: Sequence[PlanEntry]) -> None:
        """Replace the sites that are planned to be. None of them needs gradients, whatever mode the caller is in."""
        for found, entry in zip(sites, entries, strict=True):
            if not entry.rewritten:
                continue
            old = self.nodes[found.attention.output]
            with self.graph.inserting_before(old):
                new = self._dense(found) if entry.budget.dense else self._sparse(found, entry)
                for target, *rest in found.attention.restore:
                    new = self._call(target, new, *(self._node(one) for one in rest))
                new = self._laid_out(new, old)
            new.meta = {**old.meta, "example_value": value(new)}
            old.replace_all_uses_with(new)
            self._drop_checks(found.attention)
            self.graph.erase_node(old)
            self.nodes[found.attention.output] = new  # a later site may read it
            self.replaced[found.site.name] = new
        if self.masses:
            output = next(iter(reversed(self.graph.nodes)))
            output.args = ((*output.args[0], *self.masses.values()),)

    def _drop_checks(self, attention: Attention) -> None:
        """An exported program's checks of types would keep alive what is computed no more."""
        for inside in attention.region - {attention.output}:
            for user in list(self.nodes[inside].users):
                if called_name(user) == METADATA_CHECK:
                    self.graph.erase_node(user)

    def _laid_out(self, new: fx.Node, old: fx.Node) -> fx.Node:
        """``new`` with the strides of ``old``; as it is where nothing can tell, which saves a copy."""
        if lies_alike(value(new), value(old)):
            return new
        if (changed := unaware_readers(old, value(new))) is not None:
            for reader, held in changed.items():
                reader.meta["example_value"] = held
            return new
        steps = restoring(value(old))
        assert steps is not None  # the site is refused otherwise
        for target, *rest in steps:
            new = self._call(target, new, *rest)
        return new

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call (of a function, or of a method where ``target`` is a name) and record what it yields."""
        values = fx.node.map_arg((args, kwargs), value)
        if isinstance(target, str):
            node = self.graph.call_method(target, args, kwargs)
            node.meta["example_value"] = getattr(values[0][0], target)(*values[0][1:], **values[1])
        else:
            node = self.graph.call_function(target, args, kwargs)
            node.meta["example_value"] = target(*values[0], **values[1])
        return node

    def _node(self, operand: Operand) -> Any:
        """The node of this graph that holds an operand; what is to be made is added, once for all sites."""
        if isinstance(operand, tuple | list):
            return type(operand)(self._node(part) for part in operand)
        if not isinstance(operand, Made):
            return self.nodes[operand] if isinstance(operand, fx.Node) else operand
        if operand in self._made:
            return self._made[operand]
        args = [self._node(one) for one in operand.args]
        node = self._call(operand.target, *args, **{name: self._node(one) for name, one in operand.kwargs.items()})
        if not any(source in self._written for source in nodes_of(operand)):
            self._made[operand] = node
        return node

    def _operands(self, attention: Attention) -> list[fx.Node]:
        """Query, key and value in the type of the output: under autocast they can differ, and SDPA promotes."""
        dtype = value(attention.output).dtype
        nodes = [(self._node(operand), value(operand).dtype) for operand in attention.operands]
        return [node if held == dtype else self._call("to", node, dtype) for node, held in nodes]

    def _scale(self, attention: Attention) -> Any:
        if attention.scale is None:
            return default_scale(int(shape(attention.query)[3]))
        return self._number(attention.scale)

    def _number(self, given: Operand) -> Any:
        return float(given) if isinstance(given, int | float) else self._node(given)

    def _dense(self, found: FoundSite) -> fx.Node:
        """SDPA without the mask tensor: the dense kernel at dense speed."""
        terms = found.terms
        assert isinstance(terms, MaskTerms)  # the plan rewrites no other
        arguments = {
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": terms.band.causal,
            "scale": self._scale(found.attention),
            "enable_gqa": found.site.grouped,
        }
        return self._call(SDPA, *self._operands(found.attention), **arguments)

    def _sparse(self, found: FoundSite, entry: PlanEntry) -> fx.Node:
        terms = found.terms
        assert isinstance(terms, MaskTerms)  # the plan rewrites no other
        q_segments, kv_segments = self._segment_nodes(found, terms)
        band = terms.band
        arguments = (
            *self._operands(found.attention),
            q_segments,
            kv_segments,
            self._scale(found.attention),
            band.left,
            band.right,
            band.align is Align.BOTTOM_RIGHT,
            budget_text(entry.budget),
            self.slot + found.site.index,
            self._rows_input(found) if by_row(entry.budget) else None,
        )
        scores = self._scores(found.attention, terms)
        if not self.sampled or entry.budget == EXACT:
            return self._call(SPARSE_ATTENTION, *arguments, **scores)
        both = self._call(WATCHED_ATTENTION, *arguments, **scores, sampled=self.sampled)
        self.masses[found.site.index] = self._call(operator.getitem, both, 1)
        return self._call(operator.getitem, both, 0)

    def _scores(self, attention: Attention, terms: MaskTerms) -> dict[str, Any]:
        """What happens to the scores besides the recognized mask, as arguments of the op."""
        given: dict[str, Any] = {}
        if attention.softcap is not None:
            given["softcap"] = self._number(attention.softcap)
        if attention.sinks is not None:
            given["sinks"] = self._node(attention.sinks)
        for name, wanted, join in (("mask", True, torch.logical_and), ("bias", False, torch.add)):
            parts = [term for term in terms.whole if is_bool(term.operand) == wanted]
            if parts:
                given[name] = self._joined(parts, join)
        return given

    def _joined(self, parts: list[Term], join: Any) -> fx.Node:
        """All parts as one tensor of four dimensions, made once for the layers that share them."""
        key = tuple((term.operand, term.sign) for term in parts)
        if key in self._terms:
            return self._terms[key]
        joined: fx.Node | None = None
        for term in parts:
            one = self._part(term)
            joined = one if joined is None else self._call(join, joined, one)
        assert joined is not None  # there is a part
        if not any(node in self._written for term in parts for node in nodes_of(term.operand)):
            self._terms[key] = joined
        return joined

    def _part(self, term: Term) -> fx.Node:
        node: fx.Node = self._node(term.operand)
        for _ in range(4 - value(node).dim()):
            node = self._call("unsqueeze", node, 0)
        if is_bool(term.operand):
            return node if term.sign > 0 else self._call("logical_not", node)
        if not value(node).is_floating_point():
            node = self._call("to", node, torch.float32)
        return node if term.sign == 1.0 else self._call(torch.mul, node, term.sign)

    def _rows_input(self, found: FoundSite) -> fx.Node:
        """The input of a mixed site's class numbers: one per device and size, shared by the layers."""
        size = found.query_shape[0]
        own = None if found.hint is None else parse_hint_text(found.hint)
        given = RowsInput(found.site.device, size, str(size), own if isinstance(own, tuple) else None)
        if given not in self.rows:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(f"sparsepass_rows_{len(self.rows)}")
            node.meta["example_value"] = value(found.attention.query).new_empty((size,), dtype=torch.int32)
            node._dynamo_source = None  # type: ignore[attr-defined]  # AOTAutograd asks: it comes from no user value
            self.rows[given] = node
        return self.rows[given]

    def _segment_nodes(self, found: FoundSite, terms: MaskTerms) -> tuple[fx.Node | None, fx.Node | None]:
        """Padding and packing as segment numbers, int32 [B, S]: padded keys are -1, which no query is.

        Built once for all layers that share the mask, at the first of them.
        """
        if not terms.padding and terms.segments is None:
            return None, None
        batch = shape(found.attention.query)[0]
        key = (terms.padding, terms.segments, found.site.index if isinstance(batch, torch.SymInt) else batch)
        if key not in self._segments:
            size = self._size(found.attention.query, 0)
            self._segments[key] = self._build_segments(
                terms, size, (found.attention.key, shape(found.attention.key)[2])
            )
        return self._segments[key]

    def _build_segments(
        self, terms: MaskTerms, batch: Any, kv_len: tuple[Operand, Any]
    ) -> tuple[fx.Node | None, fx.Node]:
        numbers = None
        if terms.segments is not None:
            ids = self.nodes[terms.segments]
            sizes = shape(terms.segments)
            if len(sizes) != 2:
                ids = self._call("reshape", ids, (-1, self._size(terms.segments, len(sizes) - 1)))
            numbers = self._call("expand", self._call("to", ids, torch.int32), batch, -1)
        visible = None
        for node in terms.padding:
            rows = self._call("to", self._rows(node, kv_len), torch.bool)
            visible = rows if visible is None else self._call(torch.logical_and, visible, rows)
        if visible is None:
            assert numbers is not None  # one of the two is there
            return numbers, numbers
        if numbers is not None:
            return numbers, self._call("masked_fill", numbers, self._call("logical_not", visible), -1)
        ids = self._call(torch.sub, self._call("to", visible, torch.int32), 1)
        return None, self._call("expand", ids, batch, -1)

    def _rows(self, node: fx.Node, kv_len: tuple[Operand, Any]) -> fx.Node:
        """A padding node as [B or 1, Skv]: it may have dimensions of size 1 besides, and be longer than the keys."""
        sizes = shape(node)
        width = self._size(node, len(sizes) - 1)
        rows = self._call("reshape", self.nodes[node], (-1, width)) if len(sizes) != 2 else self.nodes[node]
        key, keys = kv_len
        if same_size(sizes[-1], keys):
            return rows
        return self._call(operator.getitem, rows, (slice(None), slice(None, self._size(key, 2))))

    def _size(self, node: Operand, axis: int) -> Any:
        size = shape(node)[axis]
        return size if isinstance(size, int) else self._call("size", self._node(node), axis)


def drop_dead_masks(graph: fx.Graph) -> None:
    """Drop the masks of a rewritten clone that no site reads any more, where no compiler will.

    Only what yields a boolean tensor, and what that alone needed, is dropped: nothing in a graph that writes does.
    """
    doomed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.users or node.op not in ("call_function", "call_method") or mutates(node):
            continue
        held = node.meta.get("example_value")
        if node in doomed or (isinstance(held, torch.Tensor) and held.dtype is torch.bool):
            doomed.update(node.all_input_nodes)
            graph.erase_node(node)
