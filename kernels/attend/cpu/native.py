"""Launchers of the C++ kernels ``kernels/attend/cpu/attend.cpp`` and ``kernels/select/cpu/select.cpp``: bring tensors
into the form they take."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu.visible import Visibility
from sparsepass.kernels.runtime.build import library
from sparsepass.kernels.scores import Scores, hidden_at_most

_SHAPE = ("batch", "heads", "kv_heads", "q_len", "kv_len", "dim")
_MASK = ("q_block", "kv_block", "left", "right", "offset")


def _fields(
    pointers: tuple[str, ...], sizes: tuple[str, ...], numbers: tuple[str, ...], last: str
) -> list[tuple[str, type[Any]]]:
    """Pointers, sizes, floating-point numbers and one size more: the order in both structs. All are 8 bytes wide."""
    return [
        *((name, ctypes.c_void_p) for name in pointers),
        *((name, ctypes.c_int64) for name in sizes),
        *((name, ctypes.c_double) for name in numbers),
        (last, ctypes.c_int64),
    ]


class _Call(ctypes.Structure):
    """The struct ``Call`` of ``kernels/attend/cpu/attend.cpp``."""

    _fields_ = _fields(
        (
            *("q", "k", "v", "out", "lse", "counts", "indices", "q_segments", "kv_segments"),
            *("mask", "bias", "slopes", "sinks", "blocks"),
        ),
        (
            *_SHAPE,
            "v_dim",
            *_MASK,
            *(f"{tensor}_{dim}" for tensor in "qkvo" for dim in "bhs"),
            *("counts_b", "counts_h", "indices_b", "indices_h", "indices_i"),
            *(f"{tensor}_{dim}" for tensor in ("mask", "bias") for dim in "bhqk"),
            *("slopes_b", "blocks_b", "blocks_h", "bias_bf16"),
        ),
        ("scale", "softcap", "hidden", "skip"),
        "bf16",
    )


class _Selection(ctypes.Structure):
    """The struct ``Selection`` of ``kernels/select/cpu/select.cpp``."""

    _fields_ = _fields(
        ("q", "k", "q_segments", "kv_segments", "allowed", "budgets", "counts", "indices", "visible"),
        (
            *_SHAPE,
            *_MASK,
            *("width", "rows_in_full"),
            *(f"{tensor}_{dim}" for tensor in "qk" for dim in "bhs"),
            *("allowed_b", "allowed_h"),
        ),
        ("scale",),
        "type",
    )


@lru_cache(maxsize=1)
def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 in its tile unit; elsewhere bf16 inputs are computed in fp32."""
    built = library()
    return built is not None and bool(built.sparsepass_has_bf16())


