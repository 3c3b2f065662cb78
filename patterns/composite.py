"""Attention behind one call that is a kernel of its own: named in the report, never rewritten."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import is_own, value
from sparsepass.patterns.pattern import Match, Pattern
from sparsepass.types import Skip

_FLEX = (
    "this is FlexAttention: its kernel computes the score and mask functions, and the blocks of its block mask, that "
    "the model gives it; it is left as it is"
)
_NATIVE = (
    "this is PyTorch's fused encoder layer, one kernel with no attention to be seen; "
    "torch.backends.mha.set_fastpath_enabled(False) turns it off"
)


def flex(match: Match) -> Skip:
    return Skip(_FLEX, (match.output.name,))


def native(match: Match) -> Skip:
    return Skip(_NATIVE, (match.output.name,))


def multi_head(match: Match) -> Skip:
    """A call that ``inline`` did not write out."""
    reason = multi_head_reason(match.output) or "could not be written out"
    return Skip(f"nn.MultiheadAttention is left as it is: it {reason}", (match.output.name,))


_NAMES = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias"),
)


def multi_head_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call of ``F.multi_head_attention_forward`` by name."""
    defaults = {"training": True, "need_weights": True, "attn_mask": None, "key_padding_mask": None}
    return defaults | dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)


def multi_head_reason(node: fx.Node) -> str | None:
    """Why a call of ``F.multi_head_attention_forward`` stays as it is, or None."""
    given = multi_head_arguments(node)
    parts = [user.args[1] for user in node.users if getattr(user.target, "__name__", "") == "getitem"]
    if given["need_weights"] and any(user for user in node.users if user.args[1:] != (0,)) and 1 in parts:
        return "returns its attention weights; pass need_weights=False"
    if len(parts) != len(node.users):
        return "hands on its results as one tuple"
    if given["training"] and given["dropout_p"] != 0.0:
        return f"has dropout {given['dropout_p']}; call model.eval()"
    if any(given.get(name) is not None for name in ("bias_k", "bias_v", "static_k", "static_v")):
        return "has keys of its own (bias_k, bias_v, static_k or static_v)"
    if given["add_zero_attn"]:
        return "adds a key of zeros (add_zero_attn)"
    if not (is_own(F.linear) and is_own(F.scaled_dot_product_attention)):
        return "calls a function that took the place of torch.nn.functional's linear or scaled_dot_product_attention"
    if any(torch_private.tensor_kind(value(one)) for one in node.all_input_nodes):
        return "is given tensors that are of a subclass or in a torch.func transform"
    held = value(given["query"])
    if not isinstance(held, torch.Tensor) or held.dim() != 3:
        return "has a query of other than three dimensions"
    return None


FLEX = Pattern(name="flex_attention", anchor="flex_attention", check=flex)
NATIVE = Pattern(name="native_encoder_layer", anchor="native_attention", check=native)
MULTI_HEAD = Pattern(name="multi_head_attention", anchor="multi_head_attention", check=multi_head)
