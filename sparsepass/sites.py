"""Find every attention site of a captured graph: what matched, what its mask is, and what nearly matched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import CanonicalGraph, canonical_op, nodes_of, value
from sparsepass.graph.made import Maker
from sparsepass.graph.mutation import touched_by
from sparsepass.graph.sizes import same_size, shape
from sparsepass.graph.surroundings import grad_modes, left_alone
from sparsepass.masks.recognize import MaskTerms, recognize_masks
from sparsepass.patterns.catalogue import every_pattern
from sparsepass.patterns.pattern import Attention, NearMiss, Pattern, Term
from sparsepass.patterns.products import PRODUCTS, is_product
from sparsepass.request.hints import NODE_KEY
from sparsepass.types import AttentionSite, MaskSummary, Phase, Skip

FEWEST_KEYS = 16
"""Attention over fewer is left alone: there is no block to leave out."""
_ATTENDS = re.compile(
    r"(?:flash|paged|varlen|efficient)_?(?:attn|attention|mla)|(?:attn|attention)(?:_func|_forward|_fwd)|::attention",
    re.I,
)
TOO_FEW = "too few to be tokens (layers, streams, patches of one window)"


@dataclass(frozen=True)
class FoundSite:
    """A site with the graph nodes behind it. ``terms`` says what the mask is, or why it was not recognized."""

    site: AttentionSite
    attention: Attention
    terms: MaskTerms | Skip
    layer: int | None
    """Number of its layer, from 0; None where it is not known."""
    hint: str | None
    source: str = ""
    """Where its module hangs, as Dynamo writes it: ``L['self'].layers.7.self_attn``."""
    gradients: bool = False
    """Whether something in it requires gradients at a place of the graph where they are recorded."""
    layer_shared: bool = False
    """Other layers that the policy treats as this one may run the same graph."""

    @property
    def head_sizes(self) -> tuple[int | torch.SymInt, ...]:
        """Of queries and keys, and of values; in ``site`` they are those of this call."""
        return shape(self.attention.query)[3], shape(self.attention.value)[3]

    @property
    def query_shape(self) -> tuple[int | torch.SymInt, ...]:
        return shape(self.attention.query)

    @property
    def key_shape(self) -> tuple[int | torch.SymInt, ...]:
        return shape(self.attention.key)


@dataclass(frozen=True)
class Findings:
    """All that was found in one graph. ``refused`` holds anchors that no pattern matched, with the nearest miss."""

    sites: tuple[FoundSite, ...]
    refused: tuple[Skip, ...]
    view: CanonicalGraph

    @property
    def prefill(self) -> tuple[FoundSite, ...]:
        return tuple(found for found in self.sites if found.site.phase is Phase.PREFILL)


def find_sites(graph: fx.Graph, catalogue: tuple[Pattern, ...] | None = None) -> Findings:
    """Match every anchor of ``graph`` against the patterns. Linear in the graph; nothing is mutated or guarded."""
    catalogue = every_pattern() if catalogue is None else catalogue
    apart = left_alone(graph)
    view, maker = CanonicalGraph(graph, apart), Maker()
    masks: dict[tuple[object, ...], MaskTerms | Skip] = {}
    matched: list[Attention] = []
    refused: list[Skip] = []
    for node in graph.nodes:
        if node in apart:
            if (skip := _attention_apart(node, apart)) is not None:
                refused.append(skip)
            continue
        candidates = [pattern for pattern in catalogue if pattern.anchor == view.ops[node].name]
        if not candidates:
            if (name := _other_kernel(node)) is not None:
                reason = f"{name} is an attention kernel of another package: one call, which is left as it is"
                refused.append(Skip(reason, (node.name,), _module_path(node)))
            continue
        outcome = _first_match(candidates, view, node, maker)
        if isinstance(outcome, Attention) and (write := _write_inside(view, outcome)) is not None:
            outcome = Skip(f"{write.name!r} writes to memory in the middle of this attention", (write.name,))
        if isinstance(outcome, Attention):
            outcome = _unfit(outcome) or _too_few(outcome) or outcome
        if isinstance(outcome, Attention):
            matched.append(outcome)
        elif isinstance(outcome, Skip) or _looks_like_attention(view, node):
            nodes = tuple(dict.fromkeys((node.name, *outcome.nodes)))
            refused.append(Skip(str(outcome.reason), nodes, _module_path(node)))
    matched.sort(key=lambda attention: view.order[attention.output])  # what is made for one serves those after it
    modes = grad_modes(graph, torch.is_grad_enabled())
    sites = [
        replace(_describe(index, attention, masks, view), gradients=_needs_gradients(attention, modes))
        for index, attention in enumerate(matched)
    ]
    return Findings(tuple(sites), tuple(refused), view)


def _attention_apart(node: fx.Node, apart: Mapping[fx.Node, str]) -> Skip | None:
    """What is said of attention that is left alone. Its values are not looked at: only what stands around it is."""
    name = canonical_op(node).name
    if name != "sdpa" and not (name == "softmax" and _near_product(node)):
        return None
    return Skip(f"{node.name!r} {apart[node]}; its attention is left as it is", (node.name,), _module_path(node))


def _near_product(node: fx.Node) -> bool:
    """Whether a product of two computed tensors leads to a node and another reads what becomes of it."""

    def leads(step: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
        around = [node]
        for _ in range(6):
            around = list(dict.fromkeys(other for one in around for other in step(one)))[:8]
            if any(canonical_op(one).name in PRODUCTS for one in around):
                return True
        return False

    return leads(lambda one: one.all_input_nodes) and leads(lambda one: one.users)


def find_nested(gm: fx.GraphModule) -> tuple[Skip, ...]:
    """Attention that one node hides, which is not written out (see ``inline``): found, not rewritten."""
    skips = []
    for name, child in gm.named_modules():
        if isinstance(child, fx.GraphModule) and child is not gm:
            for found in find_sites(child.graph).sites:
                reason = f"inside the higher-order operation {name!r} (checkpointing, for instance), left as it is"
                skips.append(Skip(reason, (f"{name}.{found.site.name}",)))
    return tuple(skips)


def _unfit(attention: Attention) -> Skip | None:
    """Why the sizes of the operands are none that the kernels take, whatever the budget."""
    query, key, values = (shape(operand) for operand in attention.operands)
    name = attention.output.name
    if any(len(sizes) != 4 for sizes in (query, key, values)):
        return Skip(f"the graph carries no shapes for query, key or value of {name!r}", (name,))
    if any(torch_private.hint_value(size) is None for size in (query[3], values[3])):
        return Skip(f"the head size of {name!r} follows the data, and the kernels are made for one", (name,))
    shared = ((query[0], key[0]), (query[0], values[0]), (key[1], values[1]))
    summed = ((key[2], values[2]), (query[3], key[3]))  # of other sizes the model itself would raise an error
    differ = any(isinstance(one, int) and isinstance(other, int) and one != other for one, other in summed)
    if not differ and all(same_size(one, other) for one, other in shared):
        return None
    sizes = ", ".join(str(list(sizes)) for sizes in (query, key, values))
    return Skip(f"query, key and value of {name!r} are {sizes}: these are not known to fit each other", (name,))


def _too_few(attention: Attention) -> Skip | None:
    """Attention over layers, streams or experts is none over tokens. A decode step may have few tokens all the same."""
    rows, keys = shape(attention.query)[2], shape(attention.key)[2]
    if not isinstance(keys, int) or keys >= FEWEST_KEYS or (isinstance(rows, int) and rows == 1):
        return None
    name = attention.output.name
    return Skip(f"{name!r} attends to {keys} entries, {TOO_FEW}", (name,))


def _write_inside(view: CanonicalGraph, attention: Attention) -> fx.Node | None:
    """A write that the replacement would see and the attention does not, or the other way around.

    The replacement reads its operands where the last node of the region stands. Writes to the region's own memory that
    are read as operations of it end with it.
    """
    region = attention.region
    places = [view.order[node] for node in region]
    terms = (*attention.operands, attention.sinks, *(term.operand for term in attention.masks))
    operands = set(nodes_of(terms))
    for write in view.writes_between(min(places), max(places)):
        if write in region and write in view.read_writes:
            continue
        touched = touched_by(write)
        if any(
            node in touched and (node in region or view.order[node] < view.order[write]) for node in operands | region
        ):
            return write
    return None


def _first_match(
    candidates: list[Pattern], view: CanonicalGraph, node: fx.Node, maker: Maker
) -> Attention | Skip | NearMiss:
    nearest: Skip | NearMiss | None = None
    for pattern in candidates:
        outcome = pattern.find(view, node, maker)
        if isinstance(outcome, Attention):
            return outcome
        further = isinstance(outcome, NearMiss) and isinstance(nearest, NearMiss) and outcome.matched > nearest.matched
        if nearest is None or isinstance(outcome, Skip) or further:
            nearest = outcome
    assert nearest is not None  # candidates is not empty
    return nearest


def _looks_like_attention(view: CanonicalGraph, node: fx.Node) -> bool:
    """Softmax over logits (a sampler, a router) is no attention: its scores are a product of two activations, or its
    probabilities are multiplied with values. Tensors of three dimensions or more, at least as many keys as tokens."""
    if view.ops[node].name != "softmax":
        return True
    sizes = shape(node)
    if len(sizes) < 3 or (isinstance(sizes[-1], int) and sizes[-1] < FEWEST_KEYS):
        return False
    above = [view.resolve(one) for one in view.ops[node].operands]
    for _ in range(6):
        nodes = [one for one in above if isinstance(one, fx.Node)]
        if any(is_product(view, one) for one in nodes):
            return True
        above = [view.resolve(operand) for one in nodes for operand in view.ops[one].operands]
    below = [node]
    for _ in range(6):
        below = [user for one in below for user in view.users(one) if len(shape(user)) >= 3][:8]
        if any(is_product(view, one) for one in below):
            return True
    return False


def _other_kernel(node: fx.Node) -> str | None:
    """The name of an operator or function, not of torch or ours, that attends by its name (``flash_attn::forward``)."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    schema = getattr(target, "_schema", None) or getattr(getattr(target, "default", None), "_schema", None)
    name = (
        schema.name if schema is not None else f"{getattr(target, '__module__', '')}::{getattr(target, '__name__', '')}"
    )
    package = re.split(r"::|\.", name)[0]
    if package in ("", "None", "aten", "prims", "torch", "sparsepass", "builtins", "_operator", "math"):
        return None
    return name if _ATTENDS.search(name) else None


