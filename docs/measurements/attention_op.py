"""The attention op on one CUDA device, by ``sparsepass bench`` and ``sparsepass tune``: kept for its commands.

    PYTHONPATH=. python docs/measurements/attention_op.py op --out op.json
    PYTHONPATH=. python docs/measurements/attention_op.py kernel --out kernel.json
    PYTHONPATH=. python docs/measurements/attention_op.py crossover --out tuning.json
    PYTHONPATH=. python docs/measurements/attention_op.py tiles --out tuning.json

``attention_op_h200.json``, ``attention_tiles_h200.json`` and ``crossover_h200.json`` were measured by its first form,
whose records differ: batch 1, 32 query heads, 8 KV heads, random inputs, blocks of 128, two rounds.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend

from sparsepass.bench.__main__ import main as bench
from sparsepass.bench.baselines import flex_call, forced_sdpa
from sparsepass.bench.machine import describe
from sparsepass.bench.problem import Problem, Shape
from sparsepass.kernels.dispatch import BlockLists
from sparsepass.tune.__main__ import main as tune

BLOCK = 128

COMMANDS = {
    "op": (bench, ["op", "--lengths", "8K", "32K", "128K", "--methods", "pooled_topk=0.05,0.1,0.2", "--graphs"]),
    "kernel": (bench, ["kernel", "--lengths", "8K", "32K", "128K", "--densities", "0.05", "0.1", "0.2", "1"]),
    "crossover": (tune, ["--only", "crossover"]),
    "tiles": (tune, ["--only", "tiles"]),
}


def problem(q: Tensor, k: Tensor, v: Tensor) -> Problem:
    """Tensors [B, H, S, D] as the package's measurements take them."""
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(q.dtype).removeprefix("torch.")]
    return Problem(Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], dtype), q, k, v)


def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    return forced_sdpa(backend, q, k, v, q.shape[3] ** -0.5)


def flex_run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, lists: Tensor) -> Any:
    return flex_call("flex", problem(q, k, v), BlockLists(count, lists, BLOCK, BLOCK))


def environment() -> dict[str, Any]:
    import torch

    return describe(torch.device("cuda", torch.cuda.current_device()))


def main() -> int:
    """Runs one of the commands with the options given beside its own."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        return 2
    run, defaults = COMMANDS[name]
    return run([*defaults, *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
