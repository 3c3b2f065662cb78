"""What the CUDA launchers share: argument checks, and a launch as data that can be run, or compiled without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.arguments import MAX_TOKENS
from sparsepass.kernels.blocks import ceil_div

MAX_GRID = (1 << 16) - 1
"""CUDA's limit of a grid's second and third size; of the first it is 2**31 - 1."""

NO_LIMIT = 1 << 30
"""An unbounded side of a band, small enough that position plus limit stays inside int32."""

VARYING = (
    *("q_len", "kv_len", "length", "rows", "tiles", "blocks", "kv_blocks", "width", "groups", "programs"),
    *("left", "right", "offset", "budget", "most", "dense_from", "heads", "kv_heads", "group", "times", "planes"),
    *("q_planes", "kv_planes", "stride_b", "segment_stride_b", "q_segments_stride_b", "kv_segments_stride_b"),
    *("count_stride_b", "count_stride_h", "list_stride_b", "list_stride_h", "list_stride_r", "span_stride_b"),
    *(
        "span_stride_h",
        "allowed_stride_b",
        "allowed_stride_h",
        "blocks_stride_b",
        "blocks_stride_h",
        "budget_stride_b",
        "density_stride_b",
        "out_stride_h",
        "out_stride_r",
        "out_stride_d",
    ),
)
"""Kernel arguments, by name, that Triton must not compile variants for: they change from one request to the next."""


class Launch(NamedTuple):
    """One kernel launch: ``kernel[grid](**arguments, **options)``. Tests compile it for targets they do not have."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> Any:
        """Launches, compiling first if need be; returns the compiled kernel (None under the interpreter)."""
        if max(self.grid[1:], default=0) > MAX_GRID:
            raise KernelInputError(
                f"{self.kernel.__name__} would run on a grid of {self.grid}; CUDA takes up to {MAX_GRID} in the second "
                "and third size, which are blocks of queries, heads or the batch. Split the batch."
            )
        return self.kernel[self.grid](**self.arguments, **self.options)


def run_all(launches: list[Launch], device: torch.device) -> None:
    """Runs the launches in order on the device's current stream, without synchronizing."""
    if device.type != "cuda":  # the interpreter
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):
        for launch in launches:
            launch.run()


def side(limit: int) -> int:
    """``left`` or ``right`` as the kernels take it."""
    return NO_LIMIT if limit < 0 else min(limit, NO_LIMIT)


def empty_block_ranges(segments: Tensor, block: int) -> Tensor:
    """Room for the least and greatest segment of each block: int32 [2, B, blocks]."""
    batch, length = segments.shape
    return torch.empty(2, batch, ceil_div(length, block), dtype=torch.int32, device=segments.device)


def allowed_arguments(allowed: Tensor | None, unused: Tensor) -> dict[str, Any]:
    """What a kernel that lists blocks is told of the map of those it may list: int8 [B or 1, H or 1, nq, nkv], or None.

    The map's rows are contiguous. ``unused``: a pointer for what is not there; never read.
    """
    return {
        "allowed_ptr": unused if allowed is None else allowed,
        "allowed_stride_b": 0 if allowed is None or allowed.shape[0] == 1 else allowed.stride(0),
        "allowed_stride_h": 0 if allowed is None or allowed.shape[1] == 1 else allowed.stride(1),
        "HAS_ALLOWED": allowed is not None,
    }


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raises KernelInputError with the message, which is built only then."""
    if not condition:
        raise KernelInputError(message())


def check_shapes(q: Tensor, k: Tensor, v: Tensor | None, offset: int, q_block: int, kv_block: int) -> None:
    """Raises KernelInputError unless q [B, H, Sq, D], k [B, Hkv, Skv, D] and v [B, Hkv, Skv, Dv] go together."""
    named = [("q", q), ("k", k)] + ([("v", v)] if v is not None else [])
    for name, x in named:
        require(x.dim() == 4, lambda: f"{name} has shape {tuple(x.shape)}; expected [batch, heads, length, head_dim].")  # noqa: B023
        require(
            x.dtype == q.dtype and x.device == q.device,
            lambda: f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; convert them to one.",  # noqa: B023
        )
        require(x.numel() > 0, lambda: f"{name} has shape {tuple(x.shape)}; no dimension may be 0.")  # noqa: B023
        if x is not q:
            require(
                x.shape[0] == q.shape[0] and q.shape[1] % x.shape[1] == 0 and x.shape[1:3] == k.shape[1:3],
                lambda: (
                    f"{name} has shape {tuple(x.shape)} beside q {tuple(q.shape)} and k {tuple(k.shape)}; expected the "  # noqa: B023
                    "same batch, and KV heads that divide the query heads."
                ),
            )
    require(k.shape[3] == q.shape[3], lambda: f"q has head_dim {q.shape[3]}, k has {k.shape[3]}; they must be equal.")
    tokens = max(q.shape[2], k.shape[2]) + abs(offset)
    require(tokens < MAX_TOKENS, lambda: f"length plus offset is {tokens}; the kernels address up to {MAX_TOKENS}.")
    for name, block in (("q_block", q_block), ("kv_block", kv_block)):
        require(
            block >= 16 and block & (block - 1) == 0,
            lambda: f"{name} is {block}; expected a power of two of at least 16.",  # noqa: B023
        )
