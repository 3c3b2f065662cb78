"""Selection methods: what a budget's method name means, which parameters it has, and its text form.

One method is one frozen dataclass in one file, listed in ``catalogue.METHODS``: its fields are its parameters, checked
on creation. ``docs/policy.md`` has the recipe for adding one.
"""

from sparsepass.methods.a_shape import AShape
from sparsepass.methods.base import Method
from sparsepass.methods.catalogue import (
    METHODS,
    METHODS_VERSION,
    budget_from_json,
    budget_to_json,
    decode_budget,
    encode_budget,
    make_method,
    merge_heads,
    method_names,
)
from sparsepass.methods.dense import Dense
from sparsepass.methods.flex_prefill import FlexPrefill
from sparsepass.methods.full import Full
from sparsepass.methods.pooled_topk import PooledTopK
from sparsepass.methods.threshold import Threshold
from sparsepass.methods.top_p import TopP
from sparsepass.methods.vertical_slash import VerticalSlash
from sparsepass.methods.xattention import XAttention

__all__ = [
    "METHODS",
    "METHODS_VERSION",
    "AShape",
    "Dense",
    "FlexPrefill",
    "Full",
    "Method",
    "PooledTopK",
    "Threshold",
    "TopP",
    "VerticalSlash",
    "XAttention",
    "budget_from_json",
    "budget_to_json",
    "decode_budget",
    "encode_budget",
    "make_method",
    "merge_heads",
    "method_names",
]
