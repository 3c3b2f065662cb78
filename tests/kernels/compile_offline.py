"""Compiles launches for GPUs that are not here, and reads what the compiler says about them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from sparsepass.kernels.attend.hopper.launch import LOAD_REGISTERS, HopperTile
from sparsepass.kernels.attend.triton.block_map import block_map_launch
from sparsepass.kernels.attend.triton.launch import attend_launches
from sparsepass.kernels.runtime.launch import Launch
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.select.rule import Rule
from sparsepass.kernels.select.triton.scored import scored_launches
from sparsepass.kernels.select.triton.topk import select_launches
from sparsepass.kernels.spec import CUDA, Capability

knobs.compilation.disable_line_info = True  # a quarter of the time, and no instruction of the kernel

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
"""Every size on every target, with and without what is optional; else a few of them, with all of it."""

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
}


def problems(
    sizes: Sequence[int], *, tested: Sequence[tuple[torch.dtype, int]]
) -> list[tuple[Capability, torch.dtype, int, bool]]:
    """(target, dtype, head size, with segments) to compile for, beyond those ``tested`` on every target.

    DEEP has all. Else a size is compiled for one target, in turn, and the largest in bf16 for all of them: no other on
    the matrix units needs as many registers and as much shared memory.
    """
    targets = CUDA.capabilities
    every = [(dtype, size) for dtype in (torch.bfloat16, torch.float32) for size in sizes]
    if DEEP:
        return [(target, *one, segments) for one in every for segments in (False, True) for target in targets]
    rest = [one for one in every if one not in tested]
    largest = (torch.bfloat16, max(sizes))
    turns = [(targets[turn % len(targets)], *one, True) for turn, one in enumerate(rest)]
    return turns + [(target, *largest, True) for target in targets if (target, *largest, True) not in turns]


def compile_launch(launch: Launch, capability: Capability) -> Any:
    """The compiled kernel of a launch, its arguments specialized as Triton's JIT does: ones, and multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one or value is None:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            wide = isinstance(value, int) and abs(value) >= 2**31
            signature[name] = "fp32" if isinstance(value, float) else "i64" if wide else "i32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton_compile(source, target=target, options=launch.options)


def compile_hopper(tile: HopperTile, dtype: torch.dtype, *, segments: bool, kv_block: int = 128) -> Any:
    """The Gluon kernel for sm_90, with or without all that is optional."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from sparsepass.kernels.attend.hopper.kernel import attend_hopper

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    fixed = {
        "GROUP": 4,
        "PER_ROW": 1,
        "PER_BLOCK": kv_block // tile.keys,
        "KEYS": tile.keys,
        "DIM": tile.dim,
        "SLOTS": tile.slots,
        "Q_SLOTS": tile.q_slots,
        "HAS_SEGMENTS": segments,
        "HAS_Q_SEGMENTS": segments,
        "RETURN_LSE": segments,
        "COMPUTE_REGISTERS": tile.registers,
        "LOAD_REGISTERS": LOAD_REGISTERS,
    }
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(attend_hopper.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", fixed[name]
        elif name.endswith("_desc"):
            rows = tile.keys if name[0] in "kv" else 64
            signature[name] = f"tensordesc<{TYPES[dtype]}[1, 1, {rows}, {tile.dim}],{layout!r}>"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name == "lse_ptr" else "*i32"
        else:
            signature[name] = "fp32" if name == "log2_scale" else "i32"
    source = GluonASTSource(attend_hopper, signature, constants, {})
    options = {"num_warps": 4} | ({"maxnreg": tile.entry_registers} if tile.entry_registers else {})
    return triton_compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """REG (registers a thread), STACK and LOCAL (spilled bytes a thread), SHARED (bytes a program), off the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {**found, "SHARED": compiled.metadata.shared}


