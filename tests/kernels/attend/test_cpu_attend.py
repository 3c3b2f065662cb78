"""Both CPU attention implementations against the eager reference: every mask, layout, list and type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from sparsepass.kernels.attend.cpu import gather as cpu_gather
from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu
from sparsepass.kernels.runtime import build as cpu_build
from sparsepass.testing import (
    Case,
    Inputs,
    assert_as_accurate_as_dense,
    cases,
    lists_from_mask,
    poisoned_empty,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(params=["native", "gather"], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """Each implementation behind the public function; the C++ one where it can be built."""
    if request.param == "native" and not cpu_native.available(torch.float32):
        pytest.skip("the C++ kernel cannot be built here")
    patch = pytest.MonkeyPatch()
    if request.param == "gather":
        patch.setattr(cpu_native, "available", lambda dtype: False)
    yield cpu_native if request.param == "native" else cpu_gather
    patch.undo()


def attend(inputs: Inputs, **more: Any) -> tuple[Tensor, Tensor | None]:
    with poisoned_empty():
        return block_sparse_attention_cpu(
            inputs.q, inputs.k, inputs.v, inputs.kv_num_blocks, inputs.kv_indices, **inputs.mask, **more
        )


def check(inputs: Inputs) -> None:
    out, lse = attend(inputs, return_lse=True)
    assert lse is not None
    assert_as_accurate_as_dense(out, inputs)
    _, expected = inputs.reference()
    seen = inputs.visible().any(-1)
    assert torch.equal(lse == -torch.inf, ~seen)
    # A rounding of a score is absolute in the log-sum-exp; scores are products of D rounded terms.
    size = 1 + float((inputs.q.double().norm(dim=-1).max() * inputs.k.double().norm(dim=-1).max()).item())
    bound = 1e-6 * size * max(1.0, inputs.mask["scale"])
    torch.testing.assert_close(lse[seen].double(), expected[seen].double(), atol=bound, rtol=1e-5)


def causal_case(**changes: Any) -> Case:
    """A plain causal problem of several blocks with ragged ends, to vary."""
    plain = Case(
        batch=2, kv_heads=2, group=2, q_len=300, kv_len=300, head_dim=64, v_head_dim=64, dtype=torch.float32,
        q_block=64, kv_block=64, left=-1, right=0, offset=0, scale=0.125, layout="bshd", segments="none",
        lists="random", shared_lists="none", bad=0, seed=7,
    )  # fmt: skip
    return replace(plain, **changes)


@given(case=cases(dtypes=DTYPES))
@example(case=causal_case())
def test_matches_the_reference(implementation: ModuleType, case: Case) -> None:
    check(case.tensors())


@given(case=cases(dtypes=DTYPES, blocks=(8, 16), max_len=80, bad=True))
def test_non_finite_tokens_reach_only_the_rows_that_see_them(implementation: ModuleType, case: Case) -> None:
    inputs = case.tensors()
    out, lse = attend(inputs, return_lse=True)
    assert lse is not None
    expected, _ = inputs.reference()
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite)
    clean = replace(case, bad=0).tensors()
    tolerance = 8 * torch.finfo(case.dtype).eps * float(clean.v.abs().max())
    assert float((out.double() - expected)[finite].abs().max() if finite.any() else 0) <= tolerance


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes_and_types(implementation: ModuleType, head_dim: int, dtype: torch.dtype) -> None:
    check(causal_case(head_dim=head_dim, v_head_dim=head_dim, dtype=dtype, scale=head_dim**-0.5).tensors())


@pytest.mark.parametrize(
    "changes",
    [
        {"q_block": 128, "kv_block": 128, "q_len": 1000, "kv_len": 1000},
        {"q_block": 128, "kv_block": 64},
        {"q_block": 64, "kv_block": 128},
        {"q_len": 65, "offset": 235},
        {"right": -1},
        {"left": 100},
        {"left": 30, "right": 70},
        {"segments": "left_pad"},
        {"segments": "right_pad"},
        {"segments": "packed_pad"},
        {"segments": "interleaved"},
        {"segments": "all_padding"},
        {"lists": "empty_rows", "shared_lists": "both"},
        {"q_len": 1, "offset": 299},
        {"q_len": 100, "kv_len": 2500, "offset": 2400, "lists": "full", "batch": 1, "kv_heads": 1},
        {"scale": -0.2},
        {"scale": 0.0},
        {"head_dim": 33, "v_head_dim": 21},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_kind_of_problem(implementation: ModuleType, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    check(causal_case(dtype=dtype, **changes).tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_lists_equal_dense(implementation: ModuleType, dtype: torch.dtype) -> None:
    inputs = causal_case(lists="full", dtype=dtype, q_len=1000, kv_len=1000).tensors()
    out, _ = attend(inputs)
    reference, _ = inputs.reference()
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, is_causal=True, scale=0.125, enable_gqa=True
    )
    ours, theirs = ((x.double() - reference).abs().max().item() for x in (out, dense))
    assert ours <= 2 * theirs


def test_large_scores_keep_their_digits(implementation: ModuleType) -> None:
    """Scores in the hundreds, as trained models have: rounding them to bf16 would be an error of a whole e-fold."""
    inputs = causal_case(dtype=torch.bfloat16, scale=8.0, lists="full").tensors()
    check(inputs)


def test_layout_counter_and_no_lse(implementation: ModuleType) -> None:
    inputs = causal_case(shared_lists="head").tensors()
    counter = torch.zeros(3, dtype=torch.int64)
    out, lse = attend(inputs, counter=counter)
    assert lse is None
    assert out.transpose(1, 2).is_contiguous()
    assert counter.tolist() == [1, int(inputs.kv_num_blocks.sum()) * 4, 0]


def test_a_block_outside_the_keys_is_an_error(implementation: ModuleType) -> None:
    inputs = causal_case().tensors()
    inputs.kv_num_blocks[0, 0, 0] = 1
    inputs.kv_indices[0, 0, 0, 0] = 5
    with pytest.raises(IndexError, match=r"outside 0\.\.4"):
        attend(inputs)


def test_inputs_that_need_gradients(implementation: ModuleType) -> None:
    inputs = causal_case().tensors()
    out, _ = attend(replace(inputs, q=inputs.q.requires_grad_()))
    assert not out.requires_grad


def test_lists_with_a_zero_width_are_empty_rows(implementation: ModuleType) -> None:
    inputs = causal_case().tensors()
    named = torch.zeros(2, 4, 5, 0, dtype=torch.bool)
    counts, indices = lists_from_mask(named)
    out, lse = attend(replace(inputs, kv_num_blocks=counts, kv_indices=indices), return_lse=True)
    assert lse is not None
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_both_implementations_agree_on_one_thread() -> None:
    """The C++ kernel divides its rows among threads: the division must not show."""
    inputs = causal_case(dtype=torch.bfloat16).tensors()
    threads = torch.get_num_threads()
    many, _ = attend(inputs)
    try:
        torch.set_num_threads(1)
        one, _ = attend(inputs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, many)


SCRIPT = """
import logging, torch
logging.basicConfig(format="%(message)s")
from sparsepass.kernels.attend.cpu import native as cpu_native
print(cpu_native.available(torch.float32))
"""


def run_script(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)


def test_without_a_compiler_the_torch_form_serves_and_says_so(tmp_path: Any) -> None:
    done = run_script(CXX="no-such-compiler", SPARSEPASS_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "False"
    assert "no-such-compiler" in done.stderr


def test_the_environment_can_ask_for_the_torch_form(tmp_path: Any) -> None:
    done = run_script(SPARSEPASS_CPU_KERNEL="torch", SPARSEPASS_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "False"
    assert list(tmp_path.iterdir()) == []


def test_the_library_is_built_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu_build.library() is None:
        pytest.skip("the C++ kernel cannot be built here")
    monkeypatch.setenv("SPARSEPASS_CACHE_DIR", str(tmp_path))
    first = cpu_build.build()
    stamp = first.stat().st_mtime_ns
    assert cpu_build.build() == first
    assert first.stat().st_mtime_ns == stamp
    assert list(tmp_path.iterdir()) == [first]
