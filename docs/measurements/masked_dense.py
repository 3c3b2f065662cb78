"""Exact attention under masks that SDPA has no flag for: SDPA with the mask tensor against ours, all blocks listed.

    PYTHONPATH=. python docs/measurements/masked_dense.py --out docs/measurements/masked_dense_h200.json

Batch 2, 32 query heads, 8 KV heads, head size 128, bf16 on CUDA; fewer heads on the CPU. The mask tensor is bool
[B, 1, S, S], as transformers makes it; making it is not timed. Milliseconds, medians in shuffled order.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.types import Visible
from sparsepass.methods import AShape
from sparsepass.reports.explain import versions

EVERYTHING = AShape(window=1 << 29, sink=0)


def ours(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    lists = EVERYTHING.select(q, k, scale=q.shape[3] ** -0.5, visible=visible, counter=None)
    return block_sparse_attention(q, k, v, lists, scale=q.shape[3] ** -0.5, visible=visible)[0]


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


def measure(length: int, kind: str, device: str, rounds: int) -> dict[str, Any]:
    batch, heads, kv_heads, dim = (2, 32, 8, 128) if device == "cuda" else (2, 8, 2, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, length, h, dim, device=device, dtype=dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    at = torch.arange(length, device=device)
    mask = at[None, :] <= at[:, None]
    visible = Visible(right=0)
    if kind == "window":
        window = length // 4
        mask = mask & (at[None, :] > at[:, None] - window)
        visible = Visible(left=window - 1, right=0)
    full = mask.expand(batch, 1, length, length).clone()
    if kind == "padding":
        segments = torch.zeros(batch, length, dtype=torch.int32, device=device)
        segments[1, : length // 3] = -1
        full[1, :, :, : length // 3] = False
        visible = Visible(right=0, kv_segments=segments)
    runs = {
        "sdpa": partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, attn_mask=full, enable_gqa=True),
        "ours": partial(ours, q, k, v, visible),
        "causal": partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True),
    }
    seen = full.any(-1, keepdim=True)
    difference = float(((runs["sdpa"]().nan_to_num() - runs["ours"]()) * seen).abs().max())
    if difference > 0.05:
        raise RuntimeError(f"{kind} at {length}: results differ by {difference}")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(sorted(runs), len(runs)):
            times[name].append(milliseconds(runs[name], device))
    record: dict[str, Any] = {
        "length": length,
        "mask": kind,
        **{n: round(statistics.median(t), 3) for n, t in times.items()},
    }
    print(record, flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with torch.no_grad():
        records = [
            measure(length, kind, options.device, options.rounds)
            for length in options.lengths
            for kind in ("padding", "window")
        ]
    if options.out:
        head = {"command": "python " + " ".join(sys.argv), "versions": versions(), "device": options.device}
        options.out.write_text(json.dumps({**head, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
