"""Every kernel, as its launcher would launch it, compiled for every target in its spec on a machine without a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from sparsepass.kernels import spec
from sparsepass.kernels.launch import Launch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
}


def compile_launch(launch: Launch, capability: spec.Capability) -> Any:
    """The compiled kernel of a launch, with Triton's specialization of its arguments: 1, and multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or is_one:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton_compile(source, target=target, options=launch.options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of a compiled kernel, as cuobjdump reads them off the cubin."""
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
    return {**found, "SHARED": compiled.metadata.shared}


def attend(dtype, head_dim, cap, seg=False, tile=None, lse=True, B=1, v_head_dim=None):
    spec._capability = lambda index: cap
    from sparsepass.kernels.attend_triton import attend_launches
    with FakeTensorMode():
        def t(h, s): return torch.empty(B, s, h, head_dim, dtype=dtype, device="cuda:0").transpose(1, 2)
        q, k, v = t(32, 8192), t(8, 8192), t(8, 8192)
        n = torch.empty(B, 32, 64, dtype=torch.int32, device="cuda:0"); i = torch.empty(B, 32, 64, 16, dtype=torch.int32, device="cuda:0")
        s = torch.empty(B, 8192, dtype=torch.int32, device="cuda:0") if seg else None
        c = torch.empty(3, dtype=torch.int64, device="cuda:0")
        return attend_launches(q, k, v, n, i, scale=.1, left=-1, right=0, offset=0, q_segments=s, kv_segments=s, q_block=128, kv_block=128, return_lse=lse, counter=c, tile=tile)[0]
