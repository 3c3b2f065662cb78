"""The attention with changed scores compiled for every target in the spec, and unchanged where nothing changes them."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels import spec
from sparsepass.kernels.attend.triton import kernel as attend_tiles_triton
from sparsepass.testing import TERMS
from tests.kernels.compile_offline import DEEP, compile_launch, launches_for, term_launches_for
from tests.kernels.test_compile_targets import check_launches

NEW = ("attend", "_block_map", "add_nonfinite_values")
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)]
LATENT = (576, 512)


@pytest.fixture(autouse=True)
def _compiler_not_interpreter() -> None:
    from triton.runtime import JITFunction

    if not isinstance(attend_tiles_triton.attend, JITFunction):
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler; run these tests without it")


def compile_terms(
    monkeypatch: pytest.MonkeyPatch,
    capability: spec.Capability,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    terms: tuple[str, ...],
) -> None:
    monkeypatch.setattr(spec, "_capability", lambda index: capability)
    launches = term_launches_for(dtype, *sizes, terms, segments=True)
    launches = [launch for launch in launches if launch.kernel.__name__ in NEW]
    # Tiles of 32 rows, for 576 dimensions, are too small for sm_90's own matrix instruction.
    check_launches(launches, capability, torch.float32 if sizes == LATENT else dtype)


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [*((target, (128, 128)) for target in spec.CUDA.capabilities), ((9, 0), (192, 128))],
    ids=str,
)
def test_all_terms_compile_without_spills(
    monkeypatch: pytest.MonkeyPatch, capability: spec.Capability, sizes: tuple[int, int]
) -> None:
    compile_terms(monkeypatch, capability, torch.bfloat16, sizes, TERMS)


@pytest.mark.parametrize("terms", [("bias", "mask"), ("slopes", "bias")], ids=" ".join)
def test_some_terms_compile_without_spills(monkeypatch: pytest.MonkeyPatch, terms: tuple[str, ...]) -> None:
    """Where a bias and a mask meet, the tile is another; what is added alone must fit the greater one."""
    compile_terms(monkeypatch, (8, 0), torch.bfloat16, (128, 128), terms)


SLOW = [
    (target, terms, sizes, dtype)
    for target in spec.CUDA.capabilities
    for terms in ((), ("softcap",), ("softcap", "mask", "sinks"), TERMS)
    for sizes in (*SIZES, LATENT)
    for dtype in (torch.bfloat16, torch.float32)
]
if not DEEP:  # the widest head on every target; fp32 and a small head on one each
    FEW = {((8, 0), (64, 64), torch.float32), ((9, 0), LATENT, torch.float32), ((10, 0), (64, 64), torch.bfloat16)}
    FEW |= {(target, LATENT, torch.bfloat16) for target in spec.CUDA.capabilities}
    SLOW = [one for one in SLOW if one[1] == TERMS and (one[0], *one[2:]) in FEW]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "terms", "sizes", "dtype"), SLOW, ids=str)
def test_every_size_compiles_without_spills(
    monkeypatch: pytest.MonkeyPatch,
    capability: spec.Capability,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    terms: tuple[str, ...],
) -> None:
    compile_terms(monkeypatch, capability, dtype, sizes, terms)


def test_nothing_is_compiled_of_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who changes no scores gets the kernel of before: no parameter more, no instruction of a term."""
    monkeypatch.setattr(spec, "_capability", lambda index: (9, 0))
    plain = launches_for(torch.bfloat16, 128, segments=False)
    launch = next(one for one in plain if one.kernel.__name__ == "attend")
    names = {
        *("mask_ptr", "bias_ptr", "slopes_ptr", "sinks_ptr", "factor", "softcap", "hidden", "skip"),
        *(f"{tensor}_stride_{dim}" for tensor in ("mask", "bias") for dim in "bhqk"),
        *("slopes_stride_b", "slopes_stride_h", "sinks_stride"),
    }
    assert {name for name, value in launch.arguments.items() if value is None} == names
    assert launch.arguments["CHANGED"] is False
    assert launch.arguments["TAIL"] == 0
    text = compile_launch(launch, (9, 0)).asm["ptx"]
    capped = term_launches_for(torch.bfloat16, 128, 128, ("softcap",))
    changed = compile_launch(next(one for one in capped if one.kernel.__name__ == "attend"), (9, 0)).asm["ptx"]
    parameters = [len(re.findall(r"\.param ", one)) for one in (text, changed)]
    assert parameters[1] == parameters[0] + 2  # the factor and the cap