def _describe(
    index: int,
    attention: Attention,
    masks: dict[tuple[object, ...], MaskTerms | Skip],
    view: CanonicalGraph,
) -> FoundSite:
    query, key, values = shape(attention.query), shape(attention.key), shape(attention.value)
    q_len, kv_len = query[2], key[2]
    terms = _mask_terms(attention, masks, view)
    held = value(attention.output)
    summary: MaskSummary | None = None
    if isinstance(terms, MaskTerms):
        summary = terms.summary
    decode = isinstance(q_len, int) and q_len == 1
    module = _module_path(attention.output)
    site = AttentionSite(
        index=index,
        name=attention.output.name,
        spelling=attention.spelling,
        phase=Phase.DECODE if decode else Phase.PREFILL,
        q_len=_size(q_len),
        kv_len=_size(kv_len),
        heads=_size(query[1]),
        kv_heads=_size(key[1]),
        head_dim=torch_private.hint_value(query[3]) or 0,
        v_head_dim=torch_private.hint_value(values[3]) or 0,
        dtype=str(held.dtype).removeprefix("torch."),
        device=str(held.device),
        mask=summary,
        module=module,
    )
    custom = attention.output.meta.get("custom") or {}
    source = _module_source(attention.output)
    return FoundSite(site, attention, terms, layer_in_path(module), custom.get(NODE_KEY), source)


