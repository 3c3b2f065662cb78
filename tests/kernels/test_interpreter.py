"""Runs the Triton kernels' tests under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["slash", "scored", "select", "attend", "columns", "sampled", "skip", "terms"])
def test_under_the_interpreter(name: str) -> None:
    (file,) = Path(__file__).parent.rglob(f"test_{name}_triton.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip("this Triton's interpreter reads numbers in a way that this numpy refuses; numpy 2.4 allows it")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout.splitlines()[-1], done.stdout
