"""Checks and times the attention kernels on one Hopper GPU: given lists, no selection.

    PYTHONPATH=. timeout 500 python docs/measurements/hopper_kernel.py check
    PYTHONPATH=. timeout 500 python docs/measurements/hopper_kernel.py time --out docs/measurements/hopper_kernel.json

Lists hold the first block, the diagonal and random ones, per query head; ``uneven`` lists differ tenfold between rows.
TF/s count the listed blocks, the diagonal ones whole. Variants run in shuffled order, since a power-capped chip slows
under load; medians with their ranges.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sparsepass.kernels.attend.hopper import launch as attend_hopper
from sparsepass.kernels.attend.hopper.launch import HopperTile
from sparsepass.kernels.attend.triton.launch import attend_launches
from sparsepass.kernels.runtime.launch import Launch, run_all
from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench.baselines import flex_call, forced_sdpa
from sparsepass.measure.bench.machine import describe
from sparsepass.measure.bench.problem import Problem, Shape

BLOCK = 128

CASES: tuple[dict[str, Any], ...] = (
    {"length": 131072, "density": 0.10},
    {"length": 131072, "density": 0.05},
    {"length": 32768, "density": 0.10},
    {"length": 32768, "density": 1.0},
    {"length": 32768, "density": 0.10, "head_dim": 64},
    {"length": 32768, "density": 0.10, "head_dim": 256, "heads": 16, "kv_heads": 4},
    {"length": 8192, "density": 0.10, "batch": 8},
    {"length": 32768, "density": 0.10, "uneven": True},
    {"length": 32768, "density": 0.10, "dtype": "fp16"},
    {"length": 32768, "density": 0.10, "kv_block": 64},
    {"length": 32768, "density": 0.10, "head_dim": 64, "kv_block": 64},
    {"length": 131072, "density": 0.10, "head_dim": 64},
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    def tokens(heads: int) -> Tensor:
        shape = (case.get("batch", 1), case["length"], heads, case.get("head_dim", 128))
        return torch.randn(shape, device="cuda", dtype=DTYPES[case.get("dtype", "bf16")]).transpose(1, 2)

    kv_heads = case.get("kv_heads", 8)
    return tokens(case.get("heads", 32)), tokens(kv_heads), tokens(kv_heads)


def lists(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Causal lists of about the density: sink, diagonal, random. Indices int32 [B, H, nq, width], ascending."""
    rows, width = case["length"] // BLOCK, case["length"] // case.get("kv_block", BLOCK)
    shape = (case.get("batch", 1), case.get("heads", 32), rows)
    visible = torch.arange(1, rows + 1, device="cuda") * (width // rows)
    share = torch.full(shape, case["density"], device="cuda")
    if case.get("uneven"):
        share *= 10 ** (torch.rand(shape, device="cuda") - 0.5) * 0.8
    count = (share * visible).ceil().clamp(min=2).minimum(visible).int()
    if case["density"] >= 1:
        indices = torch.arange(width, device="cuda", dtype=torch.int32).expand(*shape, width).contiguous()
        return count, indices
    most = int(count.max())
    indices = torch.empty(*shape, most, dtype=torch.int32, device="cuda")
    column = torch.arange(width, device="cuda")
    for item in range(shape[0]):
        for head in range(shape[1]):
            score = torch.rand(rows, width, device="cuda").masked_fill_(column[None, :] >= visible[:, None], -1.0)
            score[:, 0] = 2.0
            score.scatter_(1, visible[:, None] - 1, 3.0)
            order = score.topk(most, dim=1).indices
            used = torch.arange(most, device="cuda")[None, :] < count[item, head][:, None]
            order = order.masked_fill(~used, width).sort(1).values
            indices[item, head] = order.masked_fill(order == width, 0).int()
    return count, indices


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: tuple[Tensor, Tensor],
    which: str,
    kv_block: int = BLOCK,
    tile: HopperTile | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of one call of an implementation, and what they fill."""
    launches, out, _ = attend_launches(
        q,
        k,
        v,
        *given,
        scale=q.shape[3] ** -0.5,
        left=-1,
        right=0,
        offset=0,
        q_segments=None,
        kv_segments=None,
        q_block=BLOCK,
        kv_block=kv_block,
        return_lse=False,
        counter=None,
        hopper_tile=tile,
        implementation=which,
    )
    return launches, out


def kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: tuple[Tensor, Tensor],
    which: str,
    kv_block: int = BLOCK,
    tile: HopperTile | None = None,
) -> Callable[[], Tensor]:
    """One call of an implementation, its launches prepared."""
    launches, out = prepared(q, k, v, given, which, kv_block, tile)

    def run() -> Tensor:
        run_all(launches, q.device)
        return out

    return run


def kernel_stages(
    q: Tensor, k: Tensor, v: Tensor, given: tuple[Tensor, Tensor], kv_block: int = BLOCK
) -> dict[str, float]:
    """Milliseconds up to the end of each launch (they cannot run alone: the first sets up what the others use)."""
    launches, _ = prepared(q, k, v, given, "hopper", kv_block)
    run_all(launches, q.device)
    return {
        launch.kernel.__name__: round(milliseconds(partial(run_all, launches[: number + 1], q.device), 3), 4)
        for number, launch in enumerate(launches)
    }


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeat


def time_case(case: dict[str, Any], rounds: int, variants: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = inputs(case)
    given = lists(case)
    head_dim, kv_block = q.shape[3], case.get("kv_block", BLOCK)
    runs: dict[str, Callable[[], Any]] = {name: kernel(q, k, v, given, name, kv_block) for name in ("hopper", "triton")}
    if variants:
        chosen = attend_hopper.tile_for(head_dim, kv_block)
        for tile in attend_hopper.TILES:
            if tile != chosen and tile.dim == chosen.dim and kv_block % tile.keys == 0:
                runs[f"hopper {tile.keys} keys, {tile.residents} resident"] = kernel(
                    q, k, v, given, "hopper", kv_block, tile
                )
    expected = runs["triton"]().float()
    difference = max(float((run().float() - expected).abs().max()) for run in runs.values())
    if not difference < 0.05:
        raise RuntimeError(f"the kernels differ by {difference} in {case}")
    if case["density"] < 1:
        try:
            shape = Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], case.get("dtype", "bf16"))
            runs["flex"] = flex_call("flex", Problem(shape, q, k, v), BlockLists(*given, BLOCK, kv_block))
            runs["flex"]()
        except Exception as error:  # FlexAttention does not fit every shape; the others are timed all the same
            print(f"flex: {str(error).splitlines()[0][:100]}")
            runs.pop("flex", None)
    if head_dim <= 128:
        runs["cudnn"] = partial(forced_sdpa, SDPBackend.CUDNN_ATTENTION, q, k, v, head_dim**-0.5)
    else:
        runs["flash"] = partial(forced_sdpa, SDPBackend.FLASH_ATTENTION, q, k, v, head_dim**-0.5)
    flops = {
        name: 2.0 * head_dim * q.shape[0] * q.shape[1] * case["length"] ** 2
        if name in ("cudnn", "flash")
        else 4.0 * head_dim * float(given[0].sum()) * BLOCK * kv_block
        for name in runs
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        estimate = milliseconds(run, 1)
        runs[name] = partial(milliseconds, run, max(1, int(30 / estimate)))
    for _ in range(rounds):
        for name in random.sample(sorted(runs), len(runs)):
            times[name].append(runs[name]())
    stages = kernel_stages(q, k, v, given, kv_block)
    record: dict[str, Any] = {
        **case,
        "stages_ms": stages,
        "blocks": int(given[0].sum()),
        "largest_difference": difference,
    }
    for name, taken in times.items():
        record[name] = {
            "median_ms": round(statistics.median(taken), 4),
            "range_ms": [round(min(taken), 4), round(max(taken), 4)],
            "tflops": round(flops[name] / statistics.median(taken) / 1e9, 1),
        }
    return record


def check() -> None:
    """Small problems against float64, first of all: a kernel that hangs must hang here, under the caller's timeout."""
    for dtype, head_dim, length, batch in ((torch.bfloat16, 128, 256, 1), (torch.float16, 64, 1000, 2),
                                           (torch.bfloat16, 256, 777, 1), (torch.bfloat16, 80, 640, 2)):  # fmt: skip
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(batch, length, h, head_dim, device="cuda", dtype=dtype).transpose(1, 2) for h in (4, 2, 2)
        )
        rows = -(-length // BLOCK)
        count = torch.arange(1, rows + 1, device="cuda", dtype=torch.int32).expand(1, 1, rows).contiguous()
        indices = torch.arange(rows, device="cuda", dtype=torch.int32).expand(1, 1, rows, rows).contiguous()
        outs = {}
        for tile in attend_hopper.TILES:
            if tile.dim == attend_hopper.tile_for(head_dim, BLOCK).dim:
                outs[tile] = kernel(q, k, v, (count, indices), "hopper", tile=tile)()
                torch.cuda.synchronize()
        wide = [x.double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
        exact = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        base = float((theirs - exact).abs().max())
        for tile, out in outs.items():
            error = float((out - exact).abs().max())
            print(f"{dtype} d{head_dim} {batch}x{length} {tile}: error {error:.2e}, dense {base:.2e}", flush=True)
            if not error <= 2 * base:
                raise SystemExit("too far off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of the cases, from 0; absent: all")
    parser.add_argument("--variants", action="store_true", help="other tiles of the Hopper kernel beside the chosen")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "check":
        check()
        return
    records = []
    for number, case in enumerate(CASES):
        if options.cases and number not in options.cases:
            continue
        record = time_case(case, options.rounds, options.variants)
        records.append(record)
        cells = [f"{n}: {r['median_ms']:.3f} ms {r['tflops']} TF/s" for n, r in record.items() if "median_ms" in str(r)]
        print(case, "; ".join(cells), record["stages_ms"], flush=True)
        torch.cuda.empty_cache()
    if options.out:
        head = {**describe(torch.device("cuda", 0)), "command": "python " + " ".join(sys.argv)}
        options.out.write_text(json.dumps({**head, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
