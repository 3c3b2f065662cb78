"""Every kernel, as its launcher would launch it, compiled for every target in its spec on a machine without a GPU."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels import spec
from sparsepass.kernels.attend.hopper import launch as attend_hopper
from sparsepass.kernels.attend.hopper.sass import disassembled, unset_descriptor
from sparsepass.kernels.runtime.launch import Launch
from tests.kernels.compile_offline import (
    DEEP,
    compile_hopper,
    compile_launch,
    launches_for,
    problems,
    resources,
    scored_launches_for,
)

SHARED_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
MATRIX_INSTRUCTION = {(8, 0): "mma.sync", (9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma"}
SPILLED = {("_lists_by_coverage", 1024, (9, 0)): 8}
"""Bytes by kernel, blocks and target: one register of 168, by Triton 3.7 (3.6 spills none). Eight warps spill nothing
and make the selection of top-p 31% slower (H200, Triton 3.6: 2.12 against 1.62 ms at 128K)."""

FAST = [(torch.bfloat16, 128), (torch.float32, 64)]
SLOW = problems(spec.CUDA.tuned_head_dims, tested=FAST)
SLOW += [(target, torch.float16, size, True) for target in spec.CUDA.capabilities for size in (128, 256) if DEEP]
"""fp16 differs from bf16 in one conversion: two sizes of it are enough."""

SKIPPING = [((8, 0), torch.bfloat16, 256, True), ((9, 0), torch.float32, 96, True), ((10, 0), torch.bfloat16, 96, True)]
SKIPPING = SLOW if DEEP else SKIPPING

TILE = next(tile for tile in attend_hopper.TILES if tile.dim == tile.keys == 128)
HOPPER = [(tile, torch.bfloat16, True) for tile in attend_hopper.TILES]
HOPPER += [(TILE, torch.float16, True), (TILE, torch.bfloat16, False)]
if DEEP:
    every = product(attend_hopper.TILES, (torch.bfloat16, torch.float16), (True, False))
    HOPPER = [(tile, dtype, segments) for tile, dtype, segments in every]


@pytest.fixture(autouse=True)
def _compiler_not_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import JITFunction

    from sparsepass.kernels.attend.triton import kernel as attend_tiles_triton

    if not isinstance(attend_tiles_triton.attend, JITFunction):
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run these tests without it")


def compile_all(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, dtype: torch.dtype, head_dim: int, segments: bool
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    check_launches(launches_for(dtype, head_dim, segments=segments, per_head=segments), capability, dtype)


def check_launches(launches: list[Launch], capability: spec.Capability, dtype: torch.dtype) -> None:
    """Compiles each: nothing spills but ``SPILLED``, it fits, and 16-bit products are on the matrix units."""
    for launch in launches:
        name = launch.kernel.__name__
        compiled = compile_launch(launch, capability)
        used = resources(compiled)
        spilled = SPILLED.get((name, launch.arguments.get("COLUMNS", 0), capability), 0)
        assert used["STACK"] + used["LOCAL"] <= spilled, f"{name} spills: {used}"
        assert used["SHARED"] <= SHARED_LIMIT[capability], f"{name}: {used}"
        assert used["REG"] >= 8, f"{name} was compiled to nothing: {used}"
        if name in ("attend", "_mass_scores", "_fold_parts") and dtype != torch.float32:
            assert MATRIX_INSTRUCTION[capability] in compiled.asm["ptx"], f"{name} leaves the matrix units idle"


@pytest.mark.parametrize("capability", spec.CUDA.capabilities, ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), [*FAST, (torch.float16, 64)], ids=str)
def test_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, dtype: torch.dtype, head_dim: int
) -> None:
    compile_all(monkeypatch, capability, dtype, head_dim, segments=True)


@pytest.mark.parametrize("capability", spec.CUDA.capabilities, ids=str)
def test_skipping_compiles_without_spills(monkeypatch: pytest.MonkeyPatch, capability: spec.Capability) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    launches = launches_for(torch.bfloat16, 128, segments=True, skip=1e-3)
    check_launches([one for one in launches if one.kernel.__name__ == "attend"], capability, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "head_dim", "segments"), SKIPPING, ids=str)
def test_skipping_compiles_without_spills_at_every_tuned_size(
    monkeypatch: pytest.MonkeyPatch,
    capability: spec.Capability,
    dtype: torch.dtype,
    head_dim: int,
    segments: bool,
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    launches = launches_for(dtype, head_dim, segments=segments, skip=1e-3)
    check_launches([one for one in launches if one.kernel.__name__ == "attend"], capability, dtype)


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


@pytest.mark.parametrize("capability", spec.CUDA.capabilities, ids=str)
@pytest.mark.parametrize(("dtype", "head_dim"), FAST, ids=str)
def test_scores_and_rules_compile_without_spills(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, dtype: torch.dtype, head_dim: int
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    check_launches(scored_launches_for(dtype, head_dim, segments=True, per_head=True), capability, dtype)


@pytest.mark.parametrize("capability", spec.CUDA.capabilities, ids=str)
def test_scores_of_every_query_compile_without_segments(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    launches = scored_launches_for(torch.bfloat16, 128, segments=False, kv_len=2**17)
    (mass,) = (one for one in launches if one.kernel.__name__ == "_mass_scores")
    check_launches([mass], capability, torch.bfloat16)
    if capability == (9, 0):  # three programs of four warps on a multiprocessor take turns; two were 18% slower
        used = resources(compile_launch(mass, capability))
        assert used["REG"] <= 65536 // (3 * 32 * mass.options["num_warps"]), used
        assert used["SHARED"] <= 227 * 1024 // 3, used


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "head_dim", "segments"), SLOW, ids=str)
def test_scores_and_rules_of_every_tuned_size_compile_without_spills(
    monkeypatch: pytest.MonkeyPatch,
    capability: spec.Capability,
    dtype: torch.dtype,
    head_dim: int,
    segments: bool,
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    check_launches(scored_launches_for(dtype, head_dim, segments=segments), capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kv_len", [1000, 2**17, 2**20])
def test_rules_compile_for_every_row_length(monkeypatch: pytest.MonkeyPatch, kv_len: int) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: (9, 0))
    launches = scored_launches_for(torch.bfloat16, 128, segments=True, kv_len=kv_len, per_head=True)
    rows = [one for one in launches if one.kernel.__name__ in ("_lists_by_coverage", "_scores_from_parts")]
    check_launches(rows, (9, 0), torch.bfloat16)


@pytest.mark.parametrize("kv_len", [1000, 2**17, 2**20])
def test_selection_compiles_for_every_row_length(monkeypatch: pytest.MonkeyPatch, kv_len: int) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: (9, 0))
    launches = launches_for(torch.bfloat16, 128, segments=False, kv_len=kv_len)
    select = next(launch for launch in launches if launch.kernel.__name__ == "_select")
    used = resources(compile_launch(select, (9, 0)))
    assert used["STACK"] + used["LOCAL"] == 0, used


@pytest.mark.skipif(attend_hopper.missing() is not None, reason="this Triton has not all of Gluon")
@pytest.mark.parametrize(
    ("tile", "dtype", "segments"), HOPPER, ids=lambda x: f"d{x.dim}-{x.keys}" if hasattr(x, "dim") else str(x)
)
def test_the_hopper_kernel_compiles(tile: attend_hopper.HopperTile, dtype: torch.dtype, segments: bool) -> None:
    compiled = compile_hopper(tile, dtype, segments=segments)
    used = resources(compiled)
    # A few numbers that are read once a tile may lie on the stack; the loop over blocks has none there.
    assert used["LOCAL"] == 0, used
    assert used["STACK"] <= 128, used
    entry = tile.entry_registers or 168
    assert used["REG"] == entry, f"{used}: registers are moved between the warps on the premise of {entry} each"
    # A multiprocessor keeps 1 KB for each program, and has 64 K registers for their 384 threads each.
    assert tile.residents * (used["SHARED"] + 1024) <= SHARED_LIMIT[(9, 0)] + 1024, used
    assert tile.residents * entry * 384 <= 65536
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "setmaxnreg.inc" in compiled.asm["ptx"]
    assert attend_hopper.unsound(compiled.asm["ttgir"]) is None
    code = disassembled(compiled.asm["cubin"])
    assert code is not None
    assert len(re.findall("HGMMA", code)) >= 8 * 2 * tile.dim // 64
    assert unset_descriptor(code) is None


CODE = """
        /*0000*/                   @P0 BRA 0x30 ;
        /*0010*/                   UMOV UR4, 0x1 ;
        /*0020*/                   UMOV UR5, 0x40000040 ;
        /*0030*/                   UIADD3.64 UR6, UR8, 0x2, URZ ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   EXIT ;
"""


def test_a_descriptor_that_a_path_leaves_unset_is_noticed() -> None:
    """What ptxas made of an earlier kernel: set before the first loop, read in the second."""
    assert "UR4 is not set" in (unset_descriptor(CODE) or "")
    assert "UR4 is not set" in (
        unset_descriptor(CODE.replace("@P0 BRA 0x30", "@P0 UMOV UR4, 0x0").replace("  UMOV UR4", "  UMOV UR9")) or ""
    )
    assert unset_descriptor(CODE.replace("BRA 0x30", "BRA 0x10")) is None
    assert unset_descriptor(CODE.replace("R24, gdesc", "R24, R16, gdesc")) is None


def test_a_dropped_value_is_noticed() -> None:
    """The miscompile that made an earlier kernel wait for ever: a loop that carries fewer values than it was given."""
    text = compile_hopper(TILE, torch.bfloat16, segments=False).asm["ttgir"]
    start = text.rindex("scf.while (") + len("scf.while (")
    assert attend_hopper.unsound(text[:start] + text[text.index(",", start) + 1 :]) is not None
    assert attend_hopper.unsound(text[: text.rindex("= tt.load")]) is not None
