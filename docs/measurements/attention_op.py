"""Times selection and block-sparse attention against dense SDPA on one CUDA device.

    PYTHONPATH=. python docs/measurements/attention_op.py op --out docs/measurements/attention_op_h200.json
    PYTHONPATH=. python docs/measurements/attention_op.py crossover --out docs/measurements/crossover_h200.json
    PYTHONPATH=. python docs/measurements/attention_op.py tiles --out tiles.json

Causal, batch 1, 32 query heads, 8 KV heads, random inputs, blocks of 128. Times are milliseconds between CUDA events,
the median of the repetitions; variants are timed in shuffled order, since a power-capped chip slows under load.
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

from sparsepass.kernels.attend_triton import attend_launches, block_sparse_attention_cuda
from sparsepass.kernels.launch import run_all
from sparsepass.kernels.select_triton import select_blocks_cuda
from sparsepass.kernels.spec import AttendTile

HEADS, KV_HEADS, BLOCK = 32, 8, 128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def timed(run: Callable[[], object], budget_ms: float, least: int = 3) -> list[float]:
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
    """``run`` as the replay of a CUDA graph: what it takes without the host's launch times."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times), 4),
        "min_ms": round(min(times), 4),
        "max_ms": round(max(times), 4),
        "repetitions": len(times),
    }


def inputs(length: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    def tokens(heads: int) -> Tensor:
        return torch.randn(1, length, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)

    return tokens(HEADS), tokens(KV_HEADS), tokens(KV_HEADS)


def mask(head_dim: int) -> dict[str, Any]:
    return {"scale": head_dim**-0.5, "left": -1, "right": 0, "offset": 0, "q_block": BLOCK, "kv_block": BLOCK}


def dense_runs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """The dense SDPA backends that take these inputs, by name."""

    runs: dict[str, Callable[[], object]] = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            dense(q, k, v, backend)
            runs[name] = partial(dense, q, k, v, backend)
        except RuntimeError:
            pass
    if not runs:  # float32
        wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v)]
        runs["efficient"] = partial(dense, q, wide[0], wide[1], SDPBackend.EFFICIENT_ATTENTION)
    return runs


