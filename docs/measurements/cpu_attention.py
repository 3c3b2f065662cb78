"""Block-sparse attention on the CPU, selection included, against PyTorch's dense attention.

    python docs/measurements/cpu_attention.py target      # writes cpu_attention.json
    python docs/measurements/cpu_attention.py crossover   # writes crossover_cpu.json

Batch 1, 8 query heads on 2 key/value heads, causal, inputs laid out [B, S, H, D] as models have them. Dense is the
faster of ``enable_gqa=True`` and keys and values repeated beforehand (the repeating is not timed). Dense and sparse
calls alternate in one process, so that a busy machine slows both; times are the least of the repetitions, the ratio of
``target`` is the median over the pairs. Beside it stand what else could run: blocks of 64 tokens, gathered blocks in
torch operations, and Inductor's FlexAttention template on the same lists (of attention alone: it selects nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu
from sparsepass.kernels.select.cpu.topk import select_blocks_cpu

FOLDER = Path(__file__).parent
HEADS, KV_HEADS, BLOCK = 8, 2, 128
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Problem:
    """Tensors of one length, type and head size, and the timed calls."""

    def __init__(self, length: int, head_dim: int, dtype: torch.dtype, block: int = BLOCK) -> None:
        torch.manual_seed(0)
        self.q, self.k, self.v = (
            torch.randn(1, length, heads, head_dim).to(dtype).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        self.repeated = [x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (self.k, self.v)]
        self.mask: dict[str, Any] = {
            "scale": head_dim**-0.5, "left": -1, "right": 0, "offset": 0, "q_segments": None, "kv_segments": None,
            "q_block": block, "kv_block": block,
        }  # fmt: skip

    def dense_gqa(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True)

    def dense_repeated(self) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.q, *self.repeated, is_causal=True)

    def select(self, density: float, counter: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return select_blocks_cpu(self.q, self.k, **self.mask, density=density, counter=counter)

    def sparse(self, density: float, counter: Tensor | None = None) -> Tensor:
        lists = self.select(density, counter)
        return block_sparse_attention_cpu(self.q, self.k, self.v, *lists, **self.mask, counter=counter)[0]

    def attend(self, lists: tuple[Tensor, Tensor]) -> Tensor:
        return block_sparse_attention_cpu(self.q, self.k, self.v, *lists, **self.mask)[0]

    def gathered(self, density: float) -> Tensor:
        """As ``sparse``, with attention by the torch operations that stand in where no compiler is found."""
        kept, cpu_native.available = cpu_native.available, lambda dtype: False
        try:
            return self.sparse(density)
        finally:
            cpu_native.available = kept

    def flex(self, lists: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        """Inductor's FlexAttention over the lists: the diagonal blocks, last in each row, apart from the whole ones."""
        count, indices = lists
        rows = count.shape[2]
        whole = torch.nn.functional.pad(indices, (0, rows - indices.shape[3]))
        diagonal = torch.zeros_like(whole)
        diagonal[..., 0] = torch.arange(rows, dtype=torch.int32)
        block_mask = BlockMask.from_kv_blocks(
            torch.ones_like(count), diagonal, count - 1, whole, BLOCK_SIZE=BLOCK, mask_mod=causal
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(self.q, self.k, self.v, block_mask=block_mask, enable_gqa=True)

    def error(self) -> tuple[float, float]:
        """Largest error against float64 of the sparse kernel with full lists, and of dense attention."""
        wide = [x.double() for x in (self.q, *self.repeated)]
        exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
        ours, theirs = self.sparse(1.0), self.dense_gqa()
        return float((ours - exact).abs().max()), float((theirs - exact).abs().max())


def causal(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
    return q_index >= kv_index


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def machine(arguments: list[str]) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    pairs = (line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "hardware": {
            "cpu": fields.get("model name", platform.processor()),
            "features": [flag for flag in wanted if flag in fields.get("flags", "").split()],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[2],
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": f"python docs/measurements/cpu_attention.py {' '.join(arguments)}",
        "shape": {"batch": 1, "heads": HEADS, "kv_heads": KV_HEADS, "mask": "causal", "block": BLOCK},
        "kernel": "C++" if cpu_native.available(torch.float32) else "torch operations",
    }


def target(repetitions: int, lengths: list[int]) -> list[dict[str, Any]]:
    """A density of 0.1 at several lengths: the figures of the README, and where the time goes."""
    records = []
    for length in lengths:
        for name, dtype in DTYPES.items():
            records.append(compare(length, name, dtype, repetitions))
            print(json.dumps(records[-1]), flush=True)
    return records


def compare(length: int, name: str, dtype: torch.dtype, repetitions: int) -> dict[str, Any]:
    """One length and type: sparse against dense in pairs, then each alternative beside sparse."""
    ours, theirs = Problem(2048, 64, dtype).error()
    problem, small = Problem(length, 64, dtype), Problem(length, 64, dtype, block=64)
    counter = torch.zeros(3, dtype=torch.int64)
    problem.sparse(0.1, counter)
    dense: list[float] = []
    sparse: list[float] = []
    ratios: list[float] = []
    for _ in range(repetitions):
        before = milliseconds(lambda: problem.sparse(0.1))
        best = min(milliseconds(problem.dense_gqa), milliseconds(problem.dense_repeated))
        after = milliseconds(lambda: problem.sparse(0.1))
        dense.append(best)
        sparse += [before, after]
        ratios.append(best / ((before + after) / 2))
    lists = problem.select(0.1)
    flex = problem.flex(lists)
    difference = float((flex() - problem.attend(lists)).abs().max())
    if difference > 4 * max(ours, theirs):
        raise RuntimeError(f"FlexAttention differs by {difference}: the two do not compute the same")
    calls: dict[str, Callable[[], object]] = {
        "select_ms": lambda: problem.select(0.1),
        "attend_ms": lambda: problem.attend(lists),
        "block_64_ms": lambda: small.sparse(0.1),
        "gathered_ms": lambda: problem.gathered(0.1),
        "flex_attend_ms": flex,
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(repetitions):
        for key, call in calls.items():
            times[key].append(milliseconds(call))
    return {
        "device": "cpu",
        "dtype": name,
        "head_dim": 64,
        "length": length,
        "density": 0.1,
        "density_computed": round(int(counter[1]) / int(counter[2]), 4),
        "sparse_ms": round(min(sparse), 1),
        "dense_ms": round(min(dense), 1),
        **{key: round(min(each), 2) for key, each in times.items()},
        "speedup_of_least_times": round(min(dense) / min(sparse), 2),
        "speedup_median_of_pairs": round(statistics.median(ratios), 2),
        "speedup_pairs": [round(ratio, 2) for ratio in ratios],
        "error_full_lists_2k": ours,
        "error_dense_2k": theirs,
    }


def crossover(lengths: list[int]) -> list[dict[str, Any]]:
    """Every length and density, few repetitions: the table that says where sparse is the faster one."""
    records = []
    for length in lengths:
        repetitions = max(1, min(20, 32768 // length))
        for name, dtype in DTYPES.items():
            for head_dim in (64, 128):
                problem = Problem(length, head_dim, dtype)
                problem.sparse(1.0)
                calls = (problem.dense_gqa, problem.dense_repeated)
                faster = min(calls, key=lambda call: min(milliseconds(call) for _ in range(min(5, repetitions))))
                dense: dict[float, list[float]] = {density: [] for density in DENSITIES}
                sparse: dict[float, list[float]] = {density: [] for density in DENSITIES}
                for _ in range(repetitions):
                    for density in DENSITIES:
                        # Long calls average over the noise by themselves: one dense call then serves all densities.
                        again = length <= 4096 or density == DENSITIES[0]
                        dense[density].append(milliseconds(faster) if again else dense[DENSITIES[0]][-1])
                        sparse[density].append(milliseconds(lambda: problem.sparse(density)))  # noqa: B023
                for density in DENSITIES:
                    records.append(
                        {
                            "device": "cpu",
                            "dtype": name,
                            "head_dim": head_dim,
                            "length": length,
                            "density": density,
                            "sparse_ms": round(min(sparse[density]), 3),
                            "dense_ms": round(min(dense[density]), 3),
                        }
                    )
                ratios = ", ".join(f"{x}: {min(dense[x]) / min(sparse[x]):.2f}" for x in DENSITIES)
                print(f"{length} {name} d{head_dim}: dense {min(dense[0.05]):.1f} ms; speedup {ratios}", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["target", "crossover"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7, help="pairs of target")
    parser.add_argument("--lengths", type=int, nargs="*", help="tokens; each has its own default")
    parser.add_argument("--out", type=Path, help="another file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    file = options.out or FOLDER / {"target": "cpu_attention.json", "crossover": "crossover_cpu.json"}[options.what]
    with torch.no_grad():
        if options.what == "target":
            records = target(options.repetitions, options.lengths or [4096, 16384, 32768])
        else:
            records = crossover(options.lengths or list(LENGTHS))
    head = machine(sys.argv[1:])
    body = ",\n".join(f"    {json.dumps(record)}" for record in records)
    file.write_text(json.dumps(head, indent=2)[:-2] + ',\n  "records": [\n' + body + "\n  ]\n}\n")


if __name__ == "__main__":
    main()
