"""What a monitor adds to a sparse attention: the op with 32 sampled rows against the op without.

    PYTHONPATH=. python docs/measurements/monitor_cost.py --out docs/measurements/monitor_cost_h200.json

One batch item, 32 query heads, 8 KV heads, head size 128, bf16 on CUDA; 8, 2 and 64 in fp32 on the CPU. Milliseconds,
medians in shuffled order, selection included. Each length is first checked: the kept mass against that of torch
operations in float32.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsepass.rewriting.ops
from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.mass.api import exact_lse, sampled_rows
from sparsepass.kernels.types import Visible
from sparsepass.methods import PooledTopK
from sparsepass.reports.explain import versions

SAMPLED = 32


def milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def error(q: Tensor, k: Tensor, v: Tensor, density: float) -> float:
    """The largest difference of the op's kept mass from that by torch operations."""
    scale, visible = q.shape[3] ** -0.5, Visible(right=0)
    _, kept = watched(q, k, v, density)
    lists = PooledTopK(density).select(q, k, scale=scale, visible=visible, counter=None)
    _, lse = block_sparse_attention(q, k, v, lists, scale=scale, visible=visible, return_lse=True)
    assert lse is not None
    rows = sampled_rows(q.shape[2], SAMPLED, q.device)
    wanted = (lse[:, :, rows] - exact_lse(q, k, rows, scale=scale, visible=visible)).exp()
    return float((kept - wanted).abs().max())


def watched(q: Tensor, k: Tensor, v: Tensor, density: float) -> tuple[Tensor, Tensor]:
    arguments = (q, k, v, None, None, q.shape[3] ** -0.5, -1, 0, False, PooledTopK(density).text(), 0, None)
    out: tuple[Tensor, Tensor] = sparsepass.rewriting.ops.WATCHED_ATTENTION(*arguments, sampled=SAMPLED)
    return out


def plain(q: Tensor, k: Tensor, v: Tensor, density: float) -> Tensor:
    arguments = (q, k, v, None, None, q.shape[3] ** -0.5, -1, 0, False, PooledTopK(density).text(), 0, None)
    out: Tensor = sparsepass.rewriting.ops.SPARSE_ATTENTION(*arguments)
    return out


@torch.no_grad()
def measure(length: int, density: float, device: str, rounds: int) -> dict[str, Any]:
    heads, kv_heads, dim = (32, 8, 128) if device == "cuda" else (8, 2, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, length, h, dim, device=device, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads)
    )
    found = error(q, k, v, density)
    variants: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(q, k, v, density),
        "watched": lambda: watched(q, k, v, density),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name in random.sample(list(variants), len(variants)):
            taken = milliseconds(variants[name], device)
            if round_:  # the first one compiles
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    added = medians["watched"] / medians["plain"] - 1
    return {"length": length, "density": density, "error": found, **medians, "added": added}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 32768, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = [measure(n, density, device, options.rounds) for n in options.lengths for density in options.densities]
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    if options.out:
        content = {"device": name, "versions": versions(), "sampled": SAMPLED, "records": records}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{name}, {SAMPLED} sampled rows: milliseconds of one attention, selection included")
    print(f"{'tokens':>8} {'density':>8} {'plain':>9} {'watched':>9} {'added':>7} {'error':>9}")
    for one in records:
        figures = f"{one['plain']:9.3f} {one['watched']:9.3f} {one['added']:7.1%} {one['error']:9.1e}"
        print(f"{one['length']:8} {one['density']:8.2f} {figures}")
    return int(any(one["error"] > 1e-3 for one in records))


if __name__ == "__main__":
    sys.exit(main())
