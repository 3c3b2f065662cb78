"""The main job: a Llama reads real text byte by byte, dense Inductor against sparsepass, by hint and by length.

The architecture is transformers' Llama, the weights are random: times, plans and densities are real, what the model
says is not. The text is the language reference that comes with Python. Run by: make demo
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sparsepass
from sparsepass.measure.models import ModelShape, build_random_model

DENSE_BACKEND = "inductor"
KEPT_LOGITS = 64
"""Positions at the end of the prompt whose logits are compared."""

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One length under one hint. Times in seconds, medians; ``difference``: of the logits, relative to their spread."""

    length: int
    hint: str | None
    report: sparsepass.Report
    dense_seconds: float
    seconds: float
    first_seconds: float
    difference: float

    @property
    def plan(self) -> str:
        text = ", ".join(dict.fromkeys(graph.plan_key for graph in self.report.graphs))
        return re.sub(r"\d\.\d{4,}", lambda number: f"{float(number[0]):.3f}", text)

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds


def text_tokens(length: int) -> torch.Tensor:
    """The first ``length`` bytes of Python's help topics, int64 [1, length]: 450 KB of English are there."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    if length > len(text):
        raise SystemExit(f"--lengths has {length}, but the text has {len(text)} bytes; give a smaller length.")
    return torch.frombuffer(bytearray(text[:length]), dtype=torch.uint8).to(torch.int64)[None]


def build(args: argparse.Namespace) -> Any:
    shape = ModelShape(
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=64,
        hidden=args.hidden,
        vocab=256,
        max_length=max(args.lengths),
    )
    return build_random_model("llama", shape, attn="sdpa", dtype=getattr(torch, args.dtype), device=args.device)


def forward(model: Any) -> Forward:
    """The prefill of ``model`` as a function from ids [1, L] to logits [1, KEPT_LOGITS, 256]."""

    def run(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=KEPT_LOGITS).logits
        return logits

    return run


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall time of one call in seconds, the device's work included, and what it returned."""
    start = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start, result


def measure(args: argparse.Namespace, console: Console) -> list[Run]:
    """Every length under every hint, the dense run of the same length beside it."""
    model = build(args)
    dense = torch.compile(forward(model), backend=DENSE_BACKEND, dynamic=True)
    sparse = torch.compile(forward(model), backend=sparsepass.backend, dynamic=True)
    runs: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    steps = len(args.lengths) * (1 + args.repeats) * (1 + len(args.hints))
    with Progress(*columns, console=console, transient=True) as bar, torch.no_grad():
        job = bar.add_task("", total=steps)

        def step(what: str, run: Callable[[], Any]) -> tuple[float, Any]:
            bar.update(job, description=what)
            result = timed(run, args.device)
            bar.advance(job)
            return result

        for length in sorted(args.lengths):
            ids = text_tokens(length).to(args.device)
            name = f"{length} tokens, dense Inductor"
            _, expected = step(f"{name}: compile", functools.partial(dense, ids))
            dense_seconds = statistics.median(step(name, functools.partial(dense, ids))[0] for _ in range(args.repeats))
            for hint in args.hints:
                name = f"{length} tokens, {hint or 'no hint'}"
                explain = functools.partial(sparsepass.explain, sparse, ids, task=hint)
                first_seconds, report = step(f"{name}: compile", explain)
                outcomes = []
                with sparsepass.task(hint):
                    outcomes = [step(name, functools.partial(sparse, ids)) for _ in range(args.repeats)]
                seconds = statistics.median(outcome[0] for outcome in outcomes)
                got, wanted = outcomes[-1][1].float(), expected.float()
                difference = float((got - wanted).abs().mean() / wanted.std())
                runs.append(Run(length, hint, report, dense_seconds, seconds, first_seconds, difference))
                bar.console.print(f"\n[bold]{length} tokens, {hint or 'no hint'}[/bold]")
                bar.console.print(report.text(width=100), markup=False, highlight=False)
    return runs


def summary(runs: list[Run]) -> Table:
    table = Table(title="Dense Inductor against sparsepass: prefill, seconds per call", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("hint", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for name in ("density", "dense", "sparsepass", "speedup", "first call", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        density = run.report.density_achieved
        table.add_row(
            str(run.length),
            run.hint or "none",
            run.plan,
            "1" if density is None else f"{density:.3f}",
            f"{run.dense_seconds:.2f}",
            f"{run.seconds:.2f}",
            f"{run.speedup:.2f}x",
            f"{run.first_seconds:.1f}",
            f"{run.difference:.1e}",
        )
    table.caption = (
        "density: blocks computed over blocks visible, counted from what ran. first call: with compilation. "
        "difference: mean absolute difference of the logits from dense, relative to their standard deviation. The "
        "weights are random, so it says nothing about answers; it is 0 up to rounding where the plan is dense."
    )
    table.caption_justify = "left"
    return table


def why_dense(runs: list[Run]) -> list[str]:
    """Each distinct reason for which sites stayed dense, with the runs that it holds for."""
    reasons: dict[str, list[str]] = {}
    for run in runs:
        for graph in run.report.graphs:
            for site in graph.sites:
                if site.entry.reason:
                    where = f"{run.length} tokens, {run.hint or 'no hint'}"
                    reasons.setdefault(site.entry.reason.removeprefix("Dense: "), []).append(where)
    return [f"Dense at {'; '.join(dict.fromkeys(where))}: {reason}" for reason, where in reasons.items()]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="prompt tokens (4096 16384)")
    parser.add_argument(
        "--hints", nargs="+", default=["single_qa", "multi_qa"], help="task hints, 'none' for none (single_qa multi_qa)"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8, help="query heads of 64 (8)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads (2)")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1, help="timed calls after the first; the median counts (1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    args = parser.parse_args(argv)
    args.hints = [None if hint == "none" else hint for hint in args.hints]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    console = Console(width=None if Console().is_terminal else 110)
    started = time.perf_counter()
    console.print(
        f"A Llama with {args.layers} layers, {args.heads} query heads, {args.kv_heads} key/value heads of size 64, "
        f"random weights, {args.dtype}, on {args.device} ({torch.get_num_threads()} threads)."
    )
    runs = measure(args, console)
    console.print()
    console.print(summary(runs))
    for reason in why_dense(runs):
        console.print(reason, markup=False, highlight=False)
    console.print(f"{time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
