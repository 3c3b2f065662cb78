"""The compiled library's cache: whose folder, whose file, and what a broken one does."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsepass.errors import OptionError
from sparsepass.kernels.runtime import build as cpu_build
from sparsepass.kernels.runtime import cache as cpu_cache
from sparsepass.kernels.runtime import tuned

LIBRARY = b"not really a library" * 1000


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPASS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_build, "_compile", lambda compiler, folder: LIBRARY)
    monkeypatch.setattr(cpu_build, "_compiler", lambda: ["c++"])
    tuned.warn_once.cache_clear()


def test_the_folder_is_private_and_the_library_is_kept() -> None:
    file = cpu_build.build()
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert cpu_cache.read(file) == LIBRARY
    assert list(file.parent.iterdir()) == [file]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "half": lambda good: good[: len(good) // 2],
    "a byte less": lambda good: good[:-1],
    "a byte more": lambda good: good + b"\0",
    "a flipped bit": lambda good: good[:500] + bytes([good[500] ^ 1]) + good[501:],
    "a flipped digest": lambda good: good[:-1] + bytes([good[-1] ^ 1]),
    "no digest": lambda good: LIBRARY,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_built_again(how: str) -> None:
    file = cpu_build.build()
    good = file.read_bytes()
    file.write_bytes(BROKEN[how](good))
    assert cpu_cache.read(file) is None
    assert cpu_build.build().read_bytes() == good


def test_a_folder_under_the_name_is_named(caplog: pytest.LogCaptureFixture) -> None:
    file = cpu_build.build()
    file.unlink()
    file.mkdir()
    assert cpu_build._built() == (None, LIBRARY)
    assert str(file) in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(mode: int, caplog: pytest.LogCaptureFixture) -> None:
    file = cpu_build.build()
    file.parent.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert cpu_build._built() == (None, LIBRARY)
    assert str(file.parent) in caplog.text
    assert "SPARSEPASS_CACHE_DIR" in caplog.text
    with pytest.raises(cpu_build.BuildError, match="SPARSEPASS_CACHE_DIR"):
        cpu_build.build()


def test_a_file_that_others_may_have_written_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    file = cpu_build.build()
    file.chmod(0o666)
    assert cpu_cache.read(file) is None
    file.chmod(0o600)
    assert cpu_cache.read(file) == LIBRARY
    if os.geteuid() != 0:
        return
    os.chown(file, 12345, 12345)
    assert cpu_cache.read(file) is None
    os.chown(file.parent, 12345, 12345)
    assert cpu_cache.usable_folder() is None


def test_a_pipe_under_the_name_does_not_hang() -> None:
    file = cpu_build.build()
    file.unlink()
    os.mkfifo(file)
    assert cpu_cache.read(file) is None


def test_a_cache_that_is_a_file_and_no_home_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("x")
    assert cpu_build._built() == (None, LIBRARY)
    assert str(tmp_path / "cache") in caplog.text
    monkeypatch.delenv("SPARSEPASS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python does where nobody knows the user
    monkeypatch.chdir(tmp_path)
    assert tuned.cache_home() is None
    assert tuned.tuning_file() is None
    assert cpu_build._built() == (None, LIBRARY)
    assert "no home folder" in caplog.text
    assert [one.name for one in tmp_path.iterdir()] == ["cache"]


def test_nothing_is_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor of a process that was killed while it built; one that still builds is left alone."""
    places: list[Path] = []

    def noted(compiler: object, folder: Path) -> bytes:
        places.append(folder)
        return LIBRARY

    monkeypatch.setattr(cpu_build, "_compile", noted)
    cache = cpu_build.build().parent
    assert places[0].parent == cache
    dead, alive = cache / ".build-dead", cache / ".build-alive"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "built.so").write_bytes(b"x")
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    file = cpu_build.build()
    assert sorted(cache.iterdir()) == sorted([alive, file])
    os.close(lock)
    cpu_build.build()
    assert list(cache.iterdir()) == [file]
    cache.chmod(0o777)
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    cpu_build._built()
    assert places[-1].parent == temporary
    assert list(temporary.iterdir()) == []


def test_the_name_depends_on_all_that_the_library_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [cpu_build._file_name(["g++"]), cpu_build._file_name(["clang++"])]
    source = tmp_path / "other.cpp"
    source.write_text("int other;")
    changes: list[tuple[Any, str, Any]] = [
        (cpu_build, "FLAGS", (*cpu_build.FLAGS, "-O1")),
        (cpu_build, "SOURCES", (source,)),
        (cpu_build, "_machine", lambda: "another"),
        (torch, "__version__", "0.0"),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.append(cpu_build._file_name(["g++"]))
    assert len(set(names)) == len(names)
    assert cpu_build._file_name(["g++"]) == names[0]


def test_a_value_of_the_environment_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPASS_CPU_KERNEL", "tourch")
    cpu_build.library.cache_clear()
    try:
        with pytest.raises(OptionError, match=r"SPARSEPASS_CPU_KERNEL is 'tourch'. Did you mean 'torch'"):
            cpu_build.library()
    finally:
        cpu_build.library.cache_clear()


@pytest.mark.parametrize(
    ("given", "said"),
    [("/no/such/g++", "no such program"), ('g++ "-O2', "No closing quotation"), ("   ", "no such program")],
)
def test_a_compiler_that_cannot_be_is_named(given: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", given)
    with pytest.raises(cpu_build.BuildError, match=said) as caught:
        cpu_build._compiler()
    assert repr(given) in str(caught.value)


@pytest.mark.parametrize(("given", "said"), [("false", "ended with 1"), ("true", "built.so")])
def test_a_compiler_that_makes_nothing_is_named(
    given: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    with pytest.raises(cpu_build.BuildError, match=said) as caught:
        cpu_build._compile([given], tmp_path)
    assert str(caught.value).startswith(given)
