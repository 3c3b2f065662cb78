"""What the scripts of ``docs/measurements`` work out from times, errors and logs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparsepass.methods import AShape, Threshold, TopP

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "measurements"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def record(error: float, time: float, **facts: Any) -> dict[str, Any]:
    return {"length": 1024, "error": error, "median_ms": time, "over_dense": 10 / time, "variant": str(time), **facts}


def test_a_peer_is_compared_with_our_fastest_at_no_greater_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("error_time", monkeypatch)
    own = [record(0.5, 1.0, select_ms=0.1), record(0.3, 2.0, select_ms=0.1), record(0.1, 3.0, select_ms=0.1)]
    peers = [
        record(0.4, 8.0, curve="Theirs", default=True),
        record(0.3, 9.0, curve="Theirs", default=False),
        record(0.01, 9.0, curve="Theirs", default=False),
    ]
    other_length = record(0.0, 0.1, select_ms=0.1) | {"length": 2048}
    found = module.comparisons([*own, *peers, other_length, record(0.0, 5.0)])
    assert [(one["our_ms"], one["times_faster"]) for one in found] == [(2.0, 4.0), (2.0, 4.5)]


def test_dials_are_halved_by_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("error_time", monkeypatch)
    assert module.between(Threshold(0.01), Threshold(0.16)).alpha == pytest.approx(0.04)
    assert module.between(TopP(0.6), TopP(0.9)).coverage == pytest.approx(0.8)
    assert module.between(AShape(window=1000), AShape(window=4000)).window == 2000


def test_the_error_is_that_of_the_whole_output(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("error_time", monkeypatch)
    exact = torch.ones(1, 2, 3, 4)
    out = exact.clone()
    out[0, 1, 2, 3] = 3.0
    assert module.difference(out, exact) == {"error": pytest.approx(2 / 24**0.5), "max_error": 2.0}
    assert module.difference(out * torch.nan, exact)["error"] == float("inf")


def test_a_line_is_found_with_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy", reason="intervals take scipy")
    module = script("density_fit", monkeypatch)
    densities = [0.05, 0.1, 0.3, 0.6, 1.0]
    found = module.fit(densities, [10 * x + 0.5 + 0.01 * (-1) ** i for i, x in enumerate(densities)])
    for name, value in (("slope_ms", 10), ("constant_ms", 0.5)):
        low, high = found[f"{name}_interval"]
        assert low < value < high
        assert high - low < 0.1 * value


LOG = """========= COMPUTE-SANITIZER
kernels launched: a b
========= Invalid __global__ read of size 4 bytes
=========     at attend_hopper+0x1230 in hopper.py:23
=========     Address 0x7f is out of bounds
========= Error: Race reported between Write access at _select+0x10 in s.py:33
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_a_tools_log_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("sanitize", monkeypatch)
    said = module.judged(LOG)
    assert not said["clean"]
    assert "Invalid __global__ read of size 4 bytes at attend_hopper" in said["findings"]
    assert "Error: Race reported between Write access at _select in s.py:33" in said["findings"]
    assert module.judged("========= ERROR SUMMARY: 0 errors\n")["clean"]
    assert not module.judged("no summary")["clean"]


def test_every_launch_of_the_sources_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("sanitize", monkeypatch)
    assert {"attend", "attend_hopper", "_select", "_lists_by_coverage", "_attend_columns"} <= module.every_kernel()
