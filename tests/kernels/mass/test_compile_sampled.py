"""The kept mass of sampled rows compiled for every target in the spec on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels import spec
from sparsepass.kernels.mass import triton as sampled_triton
from sparsepass.kernels.mass.triton import sampled_launches
from sparsepass.kernels.runtime.launch import Launch
from tests.kernels.compile_offline import DEEP, compile_launch, problems, resources
from tests.kernels.test_compile_targets import MATRIX_INSTRUCTION, SHARED_LIMIT

SLOW = problems(spec.CUDA.tuned_head_dims if DEEP else (256,), tested=[(torch.bfloat16, 128)])


def launches_for(dtype: torch.dtype, head_dim: int, segments: bool) -> list[Launch]:
    """32 query heads, 8 KV heads, on a fake GPU."""
    with FakeTensorMode():
        q, k = (
            torch.empty(2, 8192, heads, head_dim, dtype=dtype, device="cuda:0").transpose(1, 2) for heads in (32, 8)
        )
        numbers = torch.empty(2, 8192, dtype=torch.int32, device="cuda:0") if segments else None
        lse = torch.empty(2, 32, 8192, device="cuda:0")
        launches, _ = sampled_launches(
            q, k, lse, count=32, scale=0.1, left=-1, right=0, offset=0, q_segments=numbers, kv_segments=numbers
        )
    return launches


def compile_all(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, dtype: torch.dtype, head_dim: int, segments: bool
) -> None:
    from triton.runtime import JITFunction

    if not isinstance(sampled_triton._tile_lse, JITFunction):
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run these tests without it")
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    for launch in launches_for(dtype, head_dim, segments):
        name = launch.kernel.__name__
        compiled = compile_launch(launch, capability)
        used = resources(compiled)
        assert used["STACK"] + used["LOCAL"] == 0, f"{name} spills: {used}"
        assert used["SHARED"] <= SHARED_LIMIT[capability], f"{name}: {used}"
        if name == "_tile_lse" and dtype != torch.float32:
            assert MATRIX_INSTRUCTION[capability] in compiled.asm["ptx"], f"{name} leaves the matrix units idle"


@pytest.mark.parametrize("capability", spec.CUDA.capabilities, ids=str)
def test_compiles_without_spills(monkeypatch: pytest.MonkeyPatch, capability: spec.Capability) -> None:
    compile_all(monkeypatch, capability, torch.bfloat16, 128, segments=True)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "head_dim", "segments"), SLOW, ids=str)
def test_every_tuned_size_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, dtype: torch.dtype, head_dim: int, segments: bool
) -> None:
    compile_all(monkeypatch, capability, dtype, head_dim, segments)
