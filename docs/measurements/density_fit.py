"""Time of attention over given lists against their density: the straight line, its constant, and intervals of both.

    PYTHONPATH=. python docs/measurements/density_fit.py --out density_fit.json --plot density.png

Causal, batch 1, 32 query heads, 8 KV heads, head size 128, bf16. Lists per query head: the first block, the diagonal
one and random ones; at density 1 all. The density is what the lists compute of the visible blocks. Variants run in
shuffled rounds. The line is fitted to the medians, each weighted by its inverse, since what times scatter by is a
share of them; intervals are of 95%, from the residuals (Student's t). Needs scipy.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from sparsepass.measure.bench import machine, ours
from sparsepass.measure.bench.baselines import dense_call
from sparsepass.measure.bench.lists import make_lists
from sparsepass.measure.bench.problem import Shape, listed_blocks, make_problem, visible_blocks
from sparsepass.measure.bench.timing import Clock, Effort, Run, summary, time_variants

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
BLOCK = 128
LEVEL = 0.95


def fit(densities: list[float], times: list[float]) -> dict[str, Any]:
    """``slope_ms`` (at density 1) and ``constant_ms``, each with its interval; the largest residual as a share."""
    from scipy.stats import t

    x, y = numpy.asarray(densities), numpy.asarray(times)
    terms = numpy.stack([x, numpy.ones_like(x)], 1) / y[:, None]  # relative: the left side is 1 everywhere
    found, *_ = numpy.linalg.lstsq(terms, numpy.ones_like(y), rcond=None)
    off = terms @ found - 1
    spread = off @ off / (len(x) - 2) * numpy.linalg.inv(terms.T @ terms)
    half = t.ppf(0.5 + LEVEL / 2, len(x) - 2) * numpy.sqrt(numpy.diag(spread))
    named = dict(zip(("slope_ms", "constant_ms"), zip(found, half, strict=True), strict=True))
    record: dict[str, Any] = {}
    for name, (value, either_side) in named.items():
        record[name] = round(float(value), 5)
        record[f"{name}_interval"] = [round(float(value - either_side), 5), round(float(value + either_side), 5)]
    record["constant_as_density"] = round(float(found[1] / found[0]), 5)
    record["largest_residual"] = round(float(abs(off).max()), 4)
    return record


def measure(length: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records by density, and a line for each implementation."""
    device = torch.device(options.device)
    problem = make_problem(Shape(1, options.heads, options.kv_heads, length, 128, "bf16"), device, 0)
    dense = "cudnn" if device.type == "cuda" else "sdpa"
    exact = dense_call(dense, problem)
    runs: dict[tuple[str, float], Run] = {(dense, 1.0): exact}
    reference = exact()
    for wanted in options.densities:
        lists = make_lists("full" if wanted >= 1 else "random", problem, wanted, BLOCK, 0)
        shape = problem.shape
        density = listed_blocks(lists, shape.batch, shape.heads) / visible_blocks(shape, BLOCK)
        outs = {}
        for name in options.implementations:
            run = partial(ours.attend, problem, lists, name)
            outs[name] = run()
            runs[name, density] = run
        expected = reference if wanted >= 1 else outs[options.implementations[0]]
        for name, out in outs.items():  # no time without the right result: all of them, or each other
            if not float((out - expected).abs().max()) < 0.05:
                raise SystemExit(f"{name} at density {wanted} and {length} tokens differs from what it has to be")
    clock = Clock(device, problem.query.nbytes * 3)
    times = time_variants(runs, clock, Effort(options.rounds, options.budget_ms))
    records = []
    for (name, density), taken in times.items():
        entry = {"length": length, "variant": name, "density": round(density, 5)}
        records.append({**entry, **summary(taken)})
    lines = []
    for name in options.implementations:
        points = [(r["density"], r["median_ms"]) for r in records if r["variant"] == name]
        lines.append({"length": length, "variant": name, **fit(*map(list, zip(*points, strict=True)))})  # type: ignore[arg-type]
    return records, lines


def draw(records: list[dict[str, Any]], lines: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({r["length"] for r in records})
    size = (6.5 * len(lengths), 5)
    figure, panels = pyplot.subplots(1, len(lengths), figsize=size, layout="constrained", squeeze=False)
    for axes, length in zip(panels[0], lengths, strict=True):
        here = [r for r in records if r["length"] == length]
        for line in (one for one in lines if one["length"] == length):
            points = [r for r in here if r["variant"] == line["variant"]]
            text = f"{line['variant']}: {line['slope_ms']:.4g} ms x density + {line['constant_ms']:.3g} ms"
            (drawn,) = axes.plot([0, 1], [line["constant_ms"], line["constant_ms"] + line["slope_ms"]], label=text)
            low = [r["median_ms"] - r["min_ms"] for r in points]
            high = [r["max_ms"] - r["median_ms"] for r in points]
            place = ([r["density"] for r in points], [r["median_ms"] for r in points])
            axes.errorbar(*place, yerr=[low, high], fmt="o", color=drawn.get_color(), markersize=4)
        names = {line["variant"] for line in lines}
        for r in (r for r in here if r["variant"] not in names):
            axes.axhline(r["median_ms"], linestyle=":", color="gray", label=f"{r['variant']}, dense")
        axes.set(
            xlabel="computed share of the visible blocks", ylabel="median time, ms", xlim=(0, None), ylim=(0, None)
        )
        axes.set_title(f"{length // 1024}K tokens")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--implementations", nargs="+", default=["auto"], help="names that the attention takes here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=60.0, help="for one variant in one round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    options = parser.parse_args()
    if len(set(options.densities)) < 3:
        parser.error("--densities: a line with intervals takes at least three")
    for name in options.implementations:
        ours.check_implementation(name, torch.device(options.device))
    head = machine.describe(torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"))
    records: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    for length in options.lengths:
        more, found = measure(length, options)
        records, lines = records + more, lines + found
        if options.out:
            content = {"environment": head, "level": LEVEL, "lines": lines, "records": records}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    for r in records:
        spread = f"{r['min_ms']:.3f}-{r['max_ms']:.3f}"
        print(f"{r['length']:>7} {r['variant']:8} {r['density']:7.4f} {r['median_ms']:9.3f} ms {spread:>18}")
    for line in lines:
        slope, constant = line["slope_ms_interval"], line["constant_ms_interval"]
        print(
            f"{line['length']:>7} {line['variant']:8} "
            f"slope {line['slope_ms']:.3f} ms [{slope[0]:.3f}, {slope[1]:.3f}], "
            f"constant {line['constant_ms']:.4f} ms [{constant[0]:.4f}, {constant[1]:.4f}], as much as density "
            f"{line['constant_as_density']:.4f}; largest residual {line['largest_residual']:.1%}"
        )
    if options.plot:
        draw(records, lines, options.plot)


if __name__ == "__main__":
    main()
