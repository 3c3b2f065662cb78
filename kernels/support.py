"""Which inputs the kernels of each device take, and the block size they are best at."""

from __future__ import annotations

import torch

from sparsepass.kernels import spec

CPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CPU_HEAD_DIMS = (1, 1024)
DEFAULT_BLOCK = {"cuda": 128, "cpu": 128}
"""Tokens per block of the lists where the budget names none."""


def default_block(device: torch.device) -> int:
    return DEFAULT_BLOCK.get(device.type, 128)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> str | None:
    """None where the kernels of ``device`` take these inputs, else a sentence for the user."""
    if device.type == "cuda":
        return spec.why_not(device=device, dtype=dtype, head_dim=head_dim, v_head_dim=v_head_dim)
    if device.type != "cpu":
        return f"There are no kernels for {device.type} devices; there are for cuda and cpu."
    if dtype not in CPU_DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in CPU_DTYPES)
        return f"dtype {str(dtype).removeprefix('torch.')} is not supported on the CPU; supported: {known}."
    low, high = CPU_HEAD_DIMS
    for size in (head_dim, v_head_dim):
        if not low <= size <= high:
            return f"head size {size} is not supported on the CPU; supported: {low} to {high}."
    return None
