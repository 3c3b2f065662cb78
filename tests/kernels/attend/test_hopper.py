"""The Hopper attention kernel against the float64 reference. It has no interpreter: on a Hopper GPU, or not at all.

A kernel that waits for ever is the failure to fear here, so run these under a timeout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.testing import Case, Inputs, assert_as_accurate_as_dense, cases, poisoned_empty
from tests.kernels.device import EXAMPLES

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels.attend.hopper import launch as attend_hopper
from sparsepass.kernels.attend.triton.launch import attend_launches, block_sparse_attention_cuda

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")]

DRAWN: dict[str, Any] = {
    "dtypes": (torch.bfloat16, torch.float16),
    "blocks": (128, 256),
    "head_dims": (64, 80, 128, 256),
    "max_len": 900,
    "layouts": ("bshd", "packed"),
    "equal_v_dim": True,
}


def attend(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    reason = attend_hopper.why_not(
        inputs.q,
        inputs.k,
        inputs.v,
        scale=inputs.mask["scale"],
        q_block=inputs.mask["q_block"],
        kv_block=inputs.mask["kv_block"],
    )
    assume(reason is None)
    with poisoned_empty():
        return block_sparse_attention_cuda(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.kv_num_blocks,
            inputs.kv_indices,
            **inputs.mask,
            implementation="hopper",
            **options,
        )


@settings(max_examples=EXAMPLES)
@given(cases(**DRAWN))
def test_errs_at_most_twice_as_much_as_dense(case: Case) -> None:
    inputs = case.tensors("cuda")
    out, lse = attend(inputs, return_lse=True)
    assert lse is not None
    assert_as_accurate_as_dense(out, inputs)
    torch.testing.assert_close(lse.double(), inputs.reference()[1], atol=2e-3, rtol=1e-3)


@settings(max_examples=EXAMPLES)
@given(cases(**DRAWN, bad=True))
def test_hidden_values_reach_no_one(case: Case) -> None:
    """inf and NaN reach the rows that see them, and no other."""
    inputs = case.tensors("cuda")
    out, _ = attend(inputs)
    reference, _ = inputs.reference()
    finite = reference.isfinite()
    assert torch.equal(out.isfinite(), finite)
    torch.testing.assert_close(out[finite].double(), reference[finite], atol=5e-3, rtol=2e-2)


LONG = Case(
    batch=2,
    kv_heads=2,
    group=4,
    q_len=4000,
    kv_len=5000,
    head_dim=128,
    v_head_dim=128,
    dtype=torch.bfloat16,
    q_block=128,
    kv_block=128,
    left=-1,
    right=0,
    offset=1000,
    scale=0.1,
    layout="bshd",
    segments="none",
    lists="uneven",
    shared_lists="none",
    bad=0,
    seed=7,
)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("left", [-1, 700])
def test_more_tiles_than_programs(head_dim: int, left: int) -> None:
    """Several tiles to each program, of very different lengths: rings and tickets go round."""
    inputs = replace(LONG, head_dim=head_dim, v_head_dim=head_dim, left=left).tensors("cuda")
    for _ in range(3):
        out, _ = attend(inputs)
        assert_as_accurate_as_dense(out, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("jump", [4.0, 100.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_that_jump_from_one_block_to_the_next(head_dim: int, jump: float, dtype: torch.dtype) -> None:
    """What was summed before has to fade, and the log-sum-exp to follow, however far the maximum jumps."""
    case = replace(LONG, head_dim=head_dim, v_head_dim=head_dim, dtype=dtype, lists="random", group=1)
    inputs = case.tensors("cuda")
    inputs.k[:, :, 1000:1200] *= jump
    out, lse = attend(inputs, return_lse=True)
    assert_as_accurate_as_dense(out, inputs)
    assert lse is not None
    torch.testing.assert_close(lse.double(), inputs.reference()[1], atol=2e-2, rtol=1e-3)


def test_is_what_runs_by_default() -> None:
    inputs = LONG.tensors("cuda")
    arguments = {**inputs.mask, "return_lse": False}
    arguments.setdefault("counter", None)
    launches, _, _ = attend_launches(inputs.q, inputs.k, inputs.v, inputs.kv_num_blocks, inputs.kv_indices, **arguments)
    assert "attend_hopper" in [launch.kernel.__name__ for launch in launches]


def test_asked_for_by_name_it_does_not_fall_back() -> None:
    inputs = replace(LONG, dtype=torch.float32, q_len=200, kv_len=200, offset=0).tensors("cuda")
    with pytest.raises(KernelInputError, match="fp16 and bf16"):
        block_sparse_attention_cuda(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.kv_num_blocks,
            inputs.kv_indices,
            **inputs.mask,
            implementation="hopper",
        )


def test_repeated_calls_are_the_same() -> None:
    """Tiles are drawn by ticket, but each is computed in one order whoever draws it."""
    inputs = LONG.tensors("cuda")
    first = attend(inputs)[0].clone()
    assert all(torch.equal(first, attend(inputs)[0]) for _ in range(5))
