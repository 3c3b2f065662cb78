"""Error against time: every method over its dial, and attention of others, on structured inputs.

    PYTHONPATH=. python docs/measurements/error_time.py --out docs/measurements/error_time_h200.json --plot error.png
    ... --inputs concentrated   # attention on fewer blocks: sparsepass.testing.CONCENTRATED
    ... --peer-path DIR --peer FlashPrefill=module:function   # compared with; any number of them

Causal, batch 1, 32 query heads, 8 KV heads, head size 128, bf16. ``error`` is the norm of the difference from exact
attention (cuDNN's) over the norm of exact attention, ``max_error`` the largest difference; all of the output counts.
Time is selection and attention as a compiled graph runs them: medians of calls in shuffled rounds.

A peer is ``function(q, k, v, **settings) -> out``, tensors [B, H, S, D] (k, v: KV heads), causal, scale D^-0.5. An
attribute ``settings`` of it, a sequence of dicts, names the settings to measure; the first is its default. For each of
them each method's dial is moved until its error is just under the peer's: what a method takes there is the comparison.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsepass.measure.bench import machine, ours
from sparsepass.measure.bench.baselines import dense_call
from sparsepass.measure.bench.plots import colors
from sparsepass.measure.bench.problem import Problem, Shape, make_problem
from sparsepass.measure.bench.timing import Clock, Effort, summary, time_variants
from sparsepass.methods import AShape, FlexPrefill, Full, Method, PooledTopK, Threshold, TopP, VerticalSlash, XAttention

SWEEPS: dict[str, tuple[Method, tuple[float, ...]]] = {
    "a_shape": (AShape(), (1024, 4096, 16384, 49152)),
    "pooled_topk": (PooledTopK(0.1), (0.02, 0.05, 0.1, 0.2, 0.4)),
    "threshold": (Threshold(), (0.3, 0.18, 0.12, 0.08, 0.03, 0.01)),
    "threshold, least": (Threshold(sink=1, window=2, last=0), (0.3, 0.18, 0.08, 0.03, 0.01)),
    "top_p, pooled": (TopP(), (0.5, 0.7, 0.8, 0.9, 0.95)),
    "top_p, mass": (TopP(score="mass"), (0.5, 0.7, 0.8, 0.9, 0.95)),
    "xattention": (XAttention(), (0.5, 0.7, 0.8, 0.9, 0.95)),
    "vertical_slash": (VerticalSlash(0.1), (0.02, 0.05, 0.1, 0.2, 0.4)),
    "flex_prefill": (FlexPrefill(), (0.5, 0.7, 0.8, 0.9, 0.95)),
}
"""Curves by name: the method, and the values of its dial."""

STEPS, KEPT = 4, 3
"""Halvings between two points of a curve to meet a peer's error, and how many of the methods are then timed there."""


@dataclass
class Point:
    """One variant: a method at one dial, a peer at one setting, or a dense kernel."""

    curve: str
    call: Callable[[], Tensor]
    text: str
    method: Method | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float:
        return float(self.facts["error"])


@dataclass(frozen=True)
class Bench:
    """One problem, exact attention on it, and what was found so far."""

    problem: Problem
    exact: Tensor
    clock: Clock

    def probe(self, point: Point) -> Point:
        """Adds the error and the time of one warm call, for a method also the share computed."""
        if point.method is not None:
            point.method.prepare(self.problem.device)
            counter = torch.zeros(3, dtype=torch.int64, device=self.problem.device)
            out = ours.operator(self.problem, point.method, counter=counter)
            _, computed, visible = counter.tolist()
            point.facts["density"] = round(computed / visible, 5)
        else:
            out = point.call()
        point.facts |= difference(out, self.exact)
        del out
        point.facts["once_ms"] = self.clock.once(point.call)
        return point

    def of(self, curve: str, method: Method) -> Point:
        return self.probe(Point(curve, partial(ours.operator, self.problem, method), method.text(), method))

    def meeting(self, error: float, curve: str, points: Sequence[Point]) -> Point | None:
        """The point of a curve that is just within an error, by halving; None if all or none of the curve is."""
        within = [p for p in points if p.error <= error]
        beyond = [p for p in points if p.error > error]
        if not within or not beyond:
            return None
        good, bad = max(within, key=lambda p: p.error), min(beyond, key=lambda p: p.error)
        for _ in range(STEPS):
            point = self.of(curve, between(good.method, bad.method))
            if point.error <= error:
                good = point
            else:
                bad = point
        return good


