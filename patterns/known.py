"""Attention that is known by name and stays as it is: told by where its scores come from, each with a sentence.

They are sparse already, over chunks, windows or buckets of tokens. What else such attention does that the reader does
not follow (``why``) is part of the sentence where it is not the spelling itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Operand, called_name, value
from sparsepass.graph.sizes import shape
from sparsepass.patterns.products import is_product
from sparsepass.patterns.score_chain import leads_to_product

MOST_NODES = 96
"""Nodes looked at above one softmax, so that the cost stays linear in the graph."""
_MOVES = frozenset({"reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "getitem"})
_OVERLAPS = frozenset({"as_strided", "unfold"})
_PICKS = frozenset({"gather", "index_select", "take_along_dim"})
_SORTS = frozenset({"argsort", "sort"})
_PASSES = (
    _MOVES
    | {"add", "sub", "mul", "div", "tanh", "where", "masked_fill", "cat", "clamp", "pad", "narrow", "flip", "roll"}
    | {"iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_", "masked_fill_", "as_strided", "diagonal"}
    | {"new_zeros", "new_empty", "new_full", "zeros", "empty", "full", "zeros_like", "empty_like", "full_like"}
)
"""What keeps scores scores. A projection or a norm ends the way up: what lies above is another layer's."""


@dataclass(frozen=True)
class Origin:
    """Where the scores of a softmax come from."""

    view: CanonicalGraph
    products: tuple[fx.Node, ...]
    """Products of two activations, those nearest to the softmax first."""
    joined: fx.Node | None
    """A ``cat`` over the keys of several products."""
    assembled: fx.Node | None
    """Memory that the scores are written into piece by piece."""


def origin(view: CanonicalGraph, softmax: fx.Node) -> Origin:
    """Breadth first from the softmax upwards, through what is written into memory too, up to products."""
    pending = [one for one in view.ops[softmax].operands if isinstance(one, fx.Node)]
    seen: dict[fx.Node, None] = {}
    products: list[fx.Node] = []
    joined = assembled = None
    while pending and len(seen) < MOST_NODES:
        node = view.resolve(pending.pop(0))
        if node in seen or len(shape(node)) < 3:
            continue
        seen[node] = None
        if is_product(view, node):
            products.append(node)
            continue
        op = view.ops[node]
        if op.name.rpartition(":")[2] not in _PASSES:
            continue
        if op.name == "cat" and op.params == (("dim", -1),) and joined is None:
            parts = [view.resolve(one) for one in op.operands]
            joined = node if all(isinstance(one, fx.Node) and leads_to_product(view, one) for one in parts) else None
        pieces = list(_written_into(node))
        assembled = node if pieces and assembled is None else assembled
        pending += pieces + node.all_input_nodes
    return Origin(view, tuple(products), joined, assembled if products else None)


def _written_into(node: fx.Node) -> Iterator[fx.Node]:
    """What is written into parts of a node's memory: ``node[..] = piece``."""
    for user in node.users:
        if user.target is operator.setitem and user.args[0] is node and isinstance(user.args[2], fx.Node):
            yield user.args[2]


def _above(view: CanonicalGraph, node: Operand, most: int) -> Iterator[fx.Node]:
    """At most ``most`` nodes that ``node`` is computed from, itself first, breadth first."""
    pending, seen = [node], set[fx.Node]()
    while pending and len(seen) < most:
        one = view.resolve(pending.pop(0))
        if isinstance(one, fx.Node) and one not in seen:
            seen.add(one)
            yield one
            pending += one.all_input_nodes


def _operands(view: CanonicalGraph, product: fx.Node) -> list[fx.Node]:
    return [view.resolve(one) for one in view.ops[product].operands[-2:]]


def _overlapping(found: Origin) -> bool:
    """Both operands of a product are windows into memory that overlap, and scores are cut from such products."""
    if found.assembled is None:
        return False
    return any(
        all(any(called_name(one) in _OVERLAPS for one in _above(found.view, operand, 6)) for operand in pair)
        for pair in (_operands(found.view, product) for product in found.products)
    )


def _sorted(found: Origin) -> bool:
    """An operand of a product is picked from the tokens in the order of a sort."""
    for product in found.products[:1]:
        for operand in _operands(found.view, product):
            for picked in (one for one in _above(found.view, operand, 32) if called_name(one) in _PICKS):
                index = picked.all_input_nodes[-1]
                if any(called_name(one) in _SORTS for one in _above(found.view, index, 12)):
                    return True
    return False


def _neighbors(found: Origin) -> bool:
    """Chunks of tokens, [.., chunks, queries, D], whose keys are joined to those of other chunks."""
    view = found.view
    for product in found.products[:1]:
        if len(shape(product)) < 5:
            continue
        for operand in _operands(view, product):
            node = operand
            while view.ops[node].name in _MOVES - {"getitem"}:
                node = view.resolve(node.all_input_nodes[0])
            if view.ops[node].name == "cat" and view.ops[node].params == (("dim", -2),):
                return True
    return False


@dataclass(frozen=True)
class Known:
    """A spelling: how it is told, and its sentence, in which ``{why}`` is what the reader said, if it says more."""

    seen: Callable[[Origin], bool]
    sentence: str


KNOWN: tuple[Known, ...] = (
    Known(
        _overlapping,
        "attention over chunks with overlapping windows, as Longformer writes it: banded scores put together from "
        "pieces of the chunks' products; it is sparse already",
    ),
    Known(
        lambda found: found.joined is not None,
        "attention to several sets of keys, as Pegasus-X and BigBird write it: the scores of a block's own keys and of "
        "global ones are products apart, joined by {joined}; one product with all keys is supported",
    ),
    Known(_sorted, "attention within buckets of sorted tokens (LSH), as Reformer writes it: {why}"),
    Known(_neighbors, "attention of chunks to themselves and their neighbors, as Reformer writes it: {why}"),
    Known(
        lambda found: found.assembled is not None,
        "scores put together in {assembled} from pieces that are written into it; one product of queries and keys is "
        "supported",
    ),
)
"""Tried in this order."""


def known_spelling(view: CanonicalGraph, softmax: fx.Node, why: str) -> str | None:
    """The sentence for attention that is refused because of ``why`` and known by name; None for any other."""
    held = value(softmax)
    last = dict(view.ops[softmax].params).get("dim") == -1
    if not last or not isinstance(held, torch.Tensor) or not held.dim():
        return None
    found = origin(view, softmax)
    if not found.products:
        return None
    for known in KNOWN:
        if known.seen(found):
            names = {"joined": _quoted(found.joined), "assembled": _quoted(found.assembled), "why": why}
            return known.sentence.format(**names)
    return None


def _quoted(node: fx.Node | None) -> str:
    return "" if node is None else repr(node.name)