def _needs_gradients(attention: Attention, modes: Mapping[fx.Node, bool]) -> bool:
    """Dynamo records what requires gradients under the mode of each node; what is made of nodes has their own."""
    read: set[fx.Node] = set(attention.region)
    if modes[attention.output]:
        read |= set(nodes_of((attention.operands, attention.sinks, [term.operand for term in attention.masks])))
    return any(getattr(value(node), "requires_grad", False) for node in read)


def _mask_terms(
    attention: Attention, masks: dict[tuple[object, ...], MaskTerms | Skip], view: CanonicalGraph
) -> MaskTerms | Skip:
    """What the masks of a site are. Layers share masks: each combination is recognized once."""
    sizes = (*shape(attention.query)[:3], shape(attention.key)[2])
    whole = tuple(map(str, sizes))
    key = (*((term.operand, term.sign) for term in attention.masks), attention.is_causal, whole)
    if key not in masks:
        masks[key] = recognize_masks(
            attention.masks, q_len=sizes[2], kv_len=sizes[3], is_causal=attention.is_causal, split=True
        )
    terms = masks[key]
    if isinstance(terms, MaskTerms):
        given = {term.operand for term in attention.masks}
        for term in terms.whole:
            if (reason := _misfit(term, sizes)) is not None:
                return Skip(reason, (term.operand.name,))
            if term.operand not in given and (write := _write_after(view, term, attention.output)) is not None:
                reason = f"a part of the mask, {term.operand.name!r}, is changed by {write.name!r} before its attention"
                return Skip(reason, (term.operand.name, write.name))
    return terms


def _write_after(view: CanonicalGraph, term: Term, output: fx.Node) -> fx.Node | None:
    """A write to what a term is made of, after it is computed."""
    for node in nodes_of(term.operand):
        for write in view.writes_between(view.order[node], view.order[output]):
            if node in touched_by(write):
                return write
    return None


def _misfit(term: Term, sizes: tuple[int | torch.SymInt, ...]) -> str | None:
    """Why a tensor that is read as a whole cannot be: it has to be of full size or 1 in every dimension."""
    held = value(term.operand)
    name = term.operand.name
    if not isinstance(held, torch.Tensor) or held.dim() > 4:
        return f"the mask {name!r} is not a tensor of at most four dimensions"
    pairs = zip(reversed(held.shape), reversed(sizes), strict=False)
    if all(same_size(have, 1) or same_size(have, want) for have, want in pairs):
        return None
    return (
        f"the mask {name!r} is {list(held.shape)}; for scores of {list(sizes)} it is not known to be of that size or 1"
    )


def _size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)


def _module_source(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _module_path(node: fx.Node) -> str:
    path = re.sub(r"L\['(\w+)'\]\.?|_modules\[['\"](\w+)['\"]\]", lambda m: m.group(2) or "", _module_source(node))
    return re.sub(r"\['?(\w+)'?\]", r".\1", path).replace("..", ".").strip(".")


def layer_in_path(module: str) -> int | None:
    """The number in a module's path (``model.layers.7.self_attn``); None where it has none, or several."""
    numbers = [int(part) for part in module.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None
