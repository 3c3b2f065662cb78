"""Share computed by methods that follow the data, over dial and length: writes ``sparsepass/methods/densities.json``.

    PYTHONPATH=. python docs/measurements/densities.py --error-time docs/measurements/error_time_h200.json \
        --out sparsepass/methods/densities.json

Causal, structured inputs, blocks of 128 tokens. The lengths given are selected here, on the CPU; no attention runs. The
file of ``error_time.py`` adds the lengths that it measured, and what each method costs: the density of pooled top-k
that takes as long, and how much of it the selection is. Needs no GPU; a minute or two.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench import machine, ours
from sparsepass.measure.bench.problem import Problem, Shape, make_problem, visible_blocks
from sparsepass.methods import Method, decode_budget, make_method

BLOCK = 128
CURVES = ("threshold", "top_p, pooled", "top_p, mass", "xattention", "vertical_slash", "flex_prefill")
"""Of ``error_time.SWEEPS``: what does not follow from the parameters alone."""


def sweeps() -> dict[str, tuple[Method, tuple[float, ...]]]:
    """``SWEEPS`` of the script beside this one."""
    spec = importlib.util.spec_from_file_location("error_time", Path(__file__).with_name("error_time.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: dict[str, tuple[Method, tuple[float, ...]]] = module.SWEEPS
    return found


def computed_blocks(lists: BlockLists, length: int) -> int:
    """Blocks of a causal problem that the kernels compute: listed ones, and those that columns beside them fill."""
    rows, blocks = lists.kv_num_blocks.shape[2], -(-length // BLOCK)
    total = int(lists.kv_num_blocks.sum())
    if lists.columns is None:
        return total
    entry = torch.arange(lists.kv_indices.shape[3])
    for item, head in torch.cartesian_prod(*map(torch.arange, lists.kv_num_blocks.shape[:2])).tolist():
        used = entry < lists.kv_num_blocks[item, head][:, None]
        named = torch.zeros(rows, blocks + 1, dtype=torch.bool)
        named.scatter_(1, torch.where(used, lists.kv_indices[item, head], blocks).long(), True)
        columns = lists.columns.indices[item, head, 0, : int(lists.columns.num[item, head, 0])].long()
        last = (torch.arange(1, rows + 1) * BLOCK).clamp(max=length) - 1
        outside = (columns <= last[:, None]) & ~named[:, columns // BLOCK]
        total += int((-(-outside.sum(1) // BLOCK)).sum())
    return total


def select_here(options: argparse.Namespace) -> list[dict[str, Any]]:
    measured = []
    for length in options.lengths:
        shape = Shape(1, options.heads, options.kv_heads, length, 128, "fp32")
        problem: Problem = make_problem(shape, torch.device("cpu"), 0, "structured")
        visible = visible_blocks(shape, BLOCK)
        for curve, (method, dials) in sweeps().items():
            if curve not in CURVES:
                continue
            points = []
            for dial in dials:
                one = replace(method, **{str(method.dial): dial}, block=BLOCK)  # type: ignore[type-var]
                points.append([dial, round(computed_blocks(ours.select(problem, one), length) / visible, 4)])
            measured.append({"curve": curve, "length": length, "device": "cpu", "points": sorted(points)})
            print(f"{length:>7} {curve:16} " + ", ".join(f"{dial:g}: {share:.3f}" for dial, share in sorted(points)))
    return measured


def from_error_time(file: Path) -> list[dict[str, Any]]:
    """Points of each curve and length in the file: dial, share, two costs as densities of pooled top-k.

    The first is the density at which pooled top-k takes as long. The second is what of it is selection, beyond the
    selection that pooled top-k has.
    """
    content = json.loads(file.read_text())
    known = sweeps()
    measured = []
    for length in sorted({record["length"] for record in content["records"]}):
        here = [record for record in content["records"] if record["length"] == length and "density" in record]
        pooled = [record for record in here if record["curve"] == "pooled_topk"]
        ladder = sorted((r["median_ms"], r["density"]) for r in here if r["curve"] in ("pooled_topk", "full"))
        per_ms = (ladder[-1][1] - ladder[0][1]) / (ladder[-1][0] - ladder[0][0])
        selects = statistics.median(record["select_ms"] for record in pooled)
        for curve in CURVES:
            default, dials = known[curve]
            points = []
            for record in (r for r in here if r["curve"] == curve):
                method = make_method(decode_budget(record["variant"]))
                dial = getattr(method, str(default.dial))
                if dial in dials:  # not the points that met a peer
                    as_long = pooled_density(ladder, record["median_ms"])
                    selection = max(0.0, record["select_ms"] - selects) * per_ms
                    points.append([dial, record["density"], as_long, selection])
            rounded = [[float(f"{number:.4g}") for number in point] for point in sorted(points)]
            measured.append(
                {"curve": curve, "length": length, "device": content["environment"]["device"], "points": rounded}
            )
    return measured


def pooled_density(ladder: list[tuple[float, float]], milliseconds: float) -> float:
    """The density at which pooled top-k takes so long; past the last the line goes on."""
    upper = next((i for i, (time, _) in enumerate(ladder) if time >= milliseconds), len(ladder) - 1)
    (low_ms, low), (high_ms, high) = ladder[max(0, upper - 1)], ladder[max(1, upper)]
    return max(0.0, low + (high - low) * (milliseconds - low_ms) / (high_ms - low_ms))


def to_text(content: dict[str, Any]) -> str:
    """JSON with one curve to a line."""
    lines = ",\n  ".join(json.dumps(one) for one in content["measured"])
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items() if key != "measured")
    return f'{{\n{head} "measured": [\n  {lines}\n ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--error-time", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    measured = select_here(options) + [one for file in options.error_time for one in from_error_time(file)]
    for one in measured:
        assert all(math.isfinite(number) for point in one["points"] for number in point)
    if options.out:
        head = machine.describe(torch.device("cpu"))
        content = {"command": head["command"], "date": head["date"], "inputs": "structured, causal, blocks of 128"}
        options.out.write_text(to_text({**content, "measured": measured}))


if __name__ == "__main__":
    main()
