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

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.runtime.launch import Launch, run_all
from sparsepass.kernels.select.rule import Rule
from sparsepass.kernels.select.triton import lists as rules_triton
from sparsepass.kernels.select.triton.lists import rule_launch
from sparsepass.kernels.select.triton.mass import MassTile, mass_launch
from sparsepass.kernels.select.triton.scored import scored_launches
from sparsepass.kernels.types import BlockLists, Visible
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
    *(MassTile(64, 4, stages) for stages in (1, 2, 3)),
    *(MassTile(64, 8, stages) for stages in (2, 3)),
    MassTile(128, 8, 2),
)
LEVELS = ((1, 256), (1, 512), (2, 128))
"""Rows of a program and key blocks at a time of the lists by level."""


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


def wrong_scores(scores: Tensor, query: Tensor, means: Tensor) -> float:
    """Largest difference of scores [1, H, nq, nkv] from float32 arithmetic, at a few rows of some heads."""
    worst = 0.0
    rows = scores.shape[2]
    for head in (0, 5, HEADS - 1):
        for row in (1, rows // 2, rows // 2 + 1, rows - 2, rows - 1):
            tokens_of = query[0, head, row * BLOCK : (row + 1) * BLOCK].float()
            logits = tokens_of @ means[0, head * KV_HEADS // HEADS].float().T * HEAD_DIM**-0.5
            seen = torch.arange(row * BLOCK, (row + 1) * BLOCK, device=query.device)[:, None] + 1
            hidden = (torch.arange(rows, device=query.device) + 1) * BLOCK > seen
            wanted = logits.masked_fill(hidden, -torch.inf).logsumexp(0)[: row + 1]
            worst = max(worst, float((scores[0, head, row, : row + 1] - wanted).abs().max()))
    return worst


def wrong_rows(counts: Tensor, lists: Tensor, scores: Tensor, rule: Rule) -> int:
    """Rows [1, H, nq] whose list is not what the rule says of the scores, a head at a time."""
    rows, wrong = scores.shape[2], 0
    row, column = torch.arange(rows, device=scores.device)[:, None], torch.arange(rows, device=scores.device)
    for head in range(HEADS):
        score = scores[0, head].masked_fill(column > row, -torch.inf)
        keep = score >= score.amax(1, keepdim=True) + torch.tensor(rule.dial, device=scores.device).log()
        keep |= (column < rule.sink) | (column > row - rule.window) | (row >= rows - rule.last)
        keep &= column <= row
        listed = torch.zeros(rows, rows + 1, dtype=torch.bool, device=scores.device)
        used = column < counts[0, head][:, None]
        listed.scatter_(1, torch.where(used, lists[0, head].long(), rows), True)
        ascending = (lists[0, head].diff(dim=1) > 0) | ~used[:, 1:]
        right = (listed[:, :rows] == keep).all(1) & ascending.all(1) & (counts[0, head] == keep.sum(1))
        wrong += int((~right).sum())
    return wrong


def tile_records(length: int, repetitions: int) -> list[dict[str, Any]]:
    """The launches of ``threshold``, shapes of its mass and list kernels, and the method beside attention."""
    query, key, value = tokens(length)
    mask: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "left": -1, "right": 0, "offset": 0}
    mask |= {"q_segments": None, "kv_segments": None, "q_block": BLOCK, "kv_block": BLOCK}
    rule = Rule("threshold", 0.08, "mass", sink=2, window=4, last=2)
    launches, counts, lists = scored_launches(query, key, **mask, rule=rule, dial=None, counter=None)
    runs: dict[str, Callable[[], object]] = {}
    checked: dict[str, str] = {}
    for launch in launches:
        runs[launch.kernel.__name__] = graphed(partial(run_all, [launch], query.device))
    means, scores = launches[0].arguments["out_ptr"], launches[1].arguments["scores_ptr"]
    band = {"q_len": length, "kv_len": length, "left": 1 << 30, "right": 0, "offset": 0}

    def add(name: str, launch: Launch, judge: Callable[[], str]) -> None:
        try:
            run_all([launch], query.device)
            checked[name] = judge()
            runs[name] = graphed(partial(run_all, [launch], query.device))
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            print(f"{name}: {str(error).splitlines()[0]}")

    for tile in TILES:
        launch, found = mass_launch(query, means, None, None, mask["scale"], band, BLOCK, BLOCK, tile)
        add(str(tile), launch, lambda found=found: f"off by {wrong_scores(found, query, means):.1e}")  # type: ignore[misc]
    shared: dict[str, Any] = {"batch": 1, "heads": HEADS, "kv_heads": KV_HEADS, "q_block": BLOCK, "kv_block": BLOCK}
    shared |= {"allowed": None, "dial": None, "q_unlike": None, "k_unlike": None, "counter": None, "like": query}
    shipped = rules_triton.LEVEL_ROWS, rules_triton.LEVEL_COLUMNS
    for level in LEVELS:
        rules_triton.LEVEL_ROWS, rules_triton.LEVEL_COLUMNS = level
        launch, counts, lists = rule_launch(rule, band, **shared, scores=scores)
        judge = partial(wrong_rows, counts, lists, scores, rule)
        add(f"lists {level}", launch, lambda judge=judge: f"{judge()} wrong rows")  # type: ignore[misc]
    rules_triton.LEVEL_ROWS, rules_triton.LEVEL_COLUMNS = shipped

    visible = Visible(right=0)
    options: dict[str, Any] = {"scale": HEAD_DIM**-0.5, "visible": visible, "counter": None}
    given = PooledTopK(0.1).select(query, key, **options)
    whole: dict[str, Callable[[], object]] = {
        "attention 0.10": partial(
            block_sparse_attention, query, key, value, given, scale=HEAD_DIM**-0.5, visible=visible
        ),
        "select threshold 0.08": partial(Threshold(0.08).select, query, key, **options),
        "select pooled_topk 0.10": partial(PooledTopK(0.1).select, query, key, **options),
    }
    for name, call in whole.items():
        runs[name], runs[f"graph {name}"] = call, graphed(call)
    blocks = length // BLOCK
    flops = 2.0 * HEADS * BLOCK * HEAD_DIM * blocks * (blocks + 1) / 2
    records = []
    times = shuffled(runs, repetitions)
    attention = statistics.median(times["graph attention 0.10"])
    for name, taken in times.items():
        median = statistics.median(taken)
        speed = f"{flops / median / 1e9:5.0f} TF/s" if name.startswith("Mass") else f"{median / attention:10.1%}"
        print(f"{length:>6} {name:70} {median:8.3f} ms {speed} {checked.get(name, '')}")
        records.append({"what": name, "length": length, "graph_ms": median, "min_ms": min(taken), "max_ms": max(taken)})
        records[-1] |= {"checked": checked[name]} if name in checked else {}
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
