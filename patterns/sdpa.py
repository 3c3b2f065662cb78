"""``F.scaled_dot_product_attention`` in all its argument combinations: one node, K/V repeated or not."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsepass.match import Attention, Match, Pattern, Term, shape
from sparsepass.patterns.repeat_kv import both_without_repeat
from sparsepass.types import Skip

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an SDPA node by name, defaults filled in."""
    given = dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    return {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False} | given


def check(match: Match) -> Attention | Skip:
    node = match.output
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    if not all(isinstance(operand, fx.Node) for operand in (query, key, value)):
        return Skip("the query, key or value of this attention is a constant", (node.name,))
    mask = given["attn_mask"]
    if mask is not None and not isinstance(mask, fx.Node):
        return Skip("the mask of this attention is a constant", (node.name,))
    if isinstance(given["is_causal"], fx.Node):
        return Skip("whether this attention is causal is known only when it runs", (node.name,))
    ranks = [len(shape(operand)) for operand in (query, key, value)]
    if any(rank != ranks[0] for rank in ranks) or ranks[0] < 2:
        return Skip(f"query, key and value have {ranks} dimensions; equal numbers from two on are needed", (node.name,))
    restore: tuple[tuple[Any, ...], ...] = ()
    masks = () if mask is None else (Term(mask),)
    if ranks[0] == 4:
        key, value = both_without_repeat(match.view, key, value)
    elif ranks[0] > 4:
        return Skip(f"query, key and value have {ranks[0]} dimensions; at most four are supported", (node.name,))
    else:
        lift = (("unsqueeze", 0),) * (3 - ranks[0]) + (("unsqueeze", 1),)  # [S, D], or [B, S, D] of one head
        query, key, value = (match.maker.steps(operand, lift) for operand in (query, key, value))
        if mask is not None and len(shape(mask)) == 3:
            masks = (Term(match.maker.call("unsqueeze", mask, 1)),)
        restore = (("squeeze", 1),) + (("squeeze", 0),) * (3 - ranks[0])
    return Attention(
        spelling="sdpa",
        query=query,
        key=key,
        value=value,
        output=node,
        scale=given["scale"],
        masks=masks,
        is_causal=bool(given["is_causal"]),
        dropout_p=given["dropout_p"],
        restore=restore,
        region=frozenset({node}),
    )


SDPA = Pattern(name="sdpa", anchor="sdpa", check=check)
