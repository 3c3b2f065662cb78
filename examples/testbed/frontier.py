"""The frontier: a larger model with sparse attention against a smaller dense one, at equal operations and equal bytes.

    python -m examples.testbed.frontier --models tiny=runs/tiny small large=runs/large --out frontier.json --plots plots

Every model of the family answers the same held-out questions of the four classes under some budgets; costs are counted
from what was computed (``costs.py``). And how sparse the last layer's state is where the answer begins, against how
hard the question is (``hidden.py``). Float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples.testbed import compare, family, frontier_plots, hidden
from examples.testbed.costs import BLOCK, cost, parameters, visible_blocks
from examples.testbed.evaluate import HELD_OUT
from sparsepass.host.environment import cpu_name
from sparsepass.measure.calibrate.bounds import lower_bound, upper_bound
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from sparsepass.measure.testbed import SIZES
from sparsepass.methods import make_method
from sparsepass.methods.base import Method
from sparsepass.types import Budget

LENGTHS = (1024, 2048, 4096, 8192, 16384)
DENSITIES = (0.1, 0.2, 0.35, 0.5, 0.75)
LAST = 2
"""Query blocks at the end that compute everything, under every sparse budget."""


def budgets(densities: Sequence[float]) -> dict[str, Method | None]:
    """Dense, pooled block top-k at some densities, and the sparsest lists there are: first block and a local window."""
    local = Budget("a_shape", {"window": BLOCK, "sink": BLOCK, "block": BLOCK, "last": LAST})
    pooled = [Budget("pooled_topk", {"density": one, "block": BLOCK, "last": LAST}) for one in densities]
    named = {make_method(one).text(): make_method(one) for one in (local, *pooled)}
    return {"dense": None, **named}


def questions(task: TokenTask, length: int, count: int, rows: int, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """(tokens [B, length], right answers [B, A]) of held-out samples, one question behind each context."""
    generator = torch.Generator(device).manual_seed(HELD_OUT + 31 * length)
    for start in range(0, count, rows):
        drawn = task.draw_many(min(rows, count - start), length, generator)
        yield torch.cat([drawn.context, drawn.prompts[:, 0], drawn.answers[:, 0]], -1), drawn.answers[:, 0]


@torch.no_grad()
def measure(
    model: Any, attend: family.Attend, size: str, task: TokenTask, length: int, name: str, method: Method | None,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """One cell: which answers are right as a whole, forced, and what a request cost."""
    device = next(model.parameters()).device
    count = max(options.least, min(options.most, options.tokens // length))
    rows = max(1, options.together // length)
    where = torch.arange(task.answer_size, device=device) + length - task.answer_size - 1
    right: list[bool] = []
    with attend.under(method, device) as counter:
        for tokens, wanted in questions(task, length, count, rows, device):
            found = model(input_ids=tokens, use_cache=False, logits_to_keep=where).logits.argmax(-1)
            right += (found == wanted).all(-1).tolist()
        blocks = visible_blocks(length, SIZES[size]) if method is None else int(counter[1]) / count
    paid = cost(SIZES[size], length, blocks, pooled="pooled" in name, answer=task.answer_size)
    hits = sum(right)
    return {
        "model": size, "task": task.name, "class": str(task.task_class), "length": length, "budget": name,
        "density": round(blocks / visible_blocks(length, SIZES[size]), 4), "questions": count,
        "accuracy": hits / count, "low": lower_bound(hits, count, 0.025), "high": upper_bound(hits, count, 0.025),
        "flops": paid.flops, "bytes": paid.bytes, "right": "".join("01"[one] for one in right),
    }  # fmt: skip


def models_of(given: Sequence[str]) -> dict[str, Path | None]:
    pairs = {size: folder for size, _, folder in (one.partition("=") for one in given)}
    if unknown := set(pairs) - set(SIZES):
        raise SystemExit(f"No testbed size {', '.join(sorted(unknown))}; accepted are {', '.join(SIZES)}.")
    return {size: Path(pairs[size]) if pairs[size] else None for size in SIZES if size in pairs}


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["small"], help="SIZE, or SIZE=checkpoint folder or weights file"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="of pooled top-k")
    parser.add_argument("--tokens", type=int, default=2**18, help="per cell; default %(default)s")
    parser.add_argument("--least", type=int, default=48, help="questions per cell at least")
    parser.add_argument("--most", type=int, default=256, help="questions per cell at most")
    parser.add_argument("--together", type=int, default=2**18, help="tokens of a batch")
    parser.add_argument("--hidden", default="small", help="the model whose states are looked at; '' for none")
    parser.add_argument("--hidden-samples", type=int, default=256, help="per point")
    parser.add_argument("--seconds", type=float, default=75.0, help="after which no further length is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("frontier.json"))
    parser.add_argument("--plots", type=Path, help="folder for the plots; default: none")
    parser.add_argument("--replot", action="store_true", help="measure nothing: plot and compare what --out has")
    return parser.parse_args(given)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as plain data."""
    began, device = time.monotonic(), torch.device(options.device)
    loaded = {size: family.load(size, folder, device) for size, folder in models_of(options.models).items()}
    cells: list[dict[str, Any]] = []
    skipped: list[int] = []
    states: dict[str, Any] = {}
    if options.hidden in loaded:
        states = hidden.measure(loaded[options.hidden][0], options.hidden_samples, options.together, options.lengths)
        print(f"hidden states: {time.monotonic() - began:.0f} s", flush=True)
    for length in options.lengths:  # short ones first: if time is over, the longest are missing for all models
        if time.monotonic() - began > options.seconds:
            skipped.append(length)
            continue
        for size, (model, attend) in loaded.items():
            for task in TOKEN_TASKS:
                for name, method in budgets(options.densities).items():
                    cells.append(measure(model, attend, size, task, length, name, method, options))
        print(f"{length} tokens: {time.monotonic() - began:.0f} s", flush=True)
    sizes = {size: {"parameters": parameters(SIZES[size])} for size in loaded}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    conditions = {"device": name, "torch": torch.__version__, "seconds": round(time.monotonic() - began, 1)}
    return {
        "conditions": conditions, "models": sizes, "skipped": skipped, "cells": cells, "hidden": states,
        "comparisons": compare.comparisons(cells),
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if options.replot:
        found = json.loads(options.out.read_text())
        found["comparisons"] = compare.comparisons(found["cells"])
    else:
        found = run(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.plots:
        frontier_plots.draw(found, options.plots)
    console = Console(width=150)
    console.print(compare.accuracy_table(found["cells"]))
    console.print(compare.comparison_table(found["comparisons"]))
    if found["hidden"]:
        console.print(hidden.table(found["hidden"]))
    if found["skipped"]:
        console.print(f"Not measured, time was over: {', '.join(map(str, found['skipped']))} tokens.")


if __name__ == "__main__":
    main(sys.argv[1:])
