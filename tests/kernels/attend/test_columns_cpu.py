"""Attention over blocks and columns on the CPU against the float64 reference, through the common entry point."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from torch import Tensor

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.types import BlockLists, Columns, Visible
from sparsepass.testing import poisoned_empty
from tests.kernels.attend.column_cases import ColumnCase, ColumnInputs, assert_as_accurate_as_dense, column_cases

CPU = column_cases(dtypes=(torch.float32, torch.bfloat16, torch.float16), equal_v_dim=True, max_len=90)


def attend(given: ColumnInputs, counter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    whole = given.inputs
    mask = {name: whole.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
    blocks = (whole.mask["q_block"], whole.mask["kv_block"])
    lists = BlockLists(whole.kv_num_blocks, whole.kv_indices, *blocks, Columns(given.num, given.indices))
    with poisoned_empty():
        out, lse = block_sparse_attention(
            whole.q,
            whole.k,
            whole.v,
            lists,
            scale=whole.mask["scale"],
            visible=Visible(**mask),
            return_lse=True,
            counter=counter,
        )
    assert lse is not None
    return out, lse


@given(CPU)
def test_errs_at_most_twice_as_much_as_dense(case: ColumnCase) -> None:
    inputs = case.tensors()
    counter = torch.zeros(3, dtype=torch.int64)
    out, lse = attend(inputs, counter)
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_dense(out, inputs)
    torch.testing.assert_close(lse.double(), inputs.reference()[1], atol=2e-3, rtol=1e-3)
    blocks = case.case.batch * case.case.heads * -(-case.case.q_len // case.case.q_block)
    assert counter[0] == 1
    assert int(inputs.inputs.kv_num_blocks.sum()) <= int(counter[1]) <= 2 * blocks * 100


@given(column_cases(dtypes=(torch.float32,), equal_v_dim=True, max_len=90, bad=True))
def test_nonfinite_inputs_reach_only_the_rows_that_see_them(case: ColumnCase) -> None:
    inputs = case.tensors()
    out, _ = attend(inputs)
    reference, _ = inputs.reference()
    finite = reference.isfinite()
    assert torch.equal(out.isfinite(), finite)
    torch.testing.assert_close(out[finite].double(), reference[finite], atol=5e-3, rtol=2e-2)


@given(CPU)
def test_no_columns_change_nothing(case: ColumnCase) -> None:
    none = replace(case, share="none").tensors()
    out, _ = attend(none)
    reference, _ = none.inputs.reference()
    finite = reference.isfinite()
    torch.testing.assert_close(out[finite].double(), reference[finite], atol=2e-2, rtol=2e-2)
