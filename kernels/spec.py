"""What each kernel supports, as data, and why it does not take what it does not. No Triton import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError

Capability = tuple[int, int]
"""CUDA compute capability, for instance (9, 0)."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """The inputs that one device's kernels take."""

    device_type: str
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, int]
    """Least and greatest head size of queries and keys; those that do not fill a tile are padded inside the kernel."""
    v_head_dims: tuple[int, int]
    """The same of values."""
    tuned_head_dims: tuple[int, ...]
    """Head sizes that models use: compiled for every target in the tests, and timed."""
    capabilities: tuple[Capability, ...]
    """CUDA targets that the tests compile for; any capability from the first on runs."""
    max_kv_blocks: int
    """Longest row of blocks that selection handles."""


CUDA = KernelSpec(
    device_type="cuda",
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    head_dims=(1, 576),
    v_head_dims=(1, 512),
    tuned_head_dims=(64, 80, 96, 128, 256),
    capabilities=((8, 0), (9, 0), (10, 0)),
    max_kv_blocks=8192,
)


class AttendTile(NamedTuple):
    """Shape of one attend program: query rows, keys per step, warps, stages of the load pipeline.

    ``edge_n`` and ``edge_stages`` are keys per step and stages where blocks need a mask; ``dim_step`` is how many
    dimensions of the scores are summed at a time. ``precision`` is how float32 is multiplied: ``tf32x3`` adds three
    tf32 products and errs less than ``ieee`` (docs/benchmarks.md), which leaves the matrix units idle and was four
    times slower.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    edge_n: int
    edge_stages: int
    dim_step: int = 256
    precision: str = "tf32x3"


HALF_TILES = {
    (8, 64): AttendTile(128, 64, 8, 2, 32, 2),
    (8, 128): AttendTile(128, 64, 8, 2, 16, 1),
    (8, 256): AttendTile(64, 32, 8, 2, 16, 1),
    (9, 64): AttendTile(128, 128, 8, 3, 64, 2),
    (9, 128): AttendTile(128, 128, 8, 3, 64, 1),
    (9, 256): AttendTile(128, 64, 8, 2, 16, 2),
    (10, 64): AttendTile(128, 128, 8, 3, 64, 2),
    (10, 128): AttendTile(128, 128, 8, 3, 64, 2),
    (10, 256): AttendTile(64, 64, 8, 2, 32, 1),
}
"""Tiles for fp16 and bf16 by (major compute capability, padded head size): timed on 9, sized not to spill on 8, 10."""

FLOAT_TILES = {
    (8, 64): AttendTile(128, 32, 8, 2, 16, 1, dim_step=32),
    (8, 128): AttendTile(32, 32, 8, 2, 16, 1, dim_step=32),
    (8, 256): AttendTile(16, 32, 8, 1, 16, 1, dim_step=32),
    (9, 64): AttendTile(128, 32, 8, 2, 32, 1),
    (9, 128): AttendTile(128, 32, 8, 2, 16, 1, dim_step=64),
    (9, 256): AttendTile(16, 32, 8, 1, 16, 1, dim_step=32),
    (10, 64): AttendTile(64, 32, 8, 2, 32, 1, dim_step=64),
    (10, 128): AttendTile(64, 32, 8, 2, 16, 1, dim_step=64),
    (10, 256): AttendTile(16, 32, 8, 1, 16, 1, dim_step=32),
}
"""The same for float32."""


TERM_TILES = {
    (8, 64): AttendTile(128, 64, 8, 2, 32, 2),
    (8, 128): AttendTile(128, 32, 8, 3, 16, 1),
    (8, 256): AttendTile(64, 32, 8, 1, 16, 1),
    (9, 64): AttendTile(128, 128, 8, 3, 64, 2),
    (9, 128): AttendTile(128, 64, 8, 3, 32, 1),
    (9, 256): AttendTile(128, 64, 8, 2, 16, 2),
    (10, 64): AttendTile(128, 64, 8, 3, 64, 1),
    (10, 128): AttendTile(128, 64, 8, 3, 32, 1),
    (10, 256): AttendTile(64, 32, 8, 2, 16, 1),
}
"""Tiles for fp16 and bf16 where a number is added to every score: slopes, a bias. Sized not to spill."""

LATENT_TILES = {
    8: AttendTile(128, 32, 8, 2, 16, 1),
    9: AttendTile(128, 64, 8, 2, 32, 2),
    10: AttendTile(128, 64, 8, 2, 32, 1),
}
"""For fp16 and bf16 with 192 dimensions of queries and keys and 128 of values, as latent attention has them."""


def attend_tile(
    dtype: torch.dtype, head_dim: int, capability: Capability, *, v_head_dim: int | None = None, terms: int = 0
) -> AttendTile:
    """The tile for a dtype and head size on a CUDA target; 10 stands for what is newer.

    ``v_head_dim``: that of the values where it differs. ``terms``: 0, 1 for a soft cap, a mask tensor or sinks, 2 for
    slopes or a bias, 3 for a bias and a mask tensor.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    largest = max(head_dim, v_head_dim)
    size = next(n for n in (64, 128, 256, 576) if largest <= n)
    major = min(capability[0], 10)
    if dtype == torch.float32:
        return _float_tile(largest, size, major, terms)
    if size == 576:
        return AttendTile(32, 32, 8, 2 if major == 8 else 1, 16, 1, dim_step=512)
    if v_head_dim <= 128 < head_dim <= 192:
        if major == 9 and terms == 3:
            return AttendTile(128, 64, 8, 2, 16, 1)
        return AttendTile(64, 32, 8, 2, 16, 1) if major == 8 and terms else LATENT_TILES[major]
    if major == 8 and 64 < largest < 128:  # the masks of padded dimensions take registers
        return AttendTile(64, 32, 8, 2, 16, 2 - min(terms, 1))
    if (major, size, terms) == (8, 128, 3):  # two addresses for every pair
        return AttendTile(64, 32, 8, 3, 16, 1)
    return TERM_TILES[major, size] if terms > (0 if 64 < largest < 128 else 1) else HALF_TILES[major, size]


