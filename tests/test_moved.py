"""Modules that moved are the same modules under the names they had."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sparsepass
from sparsepass.moved import MOVED, place_of

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *words: str) -> str:
    command = [sys.executable, *(["-c", code] if code else words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("old", MOVED)
def test_the_old_name_is_the_module(old: str) -> None:
    assert import_module(old) is import_module(MOVED[old])
    assert sys.modules[old].__name__ == MOVED[old]
    assert getattr(sys.modules[old].__spec__, "name", "") == MOVED[old]


def test_a_module_of_a_package_is_loaded_once() -> None:
    assert import_module("sparsepass.auto.router") is import_module("sparsepass.measure.auto.router")


def test_what_is_set_under_the_old_name_is_set_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = import_module("sparsepass.kernels.dispatch"), import_module("sparsepass.kernels.attend.api")
    monkeypatch.setattr(old, "block_sparse_attention", len)
    assert new.block_sparse_attention is len


def test_other_names_are_left_to_python() -> None:
    assert place_of("sparsepass.types") is None
    assert place_of("sparsepassed.ops") is None
    with pytest.raises(ModuleNotFoundError):
        import_module("sparsepass.nothing")
    with pytest.raises(ModuleNotFoundError):
        import_module("sparsepass.auto.nothing")


def test_public_functions_keep_their_names() -> None:
    """Importing the module that ``sparsepass.monitor`` was must not put it in the place of the function."""
    code = """
import sparsepass, sparsepass.monitor
from sparsepass.monitor import Monitor
from sparsepass import ops, counters, hints
from sparsepass.kernels import cpu_build, dispatch
assert callable(sparsepass.monitor) and Monitor is sparsepass.Monitor
assert ops is sparsepass.ops and ops.__name__ == "sparsepass.rewriting.ops"
assert sparsepass.kernels.dispatch is dispatch
assert not any(name.startswith(("sparsepass.measure", "sparsepass.cli")) for name in __import__("sys").modules)
"""
    run(code)
    assert callable(sparsepass.monitor)


def test_the_package_runs() -> None:
    assert sparsepass.__version__ in run("", "-m", "sparsepass", "version")
    assert "usage" in run("", "-m", "sparsepass.bench", "--help").lower()
