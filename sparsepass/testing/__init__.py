"""Inputs, strategies, references and checks for attention kernels over block lists, for our tests and for yours.

``structured_inputs`` and what measures blocks on them need nothing but torch. The names that draw cases need
hypothesis, which is imported when one of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsepass.kernels.attend.reference import (
    block_scores_reference,
    block_sparse_attention_reference,
    listed_blocks,
    select_blocks_reference,
    visible_pairs,
)
from sparsepass.testing.accuracy import (
    assert_as_accurate_as_dense,
    assert_lse,
    assert_nonfinite_reach,
    dense_error,
)
from sparsepass.testing.corners import corner_cases
from sparsepass.testing.inputs import CONCENTRATED, StructuredInputs, structured_inputs
from sparsepass.testing.lists import block_mask_of, lists_from_mask
from sparsepass.testing.mass import attention_error, block_mass, kept_mass
from sparsepass.testing.memory import LAYOUTS, laid_out, leave_stale, poisoned_empty
from sparsepass.testing.problem import LISTS, SEGMENTS, SHARED_LISTS, Case, Inputs
from sparsepass.testing.terms import TERMS, draw_scores

if TYPE_CHECKING:
    from sparsepass.testing.check import Checked, check_attention, check_case
    from sparsepass.testing.strategies import BANDS, bands, block_lists, block_masks, budgets, cases, tensors

_DRAWING = {
    "BANDS": "strategies",
    "Checked": "check",
    "bands": "strategies",
    "block_lists": "strategies",
    "block_masks": "strategies",
    "budgets": "strategies",
    "cases": "strategies",
    "check_attention": "check",
    "check_case": "check",
    "tensors": "strategies",
}
"""Names that need hypothesis, by the module they are in."""

__all__ = [
    "BANDS",
    "CONCENTRATED",
    "LAYOUTS",
    "LISTS",
    "SEGMENTS",
    "SHARED_LISTS",
    "TERMS",
    "Case",
    "Checked",
    "Inputs",
    "StructuredInputs",
    "assert_as_accurate_as_dense",
    "assert_lse",
    "assert_nonfinite_reach",
    "attention_error",
    "bands",
    "block_lists",
    "block_mask_of",
    "block_masks",
    "block_mass",
    "block_scores_reference",
    "block_sparse_attention_reference",
    "budgets",
    "cases",
    "check_attention",
    "check_case",
    "corner_cases",
    "dense_error",
    "draw_scores",
    "kept_mass",
    "laid_out",
    "leave_stale",
    "listed_blocks",
    "lists_from_mask",
    "poisoned_empty",
    "select_blocks_reference",
    "structured_inputs",
    "tensors",
    "visible_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _DRAWING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_DRAWING[name]}")
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} draws its cases with hypothesis, which is not installed: pip install hypothesis",
            name="hypothesis",
        ) from error
    return getattr(module, name)
