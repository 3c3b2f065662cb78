"""Versions: which were tested, that others are warned of once, and that the matrix and the constraints agree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sparsepass
from sparsepass.host import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / ".ci" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.14.1"])
def test_tested_versions_are_silent(version: str) -> None:
    assert versions.untested(version) is None


@pytest.mark.parametrize("version", ["2.10.0", "2.15.0", "2.15.0a0+git1234", "3.0.0", "unknown"])
def test_other_versions_are_named(version: str) -> None:
    said = versions.untested(version) or ""
    assert version in said
    assert "2.11 to 2.14 were" in said


def test_a_newer_torch_is_one_warning_at_the_first_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    versions.warn_of_untested.cache_clear()
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match=r"torch 9\.9\.0 was not tested"):
        sparsepass.backend(gm, [torch.ones(2)], options={"sparsepass.inductor": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsepass.backend(gm, [torch.ones(2)], options={"sparsepass.inductor": False})
    versions.warn_of_untested.cache_clear()


def test_no_version_of_torch_is_forbidden_above() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={versions.FIRST[0]}.{versions.FIRST[1]}" in project["dependencies"]


def test_the_matrix_runs_the_tested_versions(matrix: ModuleType) -> None:
    run = {tuple(map(int, row.torch.split(".")[:2])) for row in matrix.ROWS}
    assert (min(run), max(run)) == (versions.FIRST, versions.LAST)
    assert len(run) == versions.LAST[1] - versions.FIRST[1] + 1
    pinned = re.search(r"(?m)^torch==(\S+)$", (ROOT / "constraints.txt").read_text())
    assert pinned is not None
    assert pinned[1] in {row.torch for row in matrix.ROWS}, "what CI runs is a row"


def test_a_row_has_constraints_of_its_own(matrix: ModuleType) -> None:
    lines = matrix.constraints(matrix.Row("2.99.0", "3.99.0", "3.11")).splitlines()
    assert [line for line in lines if line.startswith(("torch==", "triton=="))] == ["torch==2.99.0", "triton==3.99.0"]


def test_a_version_that_cannot_be_had_is_a_row_that_says_so(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "ROWS", (matrix.Row("2.14.1", "3.8.0", "3.99"),))
    monkeypatch.setattr(matrix, "tree", lambda: "a tree")
    assert matrix.main(["--home", str(tmp_path)]) == 0
    assert "| 2.14.1 | 3.8.0 | 3.99 | no python3.99 | - |" in capsys.readouterr().out


def test_tests_run_once_for_a_tree(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees, ran = iter(("one", "one", "two")), []

    def run_tests(home: Path, workers: int) -> dict[str, object]:
        ran.append(home.name)
        return {"result": "5 passed, 1 failed, 0 skipped", "failed": ["tests.test_x::test_y"], "seconds": 3}

    monkeypatch.setattr(matrix, "ROWS", (matrix.Row("2.14.1", "3.8.0", "3.11"),))
    monkeypatch.setattr(matrix, "tree", lambda: next(trees))
    monkeypatch.setattr(matrix, "prepare", lambda row, home, given: home.mkdir(exist_ok=True))
    monkeypatch.setattr(matrix, "run_tests", run_tests)
    for times in (1, 1, 2):
        assert matrix.main(["--home", str(tmp_path)]) == 1
        assert len(ran) == times
    assert "torch-2.14.1-python-3.11: tests.test_x::test_y" in capsys.readouterr().out


def test_counts_are_read_off_pytests_report(matrix: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\n\ndef test_good():\n    pass\n\n\ndef test_bad():\n    assert False\n\n\n"
        "def test_left():\n    pytest.skip('x')\n"
    )
    report, log = tmp_path / "report.xml", tmp_path / "log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_some.py"]
    status = subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
    assert matrix.outcome(report, status, log) == {
        "result": "1 passed, 1 failed, 1 skipped",
        "failed": ["test_some::test_bad"],
    }
    assert matrix.outcome(tmp_path / "none.xml", 4, log)["failed"] == [str(log)]
