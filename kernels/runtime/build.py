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
from functools import lru_cache
from pathlib import Path

import torch

from sparsepass.errors import OptionError, close_names

log = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).parents[1] / name for name in ("attend/cpu/attend.cpp", "select/cpu/select.cpp"))
COMPILERS = ("g++", "clang++", "c++")
FLAGS: tuple[str, ...] = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # compilers default to 256 bits; the softmax is a third of the time in bf16


KERNEL_ENV = "SPARSEPASS_CPU_KERNEL"
KERNELS = ("native", "torch")
"""Values of the environment variable: the C++ kernels (the default), or torch operations."""


class BuildError(Exception):
    """Why the C++ kernels cannot be had here."""


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    if given:
        try:
            command = shlex.split(given)
        except ValueError as error:
            raise BuildError(f"CXX is {given!r}, which is no command ({error}); name a C++ compiler") from error
        if not command or not shutil.which(command[0]):
            raise BuildError(f"CXX is {given!r}, and there is no such program; name a C++ compiler, or unset it")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler found (looked for CXX, {', '.join(COMPILERS)})")


def _machine() -> str:
    """What a library depends on besides its source: a cache shared by machines must not hand one the other's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), libc or "", *features])


def _cache_folder() -> Path | None:
    """Where the library is kept; None where no folder is private to this user."""
    from sparsepass.kernels.runtime import cache as cpu_cache  # Linux alone has what it needs

    return cpu_cache.usable_folder()


def _file_name(compiler: list[str]) -> str:
    """The library's name: another for each source, compiler, flags, torch and CPU."""
    sources = [source.read_text(encoding="utf-8") for source in SOURCES]
    parts = (*sources, shlex.join(compiler), torch.__version__, torch.__file__, " ".join(FLAGS), _machine())
    return f"cpu_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"


def _compile(compiler: list[str], folder: Path) -> bytes:
    """The library's bytes, compiled in ``folder`` (about 10 s)."""
    package, output = Path(torch.__file__).parent, folder / "built.so"
    includes = (package / "include", package / "include" / "torch" / "csrc" / "api" / "include")
    command = [*compiler, *FLAGS, *(f"-I{path}" for path in includes), *map(str, SOURCES), "-o", str(output)]
    command += [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
        if done.returncode:
            said = done.stderr.decode(errors="replace")[-2000:].strip() or f"it ended with {done.returncode}"
            raise BuildError(f"{shlex.join(command)} failed:\n{said}")
        return output.read_bytes()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error


def _built() -> tuple[Path | None, bytes]:
    """The library's bytes, compiled unless they are kept, and the file that keeps them, if any."""
    if platform.system() != "Linux":
        raise BuildError(f"the C++ kernels are built on Linux only, this is {platform.system()}")
    from sparsepass.kernels.runtime import cache as cpu_cache

    compiler, folder = _compiler(), _cache_folder()
    file = None if folder is None else folder / _file_name(compiler)
    if folder is not None and file is not None:
        cpu_cache.remove_left_over(folder)
        kept = cpu_cache.read(file)
        if kept is not None:
            return file, kept
    try:
        with cpu_cache.build_folder(folder) as place:
            library = _compile(compiler, place)
    except OSError as error:
        raise BuildError(f"there is no folder to build in: {error}; set SPARSEPASS_CACHE_DIR or TMPDIR") from error
    if file is not None:
        try:
            cpu_cache.keep(file, library)
        except OSError as error:
            cpu_cache.say_not_kept(f"{str(file)!r} cannot be written ({error.strerror})")
            return None, library
    return file, library


def build() -> Path:
    """The file that keeps the compiled library, compiled if it is not there yet. Raises ``BuildError``."""
    file, _ = _built()
    if file is None:
        raise BuildError("there is no folder to keep the library in; set SPARSEPASS_CACHE_DIR to a folder of your own")
    return file


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it cannot be built; ``SPARSEPASS_CPU_KERNEL=torch`` also gives None.

    Raises ``OptionError`` for another value of that variable.
    """
    wanted = os.environ.get(KERNEL_ENV, "")
    if wanted not in ("", *KERNELS):
        raise OptionError(f"{KERNEL_ENV} is {wanted!r}. {close_names(wanted, KERNELS)}")
    if wanted == "torch":
        return None
    try:
        content = _built()[1]
        from sparsepass.kernels.runtime.cache import load

        found = load(content)
        if not found.sparsepass_runs():
            raise BuildError("this CPU has no packed matrix products in PyTorch (oneDNN's, x86 with AVX2 and later)")
        return found
    except (BuildError, OSError, AttributeError) as error:
        log.warning("block-sparse attention on the CPU runs as torch operations, about half as fast: %s", error)
        return None
