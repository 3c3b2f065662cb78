"""Launches ``kernels/attend/hopper/kernel.py``, and says where it cannot be."""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsepass.kernels.attend.hopper.sass import disassembled, unset_descriptor
from sparsepass.kernels.runtime.launch import Launch
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.spec import capability_of

LOG2E = 1.4426950408889634
ROWS = 128
"""Query rows per tile: two warpgroups of 64."""

log = logging.getLogger("sparsepass")


class HopperTile(NamedTuple):
    """Head size as computed (smaller ones are filled up with zeros), keys per step, slots of the ring, of queries.

    ``residents``: programs that share one multiprocessor. ``registers``: those of a computing thread;
    ``entry_registers``: of every thread when the program starts, 0 for as many as there are.
    """

    dim: int
    keys: int
    slots: int
    q_slots: int
    residents: int = 1
    registers: int = 240
    entry_registers: int = 0


TILES = (
    HopperTile(64, 128, 4, 2),
    HopperTile(64, 64, 4, 2, residents=2, registers=112, entry_registers=80),
    HopperTile(128, 128, 2, 2),
    HopperTile(128, 64, 4, 2),
    HopperTile(256, 64, 2, 1),
)
"""Sized to the 227 KB of shared memory that the programs on one multiprocessor have. Of a head size the first counts
whose keys per step divide the block."""

LOAD_REGISTERS = 24
CARRIED = [5, 5, 7]
"""Values that the loops over tiles carry: of the two computing warpgroups, and of the loading warp."""

LOADS = 7
"""Reads of the loading warp: a list's head, twice, and its further entries."""


@lru_cache
def missing() -> str | None:
    """None where this Triton has all that the kernel uses, else what is missing."""
    try:
        from sparsepass.kernels.attend.hopper import kernel as hopper_gluon  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"this Triton lacks a part of Gluon ({error})"
    return None


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    q_block: int,
    kv_block: int,
    scores: Scores | None = None,
    skip: float = 0.0,
) -> str | None:
    """None where the kernel takes these inputs, else a sentence."""
    if scores is not None and scores.given:
        return "It changes no scores: no soft cap, slopes, bias, mask tensor or sinks."
    if skip > 0:
        return "It skips no listed block."
    if q.device.type != "cuda" or capability_of(q.device)[0] != 9:
        return "It runs on Hopper GPUs (compute capability 9.0) alone."
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"It takes fp16 and bf16, not {str(q.dtype).removeprefix('torch.')}."
    if not scale > 0:
        return f"It takes a scale above 0, not {scale}."
    if q_block % ROWS:
        return f"It takes query blocks of {ROWS} tokens or a multiple, not of {q_block}."
    low, high = sorted((q.shape[3], v.shape[3]))
    if high > TILES[-1].dim or tile_for(low, 128) != tile_for(high, 128):
        return f"It takes head sizes up to {TILES[-1].dim}, not {q.shape[3]} with values of {v.shape[3]}."
    if tile_for(high, kv_block) is None:
        return f"It takes key blocks of {min(tile.keys for tile in TILES)} tokens or a multiple, not of {kv_block}."
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _copyable(x):
            return f"The copy engine needs rows aligned to 16 bytes; {name} has strides {x.stride()}."
    if (lacking := missing()) is not None:
        return f"It cannot be built: {lacking}."
    return None


def _copyable(x: Tensor) -> bool:
    """Whether the copy engine can read or write x of two bytes an element."""
    outer = zip(x.stride()[:3], x.shape[:3], strict=True)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and not any(n > 1 and (s % 8 or s <= 0) for s, n in outer)


def tile_for(head_dim: int, kv_block: int) -> HopperTile | None:
    """The tile for a head size (the greater of D and Dv) and blocks of ``kv_block`` keys; None where none fits."""
    dim = next((tile.dim for tile in TILES if head_dim <= tile.dim), None)
    return next((tile for tile in TILES if tile.dim == dim and kv_block % tile.keys == 0), None)