def difference(out: Tensor, exact: Tensor) -> dict[str, float]:
    """Relative norm and largest entry of the difference, a head at a time: float32 copies take room."""
    off, norm, largest = (torch.zeros((), dtype=torch.float64, device=exact.device) for _ in range(3))
    for head in range(exact.shape[1]):
        wanted = exact[:, head].float()
        gap = out[:, head].float() - wanted
        off, norm = off + gap.square().sum(dtype=torch.float64), norm + wanted.square().sum(dtype=torch.float64)
        largest = torch.maximum(largest, gap.abs().max().double())
    error = math.sqrt(float(off / norm))
    return {"error": error if math.isfinite(error) else math.inf, "max_error": float(largest)}


def dial_of(method: Method | None) -> float:
    return float(getattr(method, str(type(method).dial)))


def between(one: Method | None, other: Method | None) -> Method:
    """The method whose dial is half way: of shares to cover, by what they leave out; of others, by ratio."""
    a, b = dial_of(one), dial_of(other)
    name = str(type(one).dial)
    middle = 1 - math.sqrt((1 - a) * (1 - b)) if name in ("coverage", "tau", "gamma") else math.sqrt(a * b)
    value = round(middle) if name == "window" else middle
    return replace(one, **{name: value})  # type: ignore[type-var]


def load_peer(text: str) -> tuple[str, Callable[..., Tensor]]:
    """``NAME=module:function``."""
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    if not (name and module and function):
        raise SystemExit(f"--peer is {text!r}; accepted is NAME=module:function")
    return name, getattr(importlib.import_module(module), function)


