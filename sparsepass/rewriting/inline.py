"""A captured graph with attention that single nodes hide written out: checkpointed regions, nn.MultiheadAttention.

Only ever of a copy. Without gradients a checkpointed region is its body. ``F.multi_head_attention_forward`` is one node
for Dynamo; it becomes projections, SDPA and a projection, which is what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import LINEAR, SDPA, canonical_op, value
from sparsepass.graph.surroundings import grad_modes
from sparsepass.patterns.composite import multi_head_arguments, multi_head_reason

REGIONS = frozenset({"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"})
"""Higher-order operations that call their body once, with their other arguments."""


def written_out(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` itself, or where there is something to write out a copy that computes the same."""
    modes = grad_modes(gm.graph, torch.is_grad_enabled())
    pending = [node for node in gm.graph.nodes if _opens(gm, node, modes[node])]
    if not pending:
        return gm
    twin, copies = torch_private.clone(gm)
    pending = [copies[node] for node in pending]
    modes = {copies[node]: mode for node, mode in modes.items() if node in copies}
    while pending:
        node = pending.pop()
        if _is_region(twin, node, modes[node]):
            made = _inline(twin, node)
            modes.update(dict.fromkeys(made, False))  # a region in which gradients are recorded stays closed
            pending += [one for one in made if _opens(twin, one, False)]
        else:
            with torch.set_grad_enabled(modes[node]):
                _MultiHead(twin.graph, node).expand()
    used = {str(node.target).split(".")[0] for node in twin.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in list(twin.named_children()):
        if name not in used:
            delattr(twin, name)
    twin.recompile()
    return twin


def _opens(gm: fx.GraphModule, node: fx.Node, recorded: bool) -> bool:
    return _is_region(gm, node, recorded) or (
        canonical_op(node).name == "multi_head_attention" and multi_head_reason(node) is None
    )


def _is_region(gm: fx.GraphModule, node: fx.Node, recorded: bool) -> bool:
    """``recorded``: whether gradients are, where the node is. A checkpoint then saves memory, and stays."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") not in REGIONS or recorded:
        return False
    region = node.args[0] if node.args else None
    if not isinstance(region, fx.Node) or region.op != "get_attr":
        return False
    body = _attribute(gm, region)
    return isinstance(body, fx.GraphModule) and not any(grad_modes(body.graph, False).values())


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    held: Any = gm
    for name in str(node.target).split("."):
        held = getattr(held, name, None)
    return held


def _inline(gm: fx.GraphModule, call: fx.Node) -> list[fx.Node]:
    """Put the body of a region in the place of its call; returns the nodes that came."""
    region: Any = call.args[0]
    body = _attribute(gm, region)
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(inputs, call.args[1:], strict=True))
    made = []
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copy = gm.graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copy.target = f"{region.target}_{str(node.target).replace('.', '_')}"
                setattr(gm, copy.target, _attribute(body, node))
            copies[node] = copy
            made.append(copy)
    results: Any = fx.node.map_arg(body.graph.output_node().args[0], copies.__getitem__)
    _replace_results(call, results)
    if not region.users:
        gm.graph.erase_node(region)
    return made


def _replace_results(call: fx.Node, results: Any) -> None:
    """The users of ``call`` read its results instead; ``call`` goes."""
    for user in list(call.users):
        if isinstance(results, tuple | list) and getattr(user.target, "__name__", "") == "getitem":
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            user.graph.erase_node(user)
    if isinstance(results, fx.Node):
        call.replace_all_uses_with(results)
    call.graph.erase_node(call)


@dataclass
class _MultiHead:
    """Writes one call of ``F.multi_head_attention_forward`` out. Its tensors are [S, B, E]."""

    graph: fx.Graph
    node: fx.Node

    def expand(self) -> None:
        given = multi_head_arguments(self.node)
        with self.graph.inserting_before(self.node):
            heads = int(given["num_heads"])
            query, key, values = (
                self.method(
                    self.method(one, "unflatten", -1, (heads, int(value(one).shape[-1]) // heads)),
                    "permute",
                    1,
                    2,
                    0,
                    3,
                )
                for one in self.projected(given)
            )
            mask = self.mask(given, heads)
            out = self.call(SDPA, query, key, values, attn_mask=mask)
            flat = self.method(self.method(out, "permute", 2, 0, 1, 3), "flatten", 2)
            result = self.call(LINEAR, flat, given["out_proj_weight"], given["out_proj_bias"])
        _replace_results(self.node, (result, None))

    def by_head(self, source: fx.Node, heads: int) -> fx.Node:
        """[S, B, E] as [B, H, S, E / H]."""
        split = self.method(source, "unflatten", -1, (heads, int(value(source).shape[-1]) // heads))
        return self.method(split, "permute", 1, 2, 0, 3)

    def projected(self, given: dict[str, Any]) -> list[fx.Node]:
        operands = [given["query"], given["key"], given["value"]]
        width = int(given["embed_dim_to_check"])
        bias = given["in_proj_bias"]
        weights = [given.get(f"{name}_proj_weight") for name in "qkv"]
        if not given.get("use_separate_proj_weight"):
            weights = [self.method(given["in_proj_weight"], "narrow", 0, place * width, width) for place in range(3)]
        biases = [None if bias is None else self.method(bias, "narrow", 0, place * width, width) for place in range(3)]
        return [self.call(LINEAR, *one) for one in zip(operands, weights, biases, strict=True)]

    def mask(self, given: dict[str, Any], heads: int) -> fx.Node | None:
        """Both masks as one: booleans say there which keys are hidden, here which are seen; numbers are added."""
        parts = []
        if (mask := given["attn_mask"]) is not None:
            if value(mask).dim() == 3:
                mask = self.method(mask, "unflatten", 0, (-1, heads))
            parts.append(mask)
        if (padding := given["key_padding_mask"]) is not None:
            parts.append(self.method(self.method(padding, "unsqueeze", 1), "unsqueeze", 1))
        seen = [self.method(one, "logical_not") for one in parts if value(one).dtype == torch.bool]
        added = [one for one in parts if value(one).dtype != torch.bool]
        whole = None
        for one in seen:
            whole = one if whole is None else self.call(torch.logical_and, whole, one)
        if not added:
            return whole
        total = added[0] if len(added) == 1 else self.call(torch.add, *added)
        if whole is None:
            return total
        hidden = self.method(whole, "logical_not")
        return self.method(total, "masked_fill", hidden, float("-inf"))

    def method(self, source: fx.Node, name: str, *args: Any) -> fx.Node:
        return self.held(self.graph.call_method(name, (source, *args)), name, (source, *args), {})

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.held(self.graph.call_function(target, args, kwargs), target, args, kwargs)

    def held(self, node: fx.Node, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        """``node`` with the fake tensor that it yields, at the place of the call in the user's code."""
        given, named = fx.node.map_arg((tuple(args), kwargs), value)
        run = getattr(given[0], target) if isinstance(target, str) else target
        node.meta = {key: held for key, held in self.node.meta.items() if key in ("nn_module_stack", "custom")}
        node.meta["stack_trace"] = self.node.meta.get("stack_trace")
        node.meta["example_value"] = run(*given[1:] if isinstance(target, str) else given, **named)
        return node
