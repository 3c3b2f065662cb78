"""What the CUDA kernels say they take, and why not."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sparsepass.kernels import spec
from sparsepass.kernels.spec import attend_tile, why_not

CUDA = torch.device("cuda", 0)
GOOD: dict[str, Any] = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, "capability": (9, 0)}


@pytest.fixture(autouse=True)
def _with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "triton_missing", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("capability", spec.CUDA.capabilities)
@pytest.mark.parametrize("dtype", spec.CUDA.dtypes)
@pytest.mark.parametrize("head_dim", spec.CUDA.tuned_head_dims)
def test_takes_what_the_spec_lists(dtype: torch.dtype, head_dim: int, capability: spec.Capability) -> None:
    assert why_not(device=CUDA, dtype=dtype, head_dim=head_dim, capability=capability) is None
    assert attend_tile(dtype, head_dim, capability).block_m >= 16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "run on cuda devices, not on cpu"),
        ({"dtype": torch.float64}, "dtype float64 is not supported; supported: float16, bfloat16, float32"),
        ({"head_dim": 640}, "head_dim 640 is not supported; supported: 1 to 576"),
        ({"v_head_dim": 576}, "v_head_dim 576 is not supported; supported: 1 to 512"),
        ({"capability": (7, 5)}, "compute capability 7.5; 8.0 or newer is needed"),
    ],
)
def test_says_why_not(change: dict[str, Any], reason: str) -> None:
    assert why_not(**GOOD) is None
    said = why_not(**{**GOOD, **change})
    assert said is not None
    assert reason in said


def test_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "triton_missing", lambda: True)
    said = why_not(**GOOD)
    assert said is not None
    assert "pip install" in said


def test_newer_and_odd_capabilities_have_a_tile() -> None:
    for capability in ((8, 6), (8, 9), (12, 0)):
        for dtype in spec.CUDA.dtypes:
            for head_dim, v_head_dim in ((8, 8), (16, 16), (72, 72), (160, 160), (192, 128), (256, 256), (576, 512)):
                for terms in (0, 1, 2, 3):
                    tile = attend_tile(dtype, head_dim, capability, v_head_dim=v_head_dim, terms=terms)
                    assert tile.num_warps >= 4


def test_asking_does_not_import_triton() -> None:
    code = (
        "import sys, torch; from sparsepass.kernels import spec, blocks; "
        "from sparsepass.kernels.attend import reference; "
        "spec.why_not(device=torch.device('cuda', 0), dtype=torch.float16, head_dim=64, capability=(9, 0)); "
        "sys.exit(any(m == 'triton' or m.startswith('triton.') for m in sys.modules) and 'triton' not in before)"
    )
    code = "import sys, torch; before = {m for m in sys.modules}; " + code
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