def peer_points(bench: Bench, peers: dict[str, Callable[..., Tensor]]) -> list[Point]:
    """Each peer at each of its settings; one that fails is reported and left out."""
    found = []
    tensors = (bench.problem.query, bench.problem.key, bench.problem.value)
    for name, function in peers.items():
        for number, settings in enumerate(getattr(function, "settings", ({},))):
            text = ", ".join(f"{key} {value}" for key, value in settings.items())
            point = Point(name, partial(function, *tensors, **settings), text, facts={"default": number == 0})
            try:
                for _ in range(3):  # it may tune itself, record a graph, replay it
                    point.call()
                found.append(bench.probe(point))
            except Exception as error:  # a foreign kernel may fail in any way; the rest is still measured
                print(f"{name} ({text}) failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return found


def measure(length: int, options: argparse.Namespace, peers: dict[str, Callable[..., Tensor]]) -> list[dict[str, Any]]:
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{length} tokens, {time.monotonic() - begin:.0f} s: {text}", flush=True)

    device = torch.device(options.device)
    shape = Shape(1, options.heads, options.kv_heads, length, options.head_dim, options.dtype)
    problem = make_problem(shape, device, 0, options.inputs)
    name = "cudnn" if device.type == "cuda" else "sdpa"
    exact_call = dense_call(name, problem)
    bench = Bench(problem, exact_call().clone(), Clock(device, problem.query.nbytes * 3))
    say("inputs made")

    dense = bench.probe(Point("dense", exact_call, name))
    dense.facts["density"] = 1.0
    full = bench.of("full", Full())
    curves: dict[str, list[Point]] = {}
    for curve, (method, dials) in SWEEPS.items():
        if not options.methods or curve in options.methods:
            made = (replace(method, **{str(type(method).dial): dial}) for dial in dials)  # type: ignore[type-var]
            curves[curve] = [bench.of(curve, one) for one in made]
            say(f"{curve}: errors {', '.join(f'{p.error:.3g}' for p in curves[curve])}")
    others = peer_points(bench, peers)
    say(f"peers: errors {', '.join(f'{p.error:.3g}' for p in others)}")
    met: dict[str, Point] = {}
    for peer in others:
        matches = [m for c, points in curves.items() if (m := bench.meeting(peer.error, c, points)) is not None]
        for match in sorted(matches, key=lambda p: float(p.facts["once_ms"]))[:KEPT]:
            match.facts["meets"] = f"{peer.curve}, {peer.text}"
            met.setdefault(match.text, match)
    say("dials moved to the peers' errors")

    swept = [full, *(p for points in curves.values() for p in points)]
    known = {p.text for p in swept}
    points = [dense, *others, *swept, *(p for p in met.values() if p.text not in known)]
    runs: dict[tuple[str, int], Callable[[], object]] = {("op", i): p.call for i, p in enumerate(points)}
    for i, p in enumerate(points):
        if p.method is not None:
            runs["select", i] = partial(ours.select, problem, p.method)
    times = time_variants(runs, bench.clock, Effort(options.rounds, options.budget_ms))
    dense_ms = summary(times["op", 0])["median_ms"]
    records = []
    for i, p in enumerate(points):
        record = {"length": length, "curve": p.curve, "variant": p.text, **p.facts, **summary(times["op", i])}
        if p.method is not None:
            record["select_ms"] = summary(times["select", i])["median_ms"]
            record["select_share"] = round(record["select_ms"] / record["median_ms"], 4)
        record["over_dense"] = round(dense_ms / record["median_ms"], 3)
        record |= {name: float(f"{record[name]:.4g}") for name in ("error", "max_error")}
        records.append(record)
    say("timed")
    return records


def comparisons(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each peer's point, our fastest at no greater error."""
    found = []
    for peer in (r for r in records if "default" in r):
        own = [r for r in records if r["length"] == peer["length"] and "select_ms" in r]
        best = min((r for r in own if r["error"] <= peer["error"]), key=lambda r: float(r["median_ms"]), default=None)
        if best is None:
            continue
        kept = ("length", "curve", "variant", "default", "error", "median_ms", "over_dense")
        row = {name: peer[name] for name in kept}
        row |= {"ours": best["variant"], "our_error": best["error"], "our_ms": best["median_ms"]}
        row["our_over_dense"] = best["over_dense"]
        row["times_faster"] = round(peer["median_ms"] / best["median_ms"], 3)
        found.append(row)
    return found


def table(records: list[dict[str, Any]], compared: list[dict[str, Any]]) -> str:
    titles = f"{'error':>8} {'max':>7} {'computed':>8} {'ms':>9} {'range':>17}  x dense  select"
    lines = [f"{'tokens':>7} {'variant':58} {titles}"]
    for r in records:
        share = f"{r['select_share']:7.1%}" if "select_share" in r else ""
        label = r["variant"] if "select_ms" in r else f"{r['curve']}: {r['variant']}"
        spread = f"{r['min_ms']:.2f}-{r['max_ms']:.2f}"
        lines.append(
            f"{r['length']:>7} {label:58.58} {r['error']:8.4f} {r['max_error']:7.3f} {r.get('density', math.nan):8.4f} "
            f"{r['median_ms']:9.3f} {spread:>17} {r['over_dense']:8.2f} {share}"
        )
    for c in compared:
        lines.append(
            f"{c['length']:>7} {c['curve']} {c['variant']}{' (default)' * c['default']}: error {c['error']:.4f}, "
            f"{c['median_ms']:.2f} ms, {c['over_dense']:.2f}x dense; {c['ours']}: error {c['our_error']:.4f}, "
            f"{c['our_ms']:.2f} ms, {c['our_over_dense']:.2f}x dense, {c['times_faster']:.2f} times faster"
        )
    return "\n".join(lines)


def draw(records: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({r["length"] for r in records})
    size = (7.5 * len(lengths), 6)
    figure, panels = pyplot.subplots(1, len(lengths), figsize=size, layout="constrained", squeeze=False)
    for axes, length in zip(panels[0], lengths, strict=True):
        here = [r for r in records if r["length"] == length]
        axes.set_prop_cycle(color=colors())
        for curve in dict.fromkeys(r["curve"] for r in here if r["curve"] not in ("dense", "full")):
            points = sorted((r["median_ms"], r["error"], "default" in r) for r in here if r["curve"] == curve)
            style = {"marker": "*", "markersize": 12, "linestyle": "--"} if points[0][2] else {"marker": "o"}
            axes.plot([p[0] for p in points], [p[1] for p in points], label=curve, **style)
        for r in here:
            if r["curve"] in ("dense", "full"):
                axes.axvline(r["median_ms"], linestyle=":", color="gray" if r["curve"] == "dense" else "black",
                             label=f"{r['variant']}, exact")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="selection and attention, ms", ylabel="error, relative to exact")
        axes.set_title(f"{length // 1024}K tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--methods", nargs="*", help=f"curves; absent: all of {', '.join(SWEEPS)}")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=module:function")
    parser.add_argument("--peer-path", type=Path, help="folder to import peers from")
    parser.add_argument("--inputs", default="structured", choices=["structured", "concentrated"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-ms", type=float, default=60.0, help="for one variant in one round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    options = parser.parse_args()
    if unknown := set(options.methods or ()) - set(SWEEPS):
        parser.error(f"--methods {', '.join(sorted(unknown))}: accepted are {', '.join(SWEEPS)}")
    if options.peer_path:
        sys.path.insert(0, str(options.peer_path.resolve()))
    peers = dict(load_peer(text) for text in options.peer)
    head = machine.describe(torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"))
    records: list[dict[str, Any]] = []
    for length in options.lengths:
        records += measure(length, options, peers)
        compared = comparisons(records)
        if options.out:  # after each length: what was measured is not lost
            content = {"environment": head, "inputs": options.inputs, "comparisons": compared, "records": records}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(table(records, compared))
    if options.plot:
        draw(records, options.plot)


if __name__ == "__main__":
    main()
