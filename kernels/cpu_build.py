"""Build and load the C++ kernels: once per machine, with the compiler that Inductor needs anyway.

No compiler, or one that fails: the reason is logged once and the kernels in torch operations take over.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attend_cpu.cpp", "select_cpu.cpp"))
COMPILERS = ("g++", "clang++", "c++")
FLAGS: tuple[str, ...] = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # compilers default to 256 bits; the softmax is a third of the time in bf16


class BuildError(Exception):
    """Why the C++ kernels cannot be had here."""


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    if given:
        return shlex.split(given)
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler found (looked for CXX, {', '.join(COMPILERS)})")


def _cpu_name() -> str:
    """What -march=native depends on: a cache shared by machines must not hand one the other's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *features])


def _cache_folder() -> Path:
    """Private to the user: what lies there is loaded as code."""
    home = os.environ.get("SPARSEPASS_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sparsepass"
    )
    folder = Path(home)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="sparsepass-"))


def build() -> Path:
    """The shared library for this source, compiler, torch and CPU; compiled if it is not there yet (about 10 s)."""
    if platform.system() != "Linux":
        raise BuildError(f"the C++ kernels are built on Linux only, this is {platform.system()}")
    compiler = _compiler()
    package = Path(torch.__file__).parent
    includes = (package / "include", package / "include" / "torch" / "csrc" / "api" / "include")
    sources = [source.read_text() for source in SOURCES]
    parts = (*sources, shlex.join(compiler), torch.__version__, str(package), " ".join(FLAGS), _cpu_name())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = _cache_folder() / f"cpu_{key}.so"
    if library.exists():
        return library
    # Processes may build side by side: each under its own name, then one atomic rename.
    handle, part = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    command = [*compiler, *FLAGS, *(f"-I{path}" for path in includes), *map(str, SOURCES), "-o", part]
    command += [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        os.replace(part, library)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)
    return library


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it cannot be built; ``SPARSEPASS_CPU_KERNEL=torch`` also gives None."""
    if os.environ.get("SPARSEPASS_CPU_KERNEL", "") == "torch":
        return None
    try:
        built = ctypes.CDLL(str(build()))
        if not built.sparsepass_runs():
            raise BuildError("this CPU has no packed matrix products in PyTorch (oneDNN's, x86 with AVX2 and later)")
        return built
    except (BuildError, OSError) as error:
        log.warning("block-sparse attention on the CPU runs as torch operations, about half as fast: %s", error)
        return None
