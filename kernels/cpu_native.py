"""Launcher of the C++ kernel ``attend_cpu.cpp``: brings the tensors into a form that it takes, and calls it."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from sparsepass.kernels.cpu_build import library
from sparsepass.kernels.cpu_mask import Visibility

_POINTERS = ("q", "k", "v", "out", "lse", "counts", "indices", "q_segments", "kv_segments")
_SIZES = (
    *("batch", "heads", "kv_heads", "q_len", "kv_len", "dim", "v_dim"),
    *("q_block", "kv_block", "left", "right", "offset"),
    *(f"{tensor}_{dim}" for tensor in "qkvo" for dim in "bhs"),
    *("counts_b", "counts_h", "indices_b", "indices_h", "indices_i"),
)


class _Call(ctypes.Structure):
    """The struct ``Call`` of ``attend_cpu.cpp``, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
        ("bf16", ctypes.c_int64),
    ]


@lru_cache(maxsize=1)
def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 in its tile unit; elsewhere bf16 inputs are computed in fp32."""
    built = library()
    return built is not None and bool(built.sparsepass_has_bf16())


def available(dtype: torch.dtype) -> bool:
    """Whether the C++ kernel can be used for inputs of ``dtype``."""
    built = library()
    if built is None or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if built.sparsepass_call_size() != ctypes.sizeof(_Call):
        raise RuntimeError("struct Call in attend_cpu.cpp and cpu_native.py differ; this is a bug in sparsepass")
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


def attend(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, mask: Visibility, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Out like ``q`` and the log-sum-exp; ``counts`` [B, H, q_blocks], ``indices`` [B, H, q_blocks, cap] expanded.

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
    segments = [None if x is None else _entries(x).contiguous() for x in (mask.q_segments, mask.kv_segments)]

    call = _Call(scale=scale, bf16=bf16, batch=batch, heads=heads, kv_heads=k.shape[1], q_len=q_len)
    call.kv_len, call.dim, call.v_dim = k.shape[2], dim, v_dim
    call.q_block, call.kv_block = mask.q_block, mask.kv_block
    call.left, call.right, call.offset = mask.left, mask.right, mask.offset
    for name, x in (*tensors.items(), ("out", out)):
        setattr(call, name, x.data_ptr())
        for at, letter in enumerate("bhs"):
            setattr(call, f"{name[0]}_{letter}", x.stride(at))
    call.counts, call.counts_b, call.counts_h = counts.data_ptr(), counts.stride(0), counts.stride(1)
    call.indices, call.indices_b, call.indices_h = indices.data_ptr(), indices.stride(0), indices.stride(1)
    call.indices_i = indices.stride(2)
    call.lse = None if lse is None else lse.data_ptr()
    call.q_segments, call.kv_segments = (None if x is None else x.data_ptr() for x in segments)

    built = library()
    if built is None:
        raise RuntimeError("the C++ kernel is not available here; this is a bug in sparsepass")
    status = built.sparsepass_attend(ctypes.byref(call))
    if status == 1:
        raise IndexError(f"kv_indices names a block outside 0..{mask.kv_blocks - 1}; build the lists for these lengths")
    if status:
        raise RuntimeError("the C++ kernel failed, most likely for want of memory; this is a bug in sparsepass")
    return out.to(q.dtype), lse