def launches_for(
    dtype: torch.dtype,
    head_dim: int,
    *,
    segments: bool,
    kv_len: int = 8192,
    per_head: bool = False,
    skip: float = 0.0,
    **tile: Any,
) -> list[Launch]:
    """Every launch of a selection and an attention: 32 query heads, 8 KV heads, blocks of 128, on a fake GPU."""
    with FakeTensorMode():

        def tokens(heads: int) -> torch.Tensor:
            return torch.empty(2, kv_len, heads, head_dim, dtype=dtype, device="cuda:0").transpose(1, 2)

        q, k, v = tokens(32), tokens(8), tokens(8)
        segment = torch.empty(2, kv_len, dtype=torch.int32, device="cuda:0") if segments else None
        shared: dict[str, Any] = {
            "scale": 0.1,
            "left": -1,
            "right": 0,
            "offset": 0,
            "q_segments": segment,
            "kv_segments": segment,
            "q_block": 128,
            "kv_block": 128,
            "counter": torch.empty(3, dtype=torch.int64, device="cuda:0"),
        }
        density = torch.empty(2, 32, device="cuda:0") if per_head else 0.1
        select, count, lists = select_launches(q, k, density=density, max_density=0.1, **shared)
        attend, _, _ = attend_launches(
            q, k, v, count, lists, return_lse=True, implementation="triton", skip=skip, **shared, **tile
        )
    return select + attend


def term_launches_for(
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int,
    terms: Sequence[str],
    *,
    segments: bool = False,
    kv_len: int = 8192,
    **tile: Any,
) -> list[Launch]:
    """The launches of an attention whose scores are changed, and of the block map: 32 query heads, 8 KV heads."""
    with FakeTensorMode():

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=kind, device="cuda:0")

        def tokens(heads: int, size: int) -> torch.Tensor:
            return empty(2, kv_len, heads, size).transpose(1, 2)

        scores = Scores(
            30.0 if "softcap" in terms else None,
            empty(1, 32, kind=torch.float32) if "slopes" in terms else None,
            empty(1, 32, kv_len, kv_len) if "bias" in terms else None,
            empty(2, 1, kv_len, kv_len, kind=torch.int8) if "mask" in terms else None,
            empty(32, kind=torch.float32) if "sinks" in terms else None,
        )
        segment = empty(2, kv_len, kind=torch.int32) if segments else None
        rows = kv_len // 128
        shared: dict[str, Any] = {"left": -1, "right": 0, "offset": 0, "q_segments": segment, "kv_segments": segment}
        launches: list[Launch] = []
        blocks = None
        if scores.hides:
            sizes: dict[str, Any] = {"batch": 2, "q_len": kv_len, "kv_len": kv_len, "q_block": 128, "kv_block": 128}
            launch, blocks = block_map_launch(scores, **shared, **sizes)
            launches.append(launch)
        attend, _, _ = attend_launches(
            tokens(32, head_dim), tokens(8, head_dim), tokens(8, v_head_dim),
            empty(2, 32, rows, kind=torch.int32), empty(2, 32, rows, 10, kind=torch.int32),
            **shared, scale=0.1, q_block=128, kv_block=128, return_lse=True, implementation="triton",
            counter=empty(3, kind=torch.int64), scores=scores, blocks=blocks, **tile,
        )  # fmt: skip
    return launches + attend


RULES = (
    Rule("threshold", 0.1, "mass", sink=2, window=4, last=2, self_similarity=0.2),
    Rule("coverage", 0.9, "antidiagonal"),
    Rule("coverage", 0.9, "pooled", self_similarity=0.2),
    Rule("window", 4096.0),
)


def scored_launches_for(
    dtype: torch.dtype, head_dim: int, *, segments: bool, kv_len: int = 8192, per_head: bool = False
) -> list[Launch]:
    """The launches of every score and every rule, each kernel once per rule, for the same problem."""
    found: dict[tuple[str, Any], Launch] = {}
    with FakeTensorMode():

        def tokens(heads: int) -> torch.Tensor:
            return torch.empty(2, kv_len, heads, head_dim, dtype=dtype, device="cuda:0").transpose(1, 2)

        segment = torch.empty(2, kv_len, dtype=torch.int32, device="cuda:0") if segments else None
        for rule in RULES:
            launches, _, _ = scored_launches(
                tokens(32), tokens(8), scale=0.1, left=-1, right=0, offset=0, q_segments=segment, kv_segments=segment,
                q_block=128, kv_block=128, rule=rule, dial=torch.empty(2, 32, device="cuda:0") if per_head else None,
                counter=torch.empty(3, dtype=torch.int64, device="cuda:0"),
            )  # fmt: skip
            for launch in launches:
                found.setdefault((launch.kernel.__name__, launch.arguments.get("KEEP")), launch)
    return list(found.values())
