"""What an installation holds, and how little importing it costs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sparsepass
from sparsepass.host.environment import package_version

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "hypothesis",
    "jsonschema",
    "matplotlib",
    "sparsepass.cli",
    "sparsepass.measure",
    "torch._inductor.compile_fx",
    "transformers",
    "triton",
    "typer",
)


def run(*command: str, where: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str) -> str:
    """Output of a fresh interpreter that sees this tree, with none of this process's modules."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed() -> bool:
    try:
        importlib.metadata.version("sparsepass")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_install = pytest.mark.skipif(not installed(), reason="sparsepass is on the path but not installed")


def test_importing_is_light() -> None:
    loaded = python(f"import sys, sparsepass; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_structured_inputs_need_no_hypothesis() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None  # as if it were not installed
import sparsepass.testing
print(tuple(sparsepass.testing.structured_inputs(length=64, heads=2, kv_heads=1, head_dim=16).query.shape))
try:
    sparsepass.testing.cases
except ModuleNotFoundError as error:
    print(error)
"""
    shape, message = python(code).strip().splitlines()
    assert shape == "(1, 2, 64, 16)"
    assert message.endswith("which is not installed: pip install hypothesis")


def test_importing_changes_nothing_but_the_operator_registry() -> None:
    code = """
import torch, torch._dynamo
before = torch._dynamo.config.recompile_limit, torch.get_num_threads(), torch.is_grad_enabled()
import sparsepass
assert (torch._dynamo.config.recompile_limit, torch.get_num_threads(), torch.is_grad_enabled()) == before
assert "sparsepass" not in torch._dynamo.backends.registry._COMPILER_FNS
"""
    python(code)


@needs_install
def test_the_backend_is_found_by_name() -> None:
    (entry,) = (
        entry
        for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")
        if entry.name == "sparsepass" and entry.dist is not None
    )
    assert entry.load() is sparsepass.backend
    assert "True" in python("import torch; print('sparsepass' in torch._dynamo.list_backends())")


@needs_install
def test_versions_agree() -> None:
    assert importlib.metadata.version("sparsepass") == sparsepass.__version__ == package_version()


@needs_install
def test_the_command_is_installed() -> None:
    assert package_version() in run(sys.executable, "-c", "from sparsepass.cli.commands import main; main()", "version")


def shipped() -> set[str]:
    """Files of an installation, by their place in the package."""
    # rglob does not follow the two links.
    own = (path for path in (ROOT / "sparsepass").rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    files = {path.relative_to(ROOT).as_posix() for path in own}
    for folder in ("kernels", "patterns"):
        inside = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.parent.name != "__pycache__")
        files |= {f"sparsepass/{path.relative_to(ROOT).as_posix()}" for path in inside}
    return files


BUILD = """
import sys
from setuptools import build_meta
kinds, target = sys.argv[1], sys.argv[2]  # read first: building changes sys.argv
if "s" in kinds:
    build_meta.build_sdist(target)
if "w" in kinds:
    build_meta.build_wheel(target)
"""


def wheel_files(folder: Path) -> list[str]:
    (wheel,) = folder.glob("*.whl")
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file_once(tmp_path: Path) -> None:
    """Seen through the links in the package, each kernel would otherwise be packed twice, or not at all."""
    tree, first, second = (tmp_path / name for name in ("tree", "first", "second"))
    left_out = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "build", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
    first.mkdir()
    second.mkdir()
    run(sys.executable, "-c", BUILD, "sw", str(first), where=tree)
    names = wheel_files(first)
    assert len(names) == len(set(names))
    assert set(names) == shipped()

    (sdist,) = first.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # 3.11.4 brought it
        archive.extractall(tmp_path / "unpacked", **safely)  # type: ignore[arg-type]
    assert len(packed) == len(set(packed))
    assert {"LICENSE", "README.md", "pyproject.toml", "kernels/attend/api.py", "patterns/catalogue.py"} <= set(packed)
    (source,) = (tmp_path / "unpacked").iterdir()
    run(sys.executable, "-c", BUILD, "w", str(second), where=source)
    assert wheel_files(second) == names
