"""Checkpoints as safetensors, cut into parts of at most 15 MiB.

``full`` holds everything in float32 and resumes bit for bit; ``light`` holds weights in bfloat16, and the optimizer
starts anew with a warm-up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from examples.testbed.network import Weights

PART = 15 * 2**20


def write(folder: Path, weights: Weights, state: Weights, meta: dict[str, Any], *, full: bool) -> None:
    """Replace the checkpoint in ``folder``. ``meta`` is anything that JSON holds."""
    tensors = {f"weight {name}": tensor.detach() for name, tensor in weights.items()}
    if full:
        tensors |= {f"state {name}": tensor for name, tensor in state.items()}
    else:
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"meta": json.dumps(meta)})
    folder.mkdir(parents=True, exist_ok=True)
    parts = [content[start : start + PART] for start in range(0, len(content), PART)]
    for number, part in enumerate(parts):
        (folder / f"part{number:02d}.new").write_bytes(part)
    for old in folder.glob("part*.bin"):
        old.unlink()
    for number in range(len(parts)):
        (folder / f"part{number:02d}.new").rename(folder / f"part{number:02d}.bin")


def read(folder: Path) -> tuple[Weights, Weights, dict[str, Any]]:
    """Weights in float32, optimizer state (empty if light) and meta. Raises SystemExit if there is none."""
    parts = sorted(folder.glob("part*.bin"))
    if not parts:
        raise SystemExit(f"No checkpoint in {folder}: it has no part00.bin.")
    content = b"".join(part.read_bytes() for part in parts)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    tensors = load(content)
    chosen = {
        kind: {name[len(kind) :]: tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("weight ", "state ")
    }
    weights = {name: tensor.to(torch.float32) for name, tensor in chosen["weight "].items()}
    return weights, chosen["state "], json.loads(header["__metadata__"]["meta"])
