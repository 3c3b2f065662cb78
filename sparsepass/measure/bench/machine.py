"""What a measurement ran on: device, versions, power state, command line. Nothing here raises."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsepass.host.environment import cpu_name, package_version

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_SMI = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""What holds the clocks down, under its newer and its older name."""


def device_name(device: torch.device) -> str:
    """``NVIDIA H200``, or the processor's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def describe(device: torch.device) -> dict[str, Any]:
    """The environment of a measurement, as its file holds it."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "command": command_line(),
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S %z"),
        "versions": versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "power": power_state(device),
    }
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
    else:
        flags = _cpu_fields().get("flags", _cpu_fields().get("Features", "")).split()
        found["features"] = [name for name in CPU_FEATURES if name in flags]
        found["cores"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    commit = _commit()
    return {**found, "commit": commit} if commit else found


def command_line() -> str:
    """The command of this process, as it can be given again."""
    start = Path(sys.argv[0])
    if start.name == "__main__.py":
        first = f"python -m {'.'.join(start.parent.parts[-2:])}"
    elif start.suffix == ".py":
        first = f"python {os.path.relpath(start)}"
    else:
        first = start.name
    return " ".join([first, shlex.join(sys.argv[1:])]).strip()


def versions() -> dict[str, str]:
    """Versions of what a time depends on."""
    found = {"sparsepass": package_version(), "python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if cudnn:
            found["cudnn"] = str(cudnn)
    return found


def power_state(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature now: of a GPU by nvidia-smi if it is there, of a CPU its governor and load."""
    if device.type == "cuda":
        return _smi(device)
    state: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        state["load_average"] = round(os.getloadavg()[0], 2)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    with contextlib.suppress(OSError):
        state["governor"] = governor.read_text().strip()
    return state


def _smi(device: torch.device) -> dict[str, Any]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"note": "nvidia-smi is not there"}
    index = torch.cuda.current_device() if device.index is None else device.index
    identity = str(getattr(torch.cuda.get_device_properties(index), "uuid", index))
    chosen = identity if identity.startswith("GPU-") or identity.isdigit() else f"GPU-{identity}"
    why = ""
    for names in ((*_SMI, _REASONS[0]), (*_SMI, _REASONS[1]), _SMI):
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", f"--id={chosen}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"note": f"nvidia-smi failed: {error}"}
        values = [value.strip() for value in done.stdout.strip().split(",")]
        if done.returncode == 0 and len(values) == len(names):
            return {name: _number(value) for name, value in zip(names, values, strict=True)}
        why = (done.stdout + done.stderr).strip()[:200]
    return {"note": f"nvidia-smi failed: {why}"}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _cpu_fields() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _commit() -> str:
    """The commit of the source tree, empty for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
