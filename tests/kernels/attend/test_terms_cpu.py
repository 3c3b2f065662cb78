"""What changes the scores, on the CPU: every term and their combinations against float64, in both implementations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.api import block_sparse_attention, visible_blocks
from sparsepass.kernels.attend.columns.cpu import attend_columns_cpu
from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.select.cpu.scored import select_scored_cpu
from sparsepass.kernels.select.cpu.topk import select_blocks_cpu
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
from tests.kernels.attend.test_cpu_attend import causal_case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["native", "gather"], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and not cpu_native.available(torch.float32):
        pytest.skip("the C++ kernel cannot be built here")
    patch = pytest.MonkeyPatch()
    if request.param == "gather":
        patch.setattr(cpu_native, "available", lambda dtype: False)
    yield request.param
    patch.undo()


def attend(inputs: Inputs, **more: Any) -> tuple[Tensor, Tensor | None]:
    with poisoned_empty():
        return block_sparse_attention_cpu(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.kv_num_blocks,
            inputs.kv_indices,
            **inputs.mask,
            scores=inputs.scores,
            **more,
        )


def check(inputs: Inputs) -> None:
    out, lse = attend(inputs, return_lse=True)
    assert lse is not None
    assert_as_accurate_as_dense(out, inputs)
    assert_lse(lse, inputs)


@given(case=cases(dtypes=DTYPES, head_dims=(8, 16, 24), terms=TERMS))
def test_combinations_match_the_reference(implementation: str, case: Case) -> None:
    check(case.tensors())


@given(case=cases(dtypes=DTYPES, max_len=80, bad=True, terms=TERMS))
def test_non_finite_tokens_reach_only_the_rows_that_see_them(implementation: str, case: Case) -> None:
    inputs = case.tensors()
    assert_nonfinite_reach(attend(inputs)[0], inputs)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_term(implementation: str, dtype: torch.dtype, term: str) -> None:
    check(causal_case(dtype=dtype, terms=(term,), lists="full").tensors())


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (576, 512), (32, 16), (8, 8), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_head_sizes(implementation: str, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> None:
    sizes = {"head_dim": head_dim, "v_head_dim": v_head_dim, "scale": head_dim**-0.5, "kv_heads": 1}
    inputs = causal_case(dtype=dtype, **sizes).tensors()
    check(inputs)
    out, _ = block_sparse_attention(
        inputs.q, inputs.k, inputs.v, inputs.lists, scale=inputs.mask["scale"], visible=inputs.band
    )
    assert out.shape[-1] == v_head_dim


@given(case=cases(dtypes=(torch.float32,), terms=("bias", "mask")))
def test_the_map_has_the_blocks_with_a_visible_pair(case: Case) -> None:
    def make(inputs: Inputs) -> Tensor:
        assert inputs.scores is not None
        sizes = {"q_block": case.q_block, "kv_block": case.kv_block}
        return visible_blocks(inputs.q, inputs.k, inputs.scores, inputs.band, **sizes)

    check_map(case, case.tensors(), make)


@given(case=cases(dtypes=(torch.float32,), terms=("bias", "mask")))
def test_hidden_blocks_are_not_computed_and_not_counted(implementation: str, case: Case) -> None:
    check_count(case, case.tensors(), attend)


@given(case=cases(dtypes=(torch.float32,), square_blocks=True, terms=("bias", "mask")))
def test_selection_ranks_only_visible_blocks(implementation: str, case: Case) -> None:
    check_selection(case, case.tensors(), select_blocks_cpu, select_scored_cpu)


@given(case=column_cases(terms=TERMS))
def test_columns(case: ColumnCase) -> None:
    check_columns(case, case.tensors(), attend, attend_columns_cpu)


def test_refusals_say_what_was_given_and_what_is_accepted() -> None:
    inputs = causal_case().tensors()
    square = torch.zeros(1, 1, 300, 300)
    for scores, message in [
        (Scores(softcap=-1.0), "softcap is -1.0; accepted is a number above 0"),
        (Scores(mask=square), "mask is torch.float32 on cpu; accepted is bool"),
        (Scores(mask=square[0] > 0), r"mask has shape \(1, 300, 300\); accepted is \[2, 4, 300, 300\]"),
        (Scores(bias=square[..., :7]), r"bias has shape \(1, 1, 300, 7\)"),
        (Scores(slopes=torch.ones(3)), r"slopes is torch.float32 \(3,\)"),
        (Scores(sinks=torch.ones(3)), r"accepted is a float type \[4\]"),
    ]:
        with pytest.raises(KernelInputError, match=message):
            attend(replace(inputs, scores=scores))
    with pytest.raises(KernelInputError, match=r"blocks is torch\.bool"):
        attend(inputs, blocks=torch.ones(1, 1, 2, 2, dtype=torch.bool))