def flex_run(q: Tensor, k: Tensor, v: Tensor, count: Tensor, lists: Tensor) -> Callable[[], object]:
    """FlexAttention on the same lists."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def causal(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return q_index >= kv_index

    blocks = q.shape[2] // BLOCK
    rows = torch.arange(blocks, device=q.device)
    # FlexAttention wants the diagonal blocks apart from the whole ones: ours come last in every row.
    full_lists = torch.nn.functional.pad(lists, (0, blocks - lists.shape[3]))
    diagonal = torch.zeros_like(full_lists)
    diagonal[..., 0] = rows.int()
    block_mask = BlockMask.from_kv_blocks(
        torch.ones_like(count), diagonal, count - 1, full_lists, BLOCK_SIZE=BLOCK, mask_mod=causal
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
        )


def operator(q: Tensor, k: Tensor, v: Tensor, band: dict[str, Any], density: float) -> Tensor:
    """Selection and attention, as the compiled graph runs them."""
    lists = select_blocks_cuda(q, k, **band, density=density)
    return block_sparse_attention_cuda(q, k, v, *lists, **band)[0]


def computed_flops(count: Tensor, head_dim: int) -> float:
    """Floating-point operations of the listed blocks, the diagonal ones counted whole."""
    return 4.0 * float(count.sum()) * BLOCK * BLOCK * head_dim


def environment() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "block": BLOCK,
        "mask": "causal",
        "date": time.strftime("%Y-%m-%d"),
    }


def op_table(lengths: list[int], densities: list[float], flex: bool) -> list[dict[str, Any]]:
    records = []
    head_dim, dtype = 128, "bf16"
    for length in lengths:
        q, k, v = inputs(length, head_dim, DTYPES[dtype])
        band = mask(head_dim)
        runs: dict[tuple[str, float], Callable[[], object]] = {}
        flops: dict[float, float] = {}
        for name, run in dense_runs(q, k, v).items():
            runs[name, 1.0] = run
        for density in densities:
            count, lists = select_blocks_cuda(q, k, **band, density=density)
            flops[density] = computed_flops(count, head_dim)

            runs["select", density] = partial(select_blocks_cuda, q, k, **band, density=density)
            runs["attend", density] = partial(block_sparse_attention_cuda, q, k, v, count, lists, **band)
            runs["op", density] = partial(operator, q, k, v, band, density)
            runs["op_graph", density] = graphed(runs["op", density])
            if flex and density < 1:
                runs["flex", density] = flex_run(q, k, v, count, lists)
        results: dict[tuple[str, float], list[float]] = {key: [] for key in runs}
        for _ in range(2):
            order = list(runs)
            random.shuffle(order)
            for key in order:
                results[key] += timed(runs[key], 150)
        best = min(statistics.median(times) for (_, density), times in results.items() if density == 1.0)
        for (name, density), times in results.items():
            record: dict[str, Any] = {"what": name, "dtype": dtype, "head_dim": head_dim, "length": length}
            record |= {"density": density, **summary(times)}
            if name in ("attend", "flex"):
                record["tflops"] = round(flops[density] / record["median_ms"] / 1e9, 1)
            if name in ("op", "op_graph"):
                record["speedup_over_dense"] = round(best / record["median_ms"], 2)
            records.append(record)
            print({key: value for key, value in record.items() if key not in ("dtype", "head_dim")}, flush=True)
    return records


def crossover_table(points: list[tuple[str, int, int]], densities: list[float]) -> list[dict[str, Any]]:
    records = []
    device = torch.cuda.get_device_name()
    for dtype, head_dim, length in points:
        q, k, v = inputs(length, head_dim, DTYPES[dtype])
        band = mask(head_dim)
        medians = {name: statistics.median(timed(run, 30)) for name, run in dense_runs(q, k, v).items()}
        graphs = {name: statistics.median(timed(graphed(run), 30)) for name, run in dense_runs(q, k, v).items()}
        backend = min(medians, key=medians.__getitem__)
        for density in densities:
            both = partial(operator, q, k, v, band, density)
            sparse = statistics.median(timed(both, 20))
            graph = statistics.median(timed(graphed(both), 20))
            records.append(
                {
                    "device": device,
                    "device_type": "cuda",
                    "dtype": dtype,
                    "head_dim": head_dim,
                    "length": length,
                    "density": density,
                    "sparse_ms": round(sparse, 4),
                    "dense_ms": round(medians[backend], 4),
                    "sparse_graph_ms": round(graph, 4),
                    "dense_graph_ms": round(min(graphs.values()), 4),
                    "dense_backend": backend,
                }
            )
        for kind in ("_ms", "_graph_ms"):
            row = [f"{r['density']}:{r['dense' + kind] / r['sparse' + kind]:.2f}" for r in records[-len(densities) :]]
            print(dtype, head_dim, length, kind, f"dense {records[-1]['dense' + kind]:.3f}; speedup", *row, flush=True)
    return records


def tile_table(points: list[tuple[int, float]], tiles: list[AttendTile], head_dim: int, dtype: str) -> list[Any]:
    records = []
    for length, density in points:
        q, k, v = inputs(length, head_dim, DTYPES[dtype])
        band = {**mask(head_dim), "q_segments": None, "kv_segments": None}
        count, lists = select_blocks_cuda(q, k, **band, density=density)
        runs = {}
        for tile in tiles:
            launches, _, _ = attend_launches(q, k, v, count, lists, **band, return_lse=False, counter=None, tile=tile)
            runs[tile] = partial(run_all, launches, q.device)
        results: dict[AttendTile, list[float]] = {tile: [] for tile in tiles}
        for _ in range(3):
            order = list(tiles)
            random.shuffle(order)
            for tile in order:
                results[tile] += timed(runs[tile], 40)
        flops = computed_flops(count, head_dim)
        for tile, times in results.items():
            median = statistics.median(times)
            records.append({"length": length, "density": density, "tile": str(tile), **summary(times)})
            print(length, density, tile, f"{median:.3f} ms {flops / median / 1e9:.0f} TF/s", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["op", "crossover", "tiles"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flex", action="store_true", help="time FlexAttention on the same lists too")
    parser.add_argument("--longest", type=int, default=131072)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    if arguments.what == "op":
        lengths = [n for n in (8192, 32768, 131072) if n <= arguments.longest]
        records = op_table(lengths, [0.05, 0.1, 0.2], arguments.flex)
    elif arguments.what == "crossover":
        densities = [0.03, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8]
        lengths = [n for n in (2**p * 1024 for p in range(8)) if n <= arguments.longest]
        records = crossover_table([("bf16", d, n) for d in (64, 128) for n in lengths], densities)
        others = [("fp16", 128), ("bf16", 256), ("bf16", 80), ("fp32", 64), ("fp32", 128)]
        records += crossover_table([(t, d, n) for t, d in others for n in (4096, 16384)], [0.05, 0.2, 0.45])
    else:
        half = [AttendTile(128, 128, 8, 3, 64, 2), AttendTile(128, 128, 8, 3, 64, 1), AttendTile(128, 128, 8, 2, 64, 2)]
        half += [AttendTile(128, 64, 8, 3, 64, 2), AttendTile(128, 64, 4, 3, 64, 2), AttendTile(64, 64, 4, 3, 64, 2)]
        records = tile_table([(32768, 0.1), (131072, 0.05)], half, 128, "bf16")
        records += tile_table([(32768, 0.1)], half, 64, "bf16")
        large = [AttendTile(128, 64, 8, 2, 16, 1), AttendTile(64, 64, 8, 2, 32, 1), AttendTile(64, 64, 4, 2, 16, 1)]
        records += tile_table([(32768, 0.1)], large, 256, "bf16")
        full = [AttendTile(128, 32, 8, 2, 16, 1, 64), AttendTile(128, 32, 8, 2, 32, 1), AttendTile(64, 32, 4, 2, 16, 1)]
        full += [AttendTile(64, 32, 8, 2, 16, 1, 64), AttendTile(32, 32, 8, 2, 16, 1, 32, "ieee")]
        records += tile_table([(16384, 0.2)], full, 128, "fp32")
    lines = ",\n".join("  " + json.dumps(record) for record in records)
    head = json.dumps({"command": " ".join(["python", *sys.argv]), **environment()})
    arguments.out.write_text(f'{{\n "environment": {head},\n "records": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
