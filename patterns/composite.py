"""Attention behind one call that is a kernel of its own: named in the report, never rewritten."""

from __future__ import annotations

from sparsepass.match import Match, Pattern
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
    from sparsepass.inline import multi_head_reason

    reason = multi_head_reason(match.output) or "could not be written out"
    return Skip(f"nn.MultiheadAttention is left as it is: it {reason}", (match.output.name,))


FLEX = Pattern(name="flex_attention", anchor="flex_attention", check=flex)
NATIVE = Pattern(name="native_encoder_layer", anchor="native_attention", check=native)
MULTI_HEAD = Pattern(name="multi_head_attention", anchor="multi_head_attention", check=multi_head)
