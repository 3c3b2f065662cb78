"""What comes with PyTorch: the dense kernels of ``scaled_dot_product_attention``, and FlexAttention on our lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsepass.errors import OptionError
from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench.problem import Problem

Call = Callable[[], Tensor]

CUDA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CPU_NAMES = ("sdpa", "sdpa_repeated")
"""Grouped queries handled by SDPA itself, and keys and values repeated beforehand (which is not timed)."""
FLEX = {"flex": "default", "flex_autotune": "max-autotune-no-cudagraphs"}
"""FlexAttention by name, and the mode it is compiled in."""


def dense_names(device: torch.device) -> tuple[str, ...]:
    """The dense kernels that may run on a device."""
    return tuple(CUDA_BACKENDS) if device.type == "cuda" else CPU_NAMES


def default_dense(problem: Problem) -> tuple[str, ...]:
    """The dense kernels to time unless others are named: on CUDA the general one only where the others do not run."""
    names = dense_names(problem.device)
    if problem.device.type != "cuda":
        return names
    half = problem.shape.torch_dtype != torch.float32
    return tuple(name for name in names if (name != "efficient") == half)


def dense_call(name: str, problem: Problem) -> Call:
    """One dense kernel on a problem. Raises ``OptionError`` if it does not take it."""
    if name not in CUDA_BACKENDS:
        if name == "sdpa_repeated":
            if problem.shape.heads == problem.shape.kv_heads:
                raise OptionError("there is nothing to repeat: each query head has its own key and value head")
            return partial(_sdpa, problem.query, *problem.repeated(), problem.shape.scale)
        return partial(_sdpa, problem.query, problem.key, problem.value, problem.shape.scale)
    backend = CUDA_BACKENDS[name]
    key, value = problem.key, problem.value
    if name == "efficient":
        key, value = problem.repeated()  # it has no grouped queries
    call = partial(forced_sdpa, backend, problem.query, key, value, problem.shape.scale)
    try:
        call()
    except RuntimeError as error:
        raise OptionError(str(error).splitlines()[0]) from error
    return call


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def forced_sdpa(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(query, key, value, scale)


def flex_call(name: str, problem: Problem, lists: BlockLists) -> Call:
    """Compiled FlexAttention with the same blocks. Compiles when first called, once per shape.

    The diagonal block of a row gets the causal mask, all others are whole: what FlexAttention is fastest at.
    Raises ``OptionError`` for lists it cannot take.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    if getattr(lists, "columns", None) is not None or lists.q_block != lists.kv_block:
        raise OptionError("it takes blocks alone, as long as they are wide")
    shape, block = problem.shape, lists.kv_block
    blocks = -(-shape.length // block)
    row = torch.arange(blocks, device=problem.device, dtype=torch.int32)
    width = lists.kv_indices.shape[3]
    used = torch.arange(width, device=problem.device) < lists.kv_num_blocks[..., None]
    diagonal = used & (lists.kv_indices == row[:, None])
    partial_count = diagonal.any(-1).to(torch.int32)
    full_count = lists.kv_num_blocks - partial_count
    # As wide for every density, so that one compiled kernel serves all; the diagonal is each row's last entry.
    full = F.pad(lists.kv_indices, (0, blocks - width))
    diagonals = torch.zeros_like(full)
    diagonals[..., 0] = row
    mask = BlockMask.from_kv_blocks(
        partial_count,
        diagonals,
        full_count,
        full,
        BLOCK_SIZE=block,
        mask_mod=_causal,
        seq_lengths=(shape.length, shape.length),
        compute_q_blocks=False,  # the backward pass's
    )
    grouped = shape.heads != shape.kv_heads
    compiled: Any = torch.compile(flex_attention, dynamic=False, mode=FLEX[name])
    return lambda: compiled(
        problem.query, problem.key, problem.value, block_mask=mask, scale=shape.scale, enable_gqa=grouped
    )


def _causal(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
    return q_index >= kv_index
