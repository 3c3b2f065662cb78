"""Times vertical_slash and flex_prefill on one CUDA device, step by step: estimation, lists, attention, columns.

    PYTHONPATH=. python docs/measurements/columns.py --out docs/measurements/columns_h200.json

Causal, batch 1, 32 query heads, 8 KV heads, head size 128, bf16, structured inputs (``sparsepass.testing``), blocks of
128. Milliseconds between CUDA events, medians; steps in shuffled order. ``error`` is the mean absolute difference from
dense attention over that of zero; ``density`` what ran, columns included.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.slash import api as slash
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.methods import FlexPrefill, Method, PooledTopK, VerticalSlash
from sparsepass.testing import structured_inputs

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
METHODS: tuple[Method, ...] = (
    VerticalSlash(0.05),
    VerticalSlash(0.1),
    VerticalSlash(0.2),
    VerticalSlash(0.5, columns=512, slashes=512),
    FlexPrefill(0.9),
    FlexPrefill(0.9, tau=0.0),
    FlexPrefill(0.95),
    PooledTopK(0.1),
)


def timed(run: Callable[[], object], budget_ms: float = 100, least: int = 3) -> list[float]:
    """Times of repeated calls until ``budget_ms`` is used up, after a warm-up."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < least or (sum(times) < budget_ms and len(times) < 30):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as the replay of a CUDA graph: without the host's launch times."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> object:
        graph.replay()
        return run  # it holds the tensors that the graph writes to

    return replay


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Mean absolute difference over mean absolute value, head by head: whole tensors in float32 would not fit."""
    pairs = [(a.float(), b.float()) for a, b in zip(out[0], exact[0], strict=True)]
    return float(sum((a - b).abs().mean() for a, b in pairs) / sum(b.abs().mean() for _, b in pairs))


def attend(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, counter: Tensor | None = None) -> Tensor:
    return block_sparse_attention(q, k, v, lists, scale=scale, visible=Visible(right=0), counter=counter)[0]


def measure(length: int, method: Method, inputs: tuple[Tensor, Tensor, Tensor], exact: Tensor) -> dict[str, Any]:
    q, k, v = inputs
    scale, visible = HEAD_DIM**-0.5, Visible(right=0)
    select = partial(method.select, q, k, scale=scale, visible=visible, counter=None)
    lists = select()
    counter = torch.zeros(3, dtype=torch.int64, device=q.device)
    method.select(q, k, scale=scale, visible=visible, counter=counter)
    out = attend(q, k, v, lists, scale, counter)
    blocks = BlockLists(lists.kv_num_blocks, lists.kv_indices, lists.q_block, lists.kv_block)

    runs: dict[str, Callable[[], object]] = {
        "select": select,
        "select_graph": graphed(select),
        "attend": partial(attend, q, k, v, lists, scale),
        "attend_blocks_alone": partial(attend, q, k, v, blocks, scale),
        "op_graph": graphed(lambda: attend(q, k, v, select(), scale)),
    }
    if isinstance(method, VerticalSlash | FlexPrefill):
        problem = slash.problem_of(q, k, visible, method.block)
        steps = slash.steps_of(q.device)
        runs["estimate_graph"] = graphed(lambda: slash.estimate(q, k, problem, visible, scale, method.queries, steps))
    results: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2):
        order = list(runs)
        random.shuffle(order)
        for name in order:
            results[name] += timed(runs[name])
    _, computed, seen = counter.tolist()
    columns = None if lists.columns is None else round(float(lists.columns.num.float().mean()), 1)
    return {
        "length": length,
        "method": method.text(),
        "density": round(computed / seen, 4),
        "blocks_density": round(float(lists.kv_num_blocks.sum()) / seen, 4),
        "columns_per_head": columns,
        "error": relative_error(out, exact),
        **{
            name: {"median_ms": round(statistics.median(ts), 4), "min_ms": round(min(ts), 4)}
            for name, ts in results.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=131072)
    arguments = parser.parse_args()
    random.seed(0)
    records = []
    for length in (n for n in (8192, 32768, 131072) if n <= arguments.longest):
        made = structured_inputs(
            batch=1,
            heads=HEADS,
            kv_heads=KV_HEADS,
            length=length,
            head_dim=HEAD_DIM,
            dtype=torch.bfloat16,
            device="cuda",
            seed=0,
        )
        inputs = (made.query, made.key, made.value)
        exact = dense(*inputs)
        dense_ms = round(statistics.median(timed(partial(dense, *inputs))), 4)
        for method in METHODS:
            record = {**measure(length, method, inputs, exact), "dense_ms": dense_ms}
            record["speedup_over_dense"] = round(dense_ms / record["op_graph"]["median_ms"], 2)
            records.append(record)
            print(json.dumps(record), flush=True)
    head = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = ",\n".join("  " + json.dumps(record) for record in records)
    arguments.out.write_text(f'{{\n "environment": {json.dumps(head)},\n "records": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