def _float_tile(head_dim: int, size: int, major: int, terms: int) -> AttendTile:
    """The tile for float32: as ``attend_tile``."""
    if size == 576:
        # ieee adds 576 products one after another, which errs most: 2.4 times dense attention's error, tf32x3 0.9.
        precision = "ieee" if major == 10 else "tf32x3"  # which would not fit the registers there
        return AttendTile(16, 16, 8, 1, 16, 1, dim_step=32 if terms else 64, precision=precision)
    if not terms and 128 < head_dim <= 192:
        return AttendTile(32, 32, 8, 2, 16, 1, dim_step=32, precision="ieee")
    if 64 < head_dim < 128:
        return AttendTile(32, 16 if terms else 32, 8, 2, 16, 1, dim_step=32, precision="ieee")
    if terms and (major, size) == (9, 128):
        return AttendTile(32, 32, 8, 2, 16, 1, dim_step=32)
    if terms and size == 256:
        return AttendTile(16, 16, 8, 1, 16, 1, dim_step=32, precision="ieee" if major == 10 else "tf32x3")
    return FLOAT_TILES[major, size]


HALF_COLUMN_TILES = {
    (8, 64): AttendTile(128, 64, 8, 2, 32, 1),
    (8, 128): AttendTile(128, 32, 8, 2, 16, 1),
    (8, 256): AttendTile(32, 32, 8, 2, 16, 1),
    (9, 64): AttendTile(128, 128, 8, 3, 32, 1),
    (9, 128): AttendTile(128, 64, 8, 3, 32, 1),
    (9, 256): AttendTile(64, 32, 8, 2, 16, 1),
    (10, 64): AttendTile(128, 64, 8, 3, 32, 1),
    (10, 128): AttendTile(128, 64, 8, 3, 32, 1),
    (10, 256): AttendTile(64, 32, 8, 2, 16, 1),
}
"""Tiles of the attention over gathered columns, fp16 and bf16: sized not to spill."""

FLOAT_COLUMN_TILES = {
    64: AttendTile(32, 32, 8, 2, 16, 1, dim_step=32),
    128: AttendTile(32, 32, 8, 2, 16, 1, dim_step=32, precision="ieee"),
    256: AttendTile(16, 16, 8, 1, 16, 1, dim_step=16),
}


def column_tile(dtype: torch.dtype, head_dim: int, capability: Capability) -> AttendTile:
    """The tile of the attention over gathered columns, for the greater of both head sizes."""
    if head_dim > 256:
        return AttendTile(16, 16, 8, 1, 16, 1, dim_step=32, precision="ieee")
    size = next(n for n in (64, 128, 256) if head_dim <= n)
    if dtype == torch.float32:
        return FLOAT_COLUMN_TILES[size]
    return HALF_COLUMN_TILES[min(capability[0], 10), size]


@lru_cache
def _capability(index: int) -> Capability:
    return torch.cuda.get_device_capability(index)


def capability_of(device: torch.device) -> Capability:
    """Compute capability of a CUDA device; under the interpreter that of a Hopper GPU, so that its tiles are tested."""
    if device.type != "cuda":
        return (9, 0)
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def triton_missing() -> bool:
    """True when the package ``triton`` is not installed."""
    return find_spec("triton") is None


def why_not(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
    capability: Capability | None = None,
) -> str | None:
    """None when the CUDA kernels take these inputs, else a sentence for the user.

    ``capability`` is asked of the device unless given; pass it to ask about a GPU that is not here.
    """
    if triton_missing():
        return "Triton is not installed; install it with pip install 'sparsepass[triton]'."
    if device.type != CUDA.device_type and os.environ.get("TRITON_INTERPRET") != "1":
        return f"The Triton kernels run on cuda devices, not on {device.type}."
    if dtype not in CUDA.dtypes:
        known = ", ".join(str(x).removeprefix("torch.") for x in CUDA.dtypes)
        return f"dtype {str(dtype).removeprefix('torch.')} is not supported; supported: {known}."
    v_head_dim = min(head_dim, CUDA.v_head_dims[1]) if v_head_dim is None else v_head_dim
    sizes = (("head_dim", head_dim, CUDA.head_dims), ("v_head_dim", v_head_dim, CUDA.v_head_dims))
    for name, size, (low, high) in sizes:
        if not low <= size <= high:
            return f"{name} {size} is not supported; supported: {low} to {high}."
    capability = capability_of(device) if capability is None else capability
    if capability < CUDA.capabilities[0]:
        least = ".".join(map(str, CUDA.capabilities[0]))
        return f"This GPU has compute capability {capability[0]}.{capability[1]}; {least} or newer is needed."
    return None


def refuse_unsupported(name: str, q: Tensor, v_head_dim: int | None = None) -> None:
    """Raises KernelInputError with the reason when the CUDA kernels do not take ``q``."""
    reason = why_not(device=q.device, dtype=q.dtype, head_dim=q.shape[3], v_head_dim=v_head_dim)
    if reason is not None:
        raise KernelInputError(f"{name}: {reason}")
