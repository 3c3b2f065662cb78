"""Column attention, estimation and diagonal lists compiled for every target in the spec on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels import spec
from sparsepass.kernels.attend.columns import triton as columns_triton
from sparsepass.kernels.attend.columns.triton import column_launches
from sparsepass.kernels.runtime.launch import Launch
from sparsepass.kernels.slash.triton.best import diagonal_list_launches, keep_best_launches
from sparsepass.kernels.slash.triton.estimate import estimate_launches
from tests.kernels.compile_offline import DEEP, compile_launch, problems, resources
from tests.kernels.test_compile_targets import MATRIX_INSTRUCTION, SHARED_LIMIT

DENSE_PRODUCTS = ("_attend_columns", "_estimate")
SLOW = problems(spec.CUDA.tuned_head_dims if DEEP else (64, 256), tested=[(torch.bfloat16, 128)])


@pytest.fixture(autouse=True)
def _compiler_not_interpreter() -> None:
    from triton.runtime import JITFunction

    if not isinstance(columns_triton._attend_columns, JITFunction):
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run these tests without it")


def launches_for(dtype: torch.dtype, head_dim: int, segments: bool, kv_len: int = 8192) -> list[Launch]:
    """Every launch of the two methods: 32 query heads, 8 KV heads, blocks of 128, on a fake GPU."""
    device = "cuda:0"
    with FakeTensorMode():

        def tokens(heads: int) -> torch.Tensor:
            return torch.empty(2, kv_len, heads, head_dim, dtype=dtype, device=device).transpose(1, 2)

        def int32(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        rows = kv_len // 128
        q, k, v, out = tokens(32), tokens(8), tokens(8), tokens(32)
        numbers = int32(2, kv_len) if segments else None
        band: dict[str, Any] = {
            "scale": 0.1,
            "left": -1,
            "right": 0,
            "offset": 0,
            "q_segments": numbers,
            "kv_segments": numbers,
        }
        counter = torch.empty(3, dtype=torch.int64, device=device)
        launches, sums, _ = estimate_launches(
            q, k, int32(2, 4), int32(2, 4), **band, first_diagonal=1 - kv_len, diagonals=kv_len
        )
        share, limit = torch.empty(2, 32, device=device), int32(2, 32)
        for by_mass in (None, share):
            launches += keep_best_launches(
                sums, most=limit, width=512, share=by_mass, least=limit, first=int32(2), forced=4, floor=limit
            )[0]
        flags = torch.empty(2, 32, rows + 1, dtype=torch.int8, device=device)
        shape = (kv_len, kv_len, -1, 0, 0)
        launches += diagonal_list_launches(flags, None, -rows, shape, numbers, numbers, 128, rows, counter)[0]
        launches += column_launches(
            q,
            k,
            v,
            int32(2, 32, rows),
            int32(2, 32, rows, 10),
            int32(2, 32, 1),
            int32(2, 32, 1, 512),
            out,
            torch.empty(2, 32, kv_len, device=device),
            **band,
            q_block=128,
            kv_block=128,
            counter=counter,
        )
    return launches


def compile_all(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, dtype: torch.dtype, head_dim: int, segments: bool
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    for launch in launches_for(dtype, head_dim, segments):
        name = launch.kernel.__name__
        compiled = compile_launch(launch, capability)
        used = resources(compiled)
        assert used["STACK"] + used["LOCAL"] == 0, f"{name} spills: {used}"
        assert used["SHARED"] <= SHARED_LIMIT[capability], f"{name}: {used}"
        assert used["REG"] >= 8, f"{name} was compiled to nothing: {used}"
        if name in DENSE_PRODUCTS and dtype != torch.float32:
            assert MATRIX_INSTRUCTION[capability] in compiled.asm["ptx"], f"{name} leaves the matrix units idle"


@pytest.mark.parametrize("capability", spec.CUDA.capabilities, ids=str)
def test_compiles_without_spills(monkeypatch: pytest.MonkeyPatch, capability: spec.Capability) -> None:
    compile_all(monkeypatch, capability, torch.bfloat16, 128, segments=True)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "head_dim", "segments"), SLOW, ids=str)
def test_every_tuned_size_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch,
    capability: spec.Capability,
    dtype: torch.dtype,
    head_dim: int,
    segments: bool,
) -> None:
    compile_all(monkeypatch, capability, dtype, head_dim, segments)


def test_keys_and_values_are_gathered_by_asynchronous_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gathers are pipelined only if the compiler turns them into such copies, 16 bytes each."""
    monkeypatch.setattr(spec, "_capability", lambda index: (9, 0))
    launches = launches_for(torch.bfloat16, 128, segments=False)
    attend = next(launch for launch in launches if launch.kernel.__name__ == "_attend_columns")
    assert "cp.async.cg.shared.global" in compile_launch(attend, (9, 0)).asm["ptx"]
