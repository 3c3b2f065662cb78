"""``F.scaled_dot_product_attention`` in all its argument combinations, and its kernels called by name: one node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparsepass.graph.canonical import called_name
from sparsepass.patterns.broadcast import NotBroadcast, lifted
from sparsepass.patterns.pattern import Attention, Match, Pattern, Term, used_outside
from sparsepass.patterns.repeat_kv import both_without_repeat
from sparsepass.types import Skip

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an SDPA node by name, defaults filled in."""
    return _DEFAULTS | dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)


def _kernel_arguments(node: fx.Node) -> dict[str, Any]:
    """The same of one of SDPA's kernels."""
    target: Any = node.target
    schema = (target.default if isinstance(target, torch._ops.OpOverloadPacket) else target)._schema
    names = [parameter.name for parameter in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if given.get("attn_bias") is not None:
        given["attn_mask"] = given["attn_bias"]
    return _DEFAULTS | given


def check(match: Match) -> Attention | Skip:
    return _read(match, match.output, arguments(match.output))


def check_kernel(match: Match) -> Attention | Skip:
    """One of the kernels behind SDPA, of whose results only the first is used."""
    node = match.output
    users = match.view.users(node)
    first = [user for user in users if user.args[1:] == (0,)]
    other = next((user for user in users if user not in first), None)
    if other is not None or len(first) != 1:
        why = used_outside(node, other) if other is not None else f"nothing uses the output of {node.name!r} alone"
        return Skip(f"this calls SDPA's kernel {called_name(node)!r} itself, and {why}", (node.name,))
    given = _kernel_arguments(node)
    if given.get("dropout_mask") is not None:
        return Skip(f"{node.name!r} has a dropout mask", (node.name,))
    return _read(match, first[0], given)


def check_other_kernel(match: Match) -> Skip:
    node = match.output
    return Skip(
        f"this calls the attention kernel {called_name(node)!r} itself; call F.scaled_dot_product_attention, "
        "which picks such a kernel",
        (node.name,),
    )


def _read(match: Match, output: fx.Node, given: dict[str, Any]) -> Attention | Skip:
    node, view = match.output, match.view
    query, key, value = given["query"], given["key"], given["value"]
    if not all(isinstance(operand, fx.Node) for operand in (query, key, value)):
        return Skip("the query, key or value of this attention is a constant", (node.name,))
    mask = given["attn_mask"]
    if mask is not None and not isinstance(mask, fx.Node):
        return Skip("the mask of this attention is a constant", (node.name,))
    if isinstance(given["is_causal"], fx.Node) or isinstance(given["enable_gqa"], fx.Node):
        return Skip("whether this attention is causal, or grouped, is known only when it runs", (node.name,))
    key, value = both_without_repeat(view, key, value)
    repeated = key is not given["key"] or value is not given["value"]
    try:
        whole = lifted(match.maker, (query, key, value), mask, repeated or bool(given["enable_gqa"]))
    except NotBroadcast as sizes:
        return Skip(f"query, key and value of this attention do not go together: {sizes}", (node.name,))
    except Exception as error:  # of a fake tensor whose sizes follow the data
        return Skip(f"query, key and value of this attention are not rearranged: {error}", (node.name,))
    return Attention(
        spelling="sdpa",
        query=whole.query,
        key=whole.key,
        value=whole.value,
        output=output,
        scale=given["scale"],
        masks=() if mask is None else (Term(whole.mask),),
        is_causal=bool(given["is_causal"]),
        dropout_p=given["dropout_p"],
        restore=whole.restore,
        region=frozenset({node, output}),
    )


SDPA = Pattern(name="sdpa", anchor="sdpa", check=check)
SDPA_KERNEL = Pattern(name="sdpa_kernel", anchor="sdpa_kernel", check=check_kernel)
OTHER_KERNEL = Pattern(name="attention_kernel", anchor="attention_kernel", check=check_other_kernel)
