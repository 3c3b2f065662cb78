"""What a bug report needs to know: versions, devices, which kernels can run here."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "networkx", "rich", "typer", "matplotlib")
VARIABLES = (
    "SPARSEPASS_",
    "TORCH_LOGS",
    "TORCHINDUCTOR_",
    "TORCHDYNAMO_",
    "TORCH_COMPILE_",
    "TRITON_",
    "CUDA_VISIBLE_DEVICES",
)
_CPU_KERNELS = ("sparsepass.kernels.attend.cpu.launch",)


def package_version() -> str:
    """The installed version; that of the source tree where sparsepass is only on the path."""
    try:
        return importlib.metadata.version("sparsepass")
    except importlib.metadata.PackageNotFoundError:
        return f"{getattr(importlib.import_module('sparsepass'), '__version__', 'unknown')} (not installed)"


@functools.cache
def cpu_name() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def environment() -> dict[str, dict[str, str]]:
    """Sections of name and value, as text: versions, devices, kernels, environment variables of the compiler stack.

    Nothing here raises: what is missing or broken is said in its value.
    """
    return {
        "versions": _versions(),
        "devices": _devices(),
        "kernels": _kernels(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def _versions() -> dict[str, str]:
    found = {
        "sparsepass": package_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, str]:
    try:
        import torch
    except Exception as error:  # a broken install is the very thing to report
        return {"torch": f"cannot be imported: {error}"}
    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    found["cuda of torch"] = str(torch.version.cuda or "none: a build for CPU only")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            props: Any = torch.cuda.get_device_properties(index)
            memory = props.total_memory / 2**30
            found[f"cuda:{index}"] = f"{props.name}, sm_{props.major}{props.minor}, {memory:.1f} GiB"
    return found


def _kernels() -> dict[str, str]:
    """Whether each kernel's module is there and what it needs; nothing of ours is imported or compiled for this."""
    triton = _has("triton")
    cuda = _devices().keys() & {"cuda:0"}
    gluon = triton and _has("triton.experimental.gluon")
    found = {"cpu": "available" if any(map(_has, _CPU_KERNELS)) else "missing from this installation"}
    if not triton:
        found["triton"] = 'unavailable: Triton is not installed (pip install "sparsepass[triton]")'
    elif not _has("sparsepass.kernels.attend.triton.launch"):
        found["triton"] = "missing from this installation"
    else:
        found["triton"] = "available" if cuda else "unavailable: no CUDA device"
    found["gluon of Triton"] = "present" if gluon else "absent"
    return found


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter lies; the CPU for a model, or a function, without any."""
    import torch

    first = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    return torch.device("cpu") if first is None else first.device
