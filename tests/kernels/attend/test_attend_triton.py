"""The Triton attend kernel against the float64 reference: on a GPU where there is one, else under the interpreter.

``test_interpreter.py`` runs this file in a process of its own with TRITON_INTERPRET=1. bf16 is left to the GPU: the
interpreter's ``tl.dot`` multiplies the raw bits of bf16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from sparsepass.testing import Case, Inputs, assert_as_accurate_as_dense, cases, poisoned_empty
from tests.kernels.device import DEVICE, EXAMPLES, GPU, pytestmark  # noqa: F401

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.triton.launch import block_sparse_attention_cuda
from sparsepass.kernels.select.triton.topk import select_blocks_cuda

DRAWN: dict[str, Any] = {"max_len": 64}
if GPU:  # every new combination of sizes is compiled there, so that fewer are drawn
    DRAWN = {
        "dtypes": (torch.bfloat16, torch.float16, torch.float32),
        "blocks": (128,),
        "head_dims": (64, 80, 128),
        "max_len": 700,
        "layouts": ("bshd", "packed", "strided_dim"),
        "equal_v_dim": True,
    }
PLAIN = Case(
    batch=2,
    kv_heads=2 if GPU else 1,
    group=2,
    q_len=300 if GPU else 40,
    kv_len=300 if GPU else 40,
    head_dim=64 if GPU else 16,
    v_head_dim=64 if GPU else 16,
    dtype=torch.float16,
    q_block=128 if GPU else 16,
    kv_block=128 if GPU else 16,
    left=-1,
    right=0,
    offset=0,
    scale=0.125,
    layout="bshd",
    segments="none",
    lists="full",
    shared_lists="none",
    bad=0,
    seed=7,
)


def attend(inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """By the plain kernel: ``tests/kernels/attend/test_hopper.py`` has the other, and the two differ in rounding."""
    options = {**inputs.mask, "implementation": "triton", **options}
    with poisoned_empty():
        return block_sparse_attention_cuda(
            inputs.q, inputs.k, inputs.v, inputs.kv_num_blocks, inputs.kv_indices, **options
        )


@settings(max_examples=EXAMPLES)
@given(cases(**DRAWN))
def test_errs_at_most_twice_as_much_as_dense(case: Case) -> None:
    inputs = case.tensors(DEVICE)
    out, lse = attend(inputs, return_lse=True)
    assert out.transpose(1, 2).is_contiguous()
    assert lse is not None
    assert_as_accurate_as_dense(out, inputs)
    _, lse_reference = inputs.reference()
    torch.testing.assert_close(lse.double(), lse_reference, atol=2e-3, rtol=1e-3)


@settings(max_examples=EXAMPLES)
@given(cases(**DRAWN, bad=True))
def test_nonfinite_inputs_reach_only_the_rows_that_see_them(case: Case) -> None:
    inputs = case.tensors(DEVICE)
    out, _ = attend(inputs)
    reference, _ = inputs.reference()
    assert torch.equal(out.isfinite(), reference.isfinite())
    finite = reference.isfinite()
    torch.testing.assert_close(out[finite].double(), reference[finite], atol=5e-3, rtol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256] if GPU else [64, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32])
def test_every_head_size(dtype: torch.dtype, head_dim: int) -> None:
    inputs = replace(PLAIN, dtype=dtype, head_dim=head_dim, v_head_dim=head_dim, segments="packed").tensors(DEVICE)
    out, _ = attend(inputs)
    assert_as_accurate_as_dense(out, inputs)


def test_selecting_everything_is_dense_attention() -> None:
    inputs = PLAIN.tensors(DEVICE)
    count, lists = select_blocks_cuda(inputs.q, inputs.k, **inputs.mask, density=1.0)
    everything = replace(inputs, kv_num_blocks=count, kv_indices=lists)
    rows = -(-PLAIN.q_len // PLAIN.q_block)
    assert count[0, 0].tolist() == list(range(1, rows + 1))
    out, _ = attend(everything)
    assert_as_accurate_as_dense(out, everything)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_any_scale(scale: float) -> None:
    inputs = replace(PLAIN, scale=scale).tensors(DEVICE)
    out, _ = attend(inputs)
    assert_as_accurate_as_dense(out, inputs)


@pytest.mark.parametrize(("shared_lists", "segments"), [("none", "left_pad"), ("head", "left_pad"), ("both", "none")])
def test_counter_counts_what_ran(shared_lists: str, segments: str) -> None:
    case = replace(PLAIN, lists="random", shared_lists=shared_lists, segments=segments)
    inputs = case.tensors(DEVICE)
    counter = torch.tensor([3, 5, 7], device=DEVICE)
    for _ in range(2):
        attend(inputs, counter=counter)
    rows = inputs.kv_num_blocks.expand(case.batch, case.heads, -1)
    assert counter.tolist() == [5, 5 + 2 * int(rows.sum()), 7]


def test_lists_may_be_strided_and_log_sum_exp_is_optional() -> None:
    inputs = replace(PLAIN, lists="random").tensors(DEVICE)
    expected, lse = attend(inputs)
    assert lse is None
    wide = inputs.kv_indices.repeat_interleave(2, dim=-1)[..., ::2]
    count = inputs.kv_num_blocks.repeat_interleave(3, dim=2)[:, :, ::3]
    out, _ = attend(replace(inputs, kv_num_blocks=count, kv_indices=wide))
    assert torch.equal(out, expected)


def test_refusals_say_what_was_given_and_what_is_accepted() -> None:
    good = PLAIN.tensors(DEVICE)
    mask = good.mask
    cases_of_misuse: list[tuple[Inputs, str]] = [
        (replace(good, k=good.k.double()), "convert them to one"),
        (good.to64(), "supported: float16, bfloat16, float32"),
        (replace(good, v=good.v[:, :, :-1]), "expected the same batch"),
        (replace(good, q=good.q[0]), r"expected \[batch, heads, length, head_dim\]"),
        (replace(good, q=good.q.repeat(1, 1, 1, 40), k=good.k.repeat(1, 1, 1, 40)), "supported: 1 to 576"),
        (replace(good, kv_num_blocks=good.kv_num_blocks.long()), "expected int32"),
        (replace(good, kv_indices=good.kv_indices[:, :, :-1]), "expected"),
        (replace(good, mask={**mask, "q_block": 48}), "power of two"),
        (
            replace(good, mask={**mask, "kv_segments": torch.zeros(1, 3, dtype=torch.int32)}),
            r"kv_segments has shape \(1, 3\); expected int32",
        ),
        (replace(good, mask={**mask, "offset": 1 << 30}), "the kernels address up to"),
    ]
    for misuse, message in cases_of_misuse:
        with pytest.raises(KernelInputError, match=message):
            attend(misuse)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_captured_in_a_cuda_graph_and_replayed_on_new_data() -> None:
    inputs = replace(PLAIN, segments="packed").tensors(DEVICE)

    def run() -> Tensor:
        count, lists = select_blocks_cuda(inputs.q, inputs.k, **inputs.mask, density=0.5)
        out, _ = block_sparse_attention_cuda(inputs.q, inputs.k, inputs.v, count, lists, **inputs.mask)
        return out

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in (inputs.q, inputs.k, inputs.v):
        x.normal_()
    graph.replay()
    assert torch.equal(captured, run())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_problem_seen_before_runs_on_the_new_tensors() -> None:
    for seed in (1, 2):
        inputs = replace(PLAIN, seed=seed, segments="packed", lists="random").tensors(DEVICE)
        out, _ = attend(inputs)
        assert_as_accurate_as_dense(out, inputs)
        shared = replace(inputs, v=inputs.k)
        out, _ = attend(shared)
        assert_as_accurate_as_dense(out, shared)
    shifted = torch.empty(inputs.k.numel() + 1, dtype=inputs.k.dtype, device=DEVICE)[1:]
    misaligned = shifted.as_strided(inputs.k.shape, inputs.k.stride()).copy_(inputs.k)
    expected, _ = attend(inputs)
    out, _ = attend(replace(inputs, k=misaligned))
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_steps_err_no_more_than_few(head_dim: int) -> None:
    """Values of one sign first, then of the other: an error made in each step would favor the late ones."""
    case = replace(PLAIN, dtype=torch.float32, kv_len=4096, offset=3796, head_dim=head_dim, v_head_dim=head_dim)
    inputs = case.tensors(DEVICE)
    inputs.v[:, :, :2000] = 1.0
    inputs.v[:, :, 2000:] = -1.0
    out, _ = attend(inputs)
    assert_as_accurate_as_dense(out, inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_addresses_past_2_to_the_31() -> None:
    inputs = PLAIN.tensors(DEVICE)
    step = 2**31 // 250  # the last tokens lie past 2^31 elements
    far = torch.empty(PLAIN.kv_len * step + 4096, dtype=torch.float16, device=DEVICE)
    k = far.as_strided(inputs.k.shape, (2048, 1024, step, 1))
    k.copy_(inputs.k)
    expected, _ = attend(inputs)
    out, _ = attend(replace(inputs, k=k))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_lists_that_say_what_is_not_there_stay_in_memory(implementation: str) -> None:
    """Counts are cut to the width, blocks to those of the keys; good rows beside them are right."""
    good = PLAIN.tensors(DEVICE)
    expected, _ = attend(good, implementation=implementation)
    for count, block in ((2**30, 0), (-5, 0), (1, 2**30), (1, -(2**31)), (2**31 - 1, 2**31 - 1)):
        num, lists = good.kv_num_blocks.clone(), good.kv_indices.clone()
        num[:, :, 0], lists[:, :, 0] = count, block
        out, _ = attend(replace(good, kv_num_blocks=num, kv_indices=lists), implementation=implementation)
        assert torch.equal(out[:, :, PLAIN.q_block :], expected[:, :, PLAIN.q_block :])
