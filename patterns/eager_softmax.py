"""Attention written out, as in ``eager_attention_forward`` of transformers' Llama family.

Casts around the softmax and dropout at p = 0 do not matter here: the canonical form looks through them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsepass.match import Attention, Form, Match, Pattern, same_size, shape
from sparsepass.patterns.repeat_kv import without_repeat
from sparsepass.types import Skip

T = torch.Tensor


def masked(query: T, key: T, value: T, mask: T, scale: float) -> T:
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    return torch.matmul(F.softmax(scores + mask, dim=-1), value)


def unmasked(query: T, key: T, value: T, scale: float) -> T:
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    return torch.matmul(F.softmax(scores, dim=-1), value)


def masked_unscaled(query: T, key: T, value: T, mask: T) -> T:
    scores = torch.matmul(query, key.transpose(-2, -1))
    return torch.matmul(F.softmax(scores + mask, dim=-1), value)


def unmasked_unscaled(query: T, key: T, value: T) -> T:
    return torch.matmul(F.softmax(torch.matmul(query, key.transpose(-2, -1)), dim=-1), value)


def check(match: Match) -> Attention | Skip:
    roles = match.roles
    query, key, value = roles["query"], roles["key"], roles["value"]
    sizes = [len(shape(node)) for node in (query, key, value)]
    if sizes != [4, 4, 4]:
        return Skip(f"query, key and value have {sizes} dimensions; four each are needed", (match.output.name,))
    if not same_size(shape(query)[1], shape(key)[1]) or not same_size(shape(key)[1], shape(value)[1]):
        return Skip("query, key and value differ in their number of heads (broadcasting)", (match.output.name,))
    return Attention(
        spelling="eager_softmax",
        query=query,
        key=without_repeat(match.view, key),
        value=without_repeat(match.view, value),
        output=match.output,
        scale=roles.get("scale", 1.0),
        mask=roles.get("mask"),
        region=frozenset(match.nodes.values()),
    )


EAGER_SOFTMAX = Pattern(
    name="eager_softmax",
    anchor="softmax",
    check=check,
    forms=(Form(masked), Form(unmasked), Form(masked_unscaled), Form(unmasked_unscaled)),
)
