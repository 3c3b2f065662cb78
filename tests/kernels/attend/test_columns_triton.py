"""Attention over blocks and columns in Triton against the float64 reference: on a GPU, else under the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sparsepass.testing import poisoned_empty
from tests.kernels.attend.column_cases import ColumnCase, ColumnInputs, assert_as_accurate_as_dense, column_cases
from tests.kernels.attend.test_attend_triton import DRAWN, PLAIN
from tests.kernels.device import DEVICE, EXAMPLES, GPU, pytestmark  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.columns.triton import attend_columns_cuda
from sparsepass.kernels.attend.triton.launch import block_sparse_attention_cuda

HALF = ColumnCase(PLAIN, "some", (False, False, True))


def attend(given: ColumnInputs, **options: Any) -> tuple[Tensor, Tensor]:
    whole = given.inputs
    options = {**whole.mask, **options}
    with poisoned_empty():
        out, lse = block_sparse_attention_cuda(
            whole.q, whole.k, whole.v, whole.kv_num_blocks, whole.kv_indices, return_lse=True, **options
        )
        assert lse is not None
        lists = (whole.kv_num_blocks, whole.kv_indices)
        attend_columns_cuda(
            whole.q, whole.k, whole.v, lists[0], lists[1], given.num, given.indices, out, lse, **options
        )
    return out, lse


@settings(max_examples=EXAMPLES)
@given(column_cases(**DRAWN))
def test_errs_at_most_twice_as_much_as_dense(case: ColumnCase) -> None:
    inputs = case.tensors(DEVICE)
    out, lse = attend(inputs)
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_dense(out, inputs)
    _, expected = inputs.reference()
    torch.testing.assert_close(lse.double(), expected, atol=2e-3, rtol=1e-3)


@settings(max_examples=EXAMPLES)
@given(column_cases(**DRAWN, bad=True))
def test_nonfinite_inputs_reach_only_the_rows_that_see_them(case: ColumnCase) -> None:
    inputs = case.tensors(DEVICE)
    out, _ = attend(inputs)
    reference, _ = inputs.reference()
    finite = reference.isfinite()
    assert torch.equal(out.isfinite(), finite)
    torch.testing.assert_close(out[finite].double(), reference[finite], atol=5e-3, rtol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256] if GPU else [64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32])
def test_every_head_size(dtype: torch.dtype, head_dim: int) -> None:
    plain = replace(PLAIN, dtype=dtype, head_dim=head_dim, v_head_dim=head_dim, segments="packed", lists="sparse")
    inputs = replace(HALF, case=plain).tensors(DEVICE)
    out, _ = attend(inputs)
    assert_as_accurate_as_dense(out, inputs)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale: float) -> None:
    inputs = replace(HALF, case=replace(PLAIN, scale=scale, lists="sparse")).tensors(DEVICE)
    out, lse = attend(inputs)
    assert_as_accurate_as_dense(out, inputs)
    torch.testing.assert_close(lse.double(), inputs.reference()[1], atol=2e-3, rtol=1e-3)


def test_every_key_as_a_column_is_dense_attention() -> None:
    everything = ColumnCase(replace(PLAIN, lists="empty_rows"), "all", (True, True, True)).tensors(DEVICE)
    out, _ = attend(everything)
    assert_as_accurate_as_dense(out, everything)


def test_counter_counts_what_ran() -> None:
    case = replace(PLAIN, lists="sparse", segments="left_pad", right=0, left=-1)
    inputs = replace(HALF, case=case).tensors(DEVICE)
    counter = torch.tensor([3, 5, 7], device=DEVICE)
    attend(inputs, counter=counter)
    plain = inputs.inputs
    rows = plain.kv_num_blocks.expand(case.batch, case.heads, -1)
    apart = (inputs.visible() & ~plain.visible()).unflatten(2, (-1, 1))
    columns = torch.stack([part.flatten(2, 3).any(2).sum(-1) for part in apart.split(case.q_block, 2)], -1)
    blocks = -(-columns // case.kv_block)
    assert counter.tolist() == [4, 5 + int(rows.sum()) + int(blocks.sum()), 7]


def test_refusals_say_what_was_given_and_what_is_accepted() -> None:
    good = HALF.tensors(DEVICE)
    misuses = [
        (replace(good, num=good.num.long()), "columns.num is torch.int64"),
        (replace(good, num=good.num[:, :1]), r"columns.indices has shape .*; expected"),
        (replace(good, num=good.num[..., 0]), "columns.num has shape"),
    ]
    for misuse, message in misuses:
        with pytest.raises(KernelInputError, match=message):
            attend(misuse)
