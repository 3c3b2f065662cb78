"""What changes the scores, in Triton: every term and their combinations against float64; on a GPU, else interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sparsepass.testing import (
    TERMS,
    Case,
    Inputs,
    assert_as_accurate_as_dense,
    assert_lse,
    assert_nonfinite_reach,
    cases,
    poisoned_empty,
)
from tests.kernels.attend.column_cases import ColumnCase, column_cases
from tests.kernels.attend.term_cases import check_columns, check_count, check_map, check_selection
from tests.kernels.attend.test_attend_triton import DRAWN, PLAIN
from tests.kernels.device import DEVICE, EXAMPLES, GPU, pytestmark  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.columns.triton import attend_columns_cuda
from sparsepass.kernels.attend.triton.block_map import block_map_cuda
from sparsepass.kernels.attend.triton.launch import block_sparse_attention_cuda
from sparsepass.kernels.scores import check_scores
from sparsepass.kernels.select.triton.scored import select_scored_cuda
from sparsepass.kernels.select.triton.topk import select_blocks_cuda

FEWER = EXAMPLES if GPU or EXAMPLES > 25 else 3
SIZES = [(192, 128), (576, 512), (32, 16), (8, 8)]


def attend(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    with poisoned_empty():
        return block_sparse_attention_cuda(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.kv_num_blocks,
            inputs.kv_indices,
            **inputs.mask,
            scores=inputs.scores,
            **options,
        )


def check(inputs: Inputs) -> None:
    out, lse = attend(inputs, return_lse=True)
    assert lse is not None
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_dense(out, inputs)
    assert_lse(lse, inputs)


@settings(max_examples=max(FEWER, 8))
@given(cases(**DRAWN, terms=TERMS))
def test_combinations_err_at_most_twice_as_much_as_eager(case: Case) -> None:
    check(case.tensors(DEVICE))


@settings(max_examples=FEWER)
@given(cases(**DRAWN, terms=TERMS, bad=True))
def test_nonfinite_inputs_reach_only_the_rows_that_see_them(case: Case) -> None:
    inputs = case.tensors(DEVICE)
    assert_nonfinite_reach(attend(inputs)[0], inputs)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32])
def test_each_term(dtype: torch.dtype, term: str) -> None:
    check(replace(PLAIN, dtype=dtype, terms=(term,)).tensors(DEVICE))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [*SIZES, (7, 20), (300, 260)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if GPU else [torch.float16])
def test_head_sizes_of_queries_and_values(dtype: torch.dtype, head_dim: int, v_head_dim: int) -> None:
    sizes: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": v_head_dim, "scale": head_dim**-0.5, "batch": 1}
    check(replace(PLAIN, dtype=dtype, segments="packed", **sizes).tensors(DEVICE))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), SIZES if GPU else SIZES[:1])
def test_terms_and_head_sizes(head_dim: int, v_head_dim: int) -> None:
    sizes: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": v_head_dim, "scale": head_dim**-0.5, "batch": 1}
    check(replace(PLAIN, dtype=torch.bfloat16 if GPU else torch.float32, terms=TERMS, **sizes).tensors(DEVICE))


def block_map(inputs: Inputs) -> Tensor:
    mask = {name: inputs.mask[name] for name in inputs.mask if name != "scale"}
    scores = check_scores(inputs.scores, inputs.q, inputs.k)
    assert scores is not None
    shape: dict[str, Any] = {"batch": inputs.q.shape[0], "q_len": inputs.q.shape[2], "kv_len": inputs.k.shape[2]}
    with poisoned_empty():
        return block_map_cuda(scores, **mask, **shape)


@settings(max_examples=FEWER)
@given(cases(**DRAWN, terms=("bias", "mask")))
def test_the_map_has_the_blocks_with_a_visible_pair(case: Case) -> None:
    inputs = case.tensors(DEVICE)
    check_map(case, inputs, block_map)
    check_count(case, inputs, attend)


@settings(max_examples=FEWER)
@given(cases(**{**DRAWN, "dtypes": (torch.float32,)}, square_blocks=True, terms=("bias", "mask")))
def test_selection_ranks_only_visible_blocks(case: Case) -> None:
    check_selection(case, case.tensors(DEVICE), select_blocks_cuda, select_scored_cuda)


@settings(max_examples=FEWER)
@given(column_cases(**DRAWN, terms=TERMS))
def test_columns(case: ColumnCase) -> None:
    check_columns(case, case.tensors(DEVICE), attend, attend_columns_cuda)


def test_one_asked_for_by_name_never_falls_back() -> None:
    inputs = replace(PLAIN, terms=("sinks",)).tensors(DEVICE)
    with pytest.raises(KernelInputError, match="The hopper kernel was asked for"):
        attend(inputs, implementation="hopper")