def available(dtype: torch.dtype) -> bool:
    """Whether the C++ kernels can be used for inputs of ``dtype``."""
    built = library()
    if built is None or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    sizes = (built.sparsepass_call_size(), built.sparsepass_selection_size())
    if sizes != (ctypes.sizeof(_Call), ctypes.sizeof(_Selection)):
        raise RuntimeError("structs in the C++ sources and in cpu_native.py differ; this is a bug in sparsepass")
    return True


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` with contiguous head dimensions; a copy only where needed."""
    x = x.to(dtype)
    # BLAS wants the step between tokens to be at least the head size.
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


def _entries(x: Tensor) -> Tensor:
    """int32 lists or segments with a contiguous last dimension; a copy only where needed."""
    x = x.to(torch.int32)
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _segments(mask: Visibility) -> list[Tensor | None]:
    return [None if x is None else _entries(x).contiguous() for x in (mask.q_segments, mask.kv_segments)]


def _describe(
    call: _Call | _Selection, q: torch.Size, k: torch.Size, mask: Visibility, tensors: dict[str, Tensor]
) -> None:
    """Fill in what both structs have: shapes, the mask, and each tensor's address and strides."""
    for name, value in zip(_SHAPE, (q[0], q[1], k[1], q[2], k[2], q[3]), strict=True):
        setattr(call, name, value)
    for name in _MASK:
        setattr(call, name, getattr(mask, name))
    for name, x in tensors.items():
        setattr(call, name, x.data_ptr())
        for at, letter in enumerate("bhs"):
            setattr(call, f"{name[0]}_{letter}", x.stride(at))


def _run(name: str, call: _Call | _Selection) -> int:
    """Call the library; 0 is success, 1 a block out of range."""
    built = library()
    if built is None:
        raise RuntimeError("the C++ kernels are not available here; this is a bug in sparsepass")
    status: int = getattr(built, name)(ctypes.byref(call))
    if status not in (0, 1):
        raise RuntimeError(f"{name} failed, most likely for want of memory")
    return status


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    indices: Tensor,
    mask: Visibility,
    scale: float,
    want_lse: bool,
    scores: Scores,
    blocks: Tensor | None,
    skip: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Out like ``q`` and the log-sum-exp; ``counts`` [B, H, q_blocks], ``indices`` [B, H, q_blocks, cap] expanded.

    ``blocks``: the map int8 [B or 1, H or 1, q_blocks, kv_blocks] of what mask and bias hide, where there are any.

    Raises:
        IndexError: a listed block is outside the keys.
    """
    batch, heads, q_len, dim = q.shape
    v_dim = v.shape[3]
    # bf16 products take keys in pairs along the head, and values in pairs along the tokens.
    paired = dim % 2 == 0 and mask.kv_block % 2 == 0
    bf16 = q.dtype == torch.bfloat16 and paired and has_bf16_products()
    work = torch.bfloat16 if bf16 else torch.float32
    out = q.new_empty((batch, q_len, heads, v_dim), dtype=work).transpose(1, 2)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32) if want_lse else None
    tensors = {"q": _rows(q, work), "k": _rows(k, work), "v": _rows(v, work)}
    counts, indices = _entries(counts), _entries(indices)
    segments = _segments(mask)

    call = _Call(scale=scale, bf16=bf16, v_dim=v_dim, skip=math.log(skip) if skip > 0 else -math.inf)
    _describe(call, q.shape, k.shape, mask, {**tensors, "out": out})
    call.counts, call.counts_b, call.counts_h = counts.data_ptr(), counts.stride(0), counts.stride(1)
    call.indices, call.indices_b, call.indices_h = indices.data_ptr(), indices.stride(0), indices.stride(1)
    call.indices_i = indices.stride(2)
    call.lse = _address(lse)
    call.q_segments, call.kv_segments = map(_address, segments)
    kept = _set_scores(call, scores, blocks, (batch, heads, q_len, k.shape[2]))

    status = _run("sparsepass_attend", call)
    del kept
    if status == 1:
        raise IndexError(f"kv_indices names a block outside 0..{mask.kv_blocks - 1}; build the lists for these lengths")
    return out.to(q.dtype), lse


def _set_scores(
    call: _Call, scores: Scores, blocks: Tensor | None, shape: tuple[int, int, int, int]
) -> list[Tensor | None]:
    """Fill in what happens to the scores; returns the tensors that must live as long as the call."""
    bias = scores.bias
    if bias is not None:
        call.hidden = hidden_at_most(bias.dtype)
        if bias.dtype not in (torch.float32, torch.bfloat16):
            bias = bias.to(torch.float32)
        call.bias_bf16 = bias.dtype == torch.bfloat16
    for name, x in (("mask", scores.mask), ("bias", bias)):
        setattr(call, name, _address(x))
        if x is not None:
            for letter, stride in zip("bhqk", x.expand(shape).stride(), strict=True):
                setattr(call, f"{name}_{letter}", stride)
    slopes = None if scores.slopes is None else scores.slopes.contiguous()
    sinks = None if scores.sinks is None else scores.sinks.contiguous()
    if blocks is not None:
        blocks = blocks.contiguous()
        call.blocks_b, call.blocks_h = blocks.expand(*shape[:2], -1, -1).stride()[:2]
    call.slopes, call.sinks, call.blocks = _address(slopes), _address(sinks), _address(blocks)
    call.slopes_b = shape[1] if slopes is not None and slopes.shape[0] > 1 else 0
    call.softcap = scores.softcap or 0.0
    return [bias, slopes, sinks, blocks]


def select(
    q: Tensor, k: Tensor, mask: Visibility, scale: float, allowed: Tensor | None, budgets: Tensor, width: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Block lists, and the count of allowed blocks int64 [B, H, q_blocks].

    ``allowed`` is bool [B or 1, H or 1, q_blocks, kv_blocks], None where the band alone decides; ``budgets``
    int32 [B, H]; ``last``: rows at the end that keep every allowed block.
    """
    batch, heads = q.shape[:2]
    counts = torch.empty((batch, heads, mask.q_blocks), dtype=torch.int32)
    indices = torch.empty((batch, heads, mask.q_blocks, width), dtype=torch.int32)
    visible = torch.empty((batch, heads, mask.q_blocks), dtype=torch.int64)
    tensors = {"q": _rows(q, q.dtype), "k": _rows(k, q.dtype)}
    segments = _segments(mask)
    allowed, budgets = None if allowed is None else allowed.contiguous(), budgets.contiguous()

    call = _Selection(scale=scale, width=width, rows_in_full=last)
    call.type = (torch.float32, torch.bfloat16, torch.float16).index(q.dtype)
    _describe(call, q.shape, k.shape, mask, tensors)
    call.kv_segments = _address(segments[1])
    call.q_segments = None if segments[1] is None else _address(segments[0])
    if allowed is not None:
        call.allowed_b, call.allowed_h = allowed.expand(batch, heads, -1, -1).stride()[:2]
    call.allowed, call.budgets = _address(allowed), budgets.data_ptr()
    call.counts, call.indices, call.visible = counts.data_ptr(), indices.data_ptr(), visible.data_ptr()
    _run("sparsepass_select", call)
    return counts, indices, visible
