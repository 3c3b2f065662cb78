"""``F.scaled_dot_product_attention`` in all its argument combinations: one node, K/V repeated or not."""

from __future__ import annotations

from typing import Any

from torch import fx

from sparsepass.match import Attention, Match, Pattern, shape
from sparsepass.patterns.repeat_kv import without_repeat
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
    if len(shape(query)) != 4:
        return Skip(
            f"the query has {len(shape(query))} dimensions; [batch, heads, length, size] is needed", (node.name,)
        )
    return Attention(
        spelling="sdpa",
        query=query,
        key=without_repeat(match.view, key),
        value=without_repeat(match.view, value),
        output=node,
        scale=given["scale"],
        mask=given["attn_mask"],
        is_causal=bool(given["is_causal"]),
        dropout_p=given["dropout_p"],
        region=frozenset({node}),
    )


SDPA = Pattern(name="sdpa", anchor="sdpa", check=check)
