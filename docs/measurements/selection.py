"""Times each method's selection on one CUDA device, beside attention over pooled top-k's lists at density 0.10.

    PYTHONPATH=. python docs/measurements/selection.py methods --out docs/measurements/selection_h200.json
    PYTHONPATH=. python docs/measurements/selection.py tiles --out tiles.json

Causal, batch 1, 32 query heads, 8 KV heads, head size 128, bf16. Structured inputs, so that methods that adapt to the
input have something to find. Times are milliseconds between CUDA events, medians of warm calls in shuffled order,
eager and as a replayed CUDA graph (``graph_ms``: without the host's launches). ``tiles``: shapes of the mass kernel.
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

from sparsepass.kernels.dispatch import BlockLists, Visible, block_sparse_attention
from sparsepass.kernels.launch import run_all
from sparsepass.kernels.rules import Rule
from sparsepass.kernels.select_mass_triton import MassTile, mass_launch
from sparsepass.kernels.select_scored_triton import scored_launches
from sparsepass.methods import AShape, Method, PooledTopK, Threshold, TopP, XAttention
from sparsepass.testing import structured_inputs

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 128
METHODS: dict[str, Method] = {
    "a_shape": AShape(),
    "pooled_topk 0.10": PooledTopK(0.1),
    "pooled_topk 0.10, self-similarity 0.2": PooledTopK(0.1, self_similarity=0.2),
    "threshold 0.08": Threshold(0.08),
    "threshold 0.18": Threshold(0.18),
    "top_p pooled 0.9": TopP(0.9),
    "top_p mass 0.9": TopP(0.9, score="mass"),
    "xattention 0.9, stride 16": XAttention(0.9),
    "xattention 0.9, stride 8": XAttention(0.9, stride=8),
}
TILES = (
    *(MassTile(128, 8, stages) for stages in (1, 2, 3)),
    *(MassTile(64, warps, stages) for warps in (4, 8) for stages in (1, 2, 3)),
    *(MassTile(32, 4, stages) for stages in (2, 3)),
)


def once(run: Callable[[], object]) -> float:
    """Milliseconds of one call between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def shuffled(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Times of every variant, in a new order each round, after two warm calls of each."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    torch.cuda.synchronize()
    for _ in range(repetitions):
        order = list(runs)
        random.shuffle(order)
        for name in order:
            times[name].append(once(runs[name]))
    return times


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """``run`` as the replay of a CUDA graph. It holds ``run``, and with it the tensors that the graph writes to."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> object:
        graph.replay()
        return run

    return replay


def tokens(length: int) -> tuple[Tensor, Tensor, Tensor]:
    found = structured_inputs(
        batch=1, heads=HEADS, kv_heads=KV_HEADS, length=length, head_dim=HEAD_DIM, dtype=torch.bfloat16, device="cuda",
        seed=0,
    )  # fmt: skip
    return found.query, found.key, found.value


def share(lists: BlockLists, blocks: int) -> float:
    """Listed blocks over visible ones."""
    num = lists.kv_num_blocks.expand(1, HEADS, -1).sum()
    return float(num) / (HEADS * blocks * (blocks + 1) / 2)


def method_records(length: int, repetitions: int) -> list[dict[str, Any]]:
    query, key, value = tokens(length)
    visible = Visible(right=0)
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "visible": visible, "counter": None}
    lists = PooledTopK(0.1).select(query, key, **options)
    attend = partial(block_sparse_attention, query, key, value, lists, scale=HEAD_DIM**-0.5, visible=visible)
    runs: dict[str, Callable[[], object]] = {"attention 0.10": attend}
    shares: dict[str, float] = {"attention 0.10": share(lists, -(-length // BLOCK))}
    for name, method in METHODS.items():
        shares[name] = share(method.select(query, key, **options), -(-length // BLOCK))
        runs[name] = partial(method.select, query, key, **options)
    both = shuffled({**runs, **{f"graph {name}": graphed(run) for name, run in runs.items()}}, repetitions)
    reference = statistics.median(both["graph attention 0.10"])
    print(f"\n{length} tokens   {'median':>9} {'range':>17} {'graph':>9}  of attention 0.10  computed")
    records = []
    for name in runs:
        median, graph = statistics.median(both[name]), statistics.median(both[f"graph {name}"])
        low, high = min(both[name]), max(both[name])
        part = f"{graph / reference:17.1%}  {shares[name]:.3f}"
        print(f"{name:38} {median:9.3f} {low:8.3f}-{high:8.3f} {graph:9.3f}  {part}")
        record = {"what": name, "length": length, "median_ms": median, "min_ms": low, "max_ms": high}
        records.append({**record, "graph_ms": graph, "density": shares[name], "repetitions": repetitions})
    return records


def tile_records(length: int, repetitions: int) -> list[dict[str, Any]]:
    """The launches of ``threshold`` one by one, then shapes of the mass kernel."""
    query, key, _ = tokens(length)
    mask: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "left": -1, "right": 0, "offset": 0}
    mask |= {"q_segments": None, "kv_segments": None, "q_block": BLOCK, "kv_block": BLOCK}
    rule = Rule("threshold", 0.08, "mass", sink=2, window=4, last=2)
    launches, _, _ = scored_launches(query, key, **mask, rule=rule, dial=None, counter=None)
    runs: dict[str, Callable[[], object]] = {}
    for launch in launches:
        runs[launch.kernel.__name__] = graphed(partial(run_all, [launch], query.device))
    means = launches[0].arguments["out_ptr"]
    run_all(launches[:1], query.device)
    band = {"q_len": length, "kv_len": length, "left": 1 << 30, "right": 0, "offset": 0}
    for tile in TILES:
        try:
            launch, _ = mass_launch(query, means, None, None, mask["scale"], band, BLOCK, BLOCK, tile)
            run_all([launch], query.device)
            torch.cuda.synchronize()
            runs[str(tile)] = graphed(partial(run_all, [launch], query.device))
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            print(f"{tile}: {str(error).splitlines()[0]}")
    blocks = length // BLOCK
    flops = 2.0 * HEADS * BLOCK * HEAD_DIM * blocks * (blocks + 1) / 2
    records = []
    print(f"\n{length} tokens")
    for name, times in shuffled(runs, repetitions).items():
        median = statistics.median(times)
        speed = f"{flops / median / 1e9:6.0f} TF/s" if "Tile" in name else ""
        print(f"{name:72} {median:8.3f} ms {speed}")
        records.append({"what": name, "length": length, "graph_ms": median, "min_ms": min(times), "max_ms": max(times)})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["methods", "tiles"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    records = []
    for length in arguments.lengths:
        measure = method_records if arguments.what == "methods" else tile_records
        records += measure(length, arguments.repetitions)
    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bf16",
        "date": time.strftime("%Y-%m-%d"),
    }
    head = json.dumps({"command": " ".join(["python", *sys.argv]), **environment})
    lines = ",\n".join("  " + json.dumps(record) for record in records)
    arguments.out.write_text(f'{{\n "environment": {head},\n "records": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