def descriptor(x: Tensor, rows: int, dim: int) -> Any:
    """What the copy engine needs to know of x [B, H, S, D] to copy ``rows`` tokens of one head."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    strides = [stride if size > 1 else 8 for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, dim], layout)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    parted: Tensor,
    spans: Tensor,
    redo: Tensor,
    ticket: Tensor,
    common: dict[str, Any],
    *,
    scale: float,
    q_block: int,
    kv_block: int,
    tile: HopperTile | None = None,
    scores: Scores | None = None,
    skip: float = 0.0,
) -> Launch | str:
    """The launch over ordered lists (``partition_launches``), or why there can be none. ``tile`` overrides ``TILES``.

    ``redo`` int32, one per tile of 128 rows, is set to 1 where a value came out NaN or infinite: a hidden inf or NaN
    may have spoilt it. ``ticket`` int32 [1] is 0 when the kernel starts. ``common``: the arguments shared with the
    kernels of ``kernels/attend/triton/kernel.py``.
    """
    reason = why_not(q, k, v, scale=scale, q_block=q_block, kv_block=kv_block, scores=scores, skip=skip)
    if reason is None and not _copyable(out):
        reason = f"The copy engine needs rows aligned to 16 bytes; the output has head size {out.shape[3]}."
    if reason is not None:
        return reason
    from sparsepass.kernels.attend.hopper.kernel import attend_hopper

    tile = tile_for(q.shape[3], kv_block) if tile is None else tile
    assert tile is not None  # ``why_not`` has seen to it
    programs = redo.shape[0]
    grid = min(programs, tile.residents * multiprocessors(q.device))
    names = (
        *("spans_ptr", "parted_ptr", "q_segments_ptr", "kv_segments_ptr", "q_segments_stride_b", "q_segments_stride_s"),
        *("kv_segments_stride_b", "kv_segments_stride_s", "span_stride_b", "span_stride_h", "q_len", "kv_len", "left"),
        *("right", "offset", "tiles", "width", "kv_heads", "HAS_SEGMENTS", "HAS_Q_SEGMENTS"),
    )
    arguments = {
        "q_desc": descriptor(q, 64, tile.dim),
        "k_desc": descriptor(k, tile.keys, tile.dim),
        "v_desc": descriptor(v, tile.keys, tile.dim),
        "o_desc": descriptor(out, 64, tile.dim),
        **{name: common[name] for name in names},
        "lse_ptr": spans if lse is None else lse,
        "redo_ptr": redo,
        "ticket_ptr": ticket,
        "log2_scale": scale * LOG2E,
        "programs": programs,
        "GROUP": common["group"],
        "PER_ROW": q_block // ROWS,
        "PER_BLOCK": kv_block // tile.keys,
        "KEYS": tile.keys,
        "DIM": tile.dim,
        "SLOTS": tile.slots,
        "Q_SLOTS": tile.q_slots,
        "RETURN_LSE": lse is not None,
        "COMPUTE_REGISTERS": tile.registers,
        "LOAD_REGISTERS": LOAD_REGISTERS,
    }
    options = {"num_warps": 4} | ({"maxnreg": tile.entry_registers} if tile.entry_registers else {})
    found = Launch(attend_hopper, (grid,), arguments, options)
    variant = (
        str(q.dtype),
        tile,
        arguments["PER_BLOCK"],
        *(v for v in arguments.values() if isinstance(v, bool)),
        arguments["GROUP"],
    )
    if variant not in _compiled:
        _compiled[variant] = _compile(found)
    return _compiled[variant] or found


_compiled: dict[Hashable, str | None] = {}
"""What went wrong when a variant of the kernel was compiled; None: nothing."""


def _compile(launch: Launch) -> str | None:
    try:
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
        reason = unsound(compiled.asm["ttgir"]) or misread(compiled.asm["cubin"])
    except Exception as error:  # a Triton that this was never tried with may fail in any way
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    if reason is not None:
        log.warning("The Hopper kernel is not used, plain Triton is: %s", reason)
        return f"It does not compile here: {reason}"
    return None


def misread(cubin: bytes) -> str | None:
    """None if no product of matrices reads from a place that was not set, as far as the machine code can be had."""
    code = disassembled(cubin)
    return None if code is None else unset_descriptor(code)


def unsound(ttgir: str) -> str | None:
    """None if the compiler kept every value that the kernel's loops over tiles carry, else what it dropped.

    Triton 3.6 was seen to merge carried values that only look alike. The kernel would then wait for ever.
    """
    carried = sorted(len(found.split(",")) for found in re.findall(r"scf\.while \(([^)]*)\)", ttgir))
    if carried != CARRIED:
        return f"its loops carry {carried} values, not {CARRIED}"
    loads = len(re.findall(r"= tt\.load ", re.split(r"partition1", ttgir)[-1]))
    if loads != LOADS:
        return f"its loading warp reads {loads} numbers, not {LOADS}"
    return None
