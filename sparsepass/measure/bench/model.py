"""``bench model``: prefill of a random or local model, eager, with Inductor and with sparsepass under task hints."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sparsepass
from sparsepass.measure.bench.kernel import check_baselines
from sparsepass.measure.bench.options import ModelOptions
from sparsepass.measure.bench.problem import DTYPES
from sparsepass.measure.bench.progress import Reporter
from sparsepass.measure.bench.result import Record, Result, add_speedups
from sparsepass.measure.bench.timing import Clock, Effort, summary, time_variants
from sparsepass.measure.bench.trial import first_line
from sparsepass.measure.models import ModelShape, build_random_model, load_model
from sparsepass.request.hints import resolve_hint
from sparsepass.rewriting.record import recording
from sparsepass.warmup import random_inputs

PRESETS = {
    "tiny": ModelShape(layers=2, heads=4, kv_heads=2, head_dim=32, hidden=128, vocab=128),
    "small": ModelShape(layers=4, heads=8, kv_heads=2, head_dim=64, hidden=512, vocab=256),
    "llama-8b": ModelShape(
        layers=32, heads=32, kv_heads=8, head_dim=128, hidden=4096, vocab=128256, intermediate=14336
    ),
}
NO_HINT = "no hint"
DENSE = ("eager", "inductor")
CLOSE = {"bf16": 0.05, "fp16": 0.02, "fp32": 1e-3}
"""Relative difference of logits that two dense runs of a model may have."""


def lengths_of(options: ModelOptions, device: torch.device) -> tuple[int, ...]:
    """Prompt lengths, in tokens."""
    return options.lengths or ((4096, 32768) if device.type == "cuda" else (1024, 4096))


def run(options: ModelOptions, device: torch.device, result: Result, reporter: Reporter) -> Result:
    """Measures. Raises ``OptionError``, ``HintError`` or ``ModelError``."""
    check_baselines(options.baselines, DENSE)
    for hint in options.hints:
        if hint != NO_HINT:
            resolve_hint(hint)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    lengths = lengths_of(options, device)
    if options.model is not None:
        model = load_model(str(options.model), attn="sdpa", dtype=DTYPES[dtype], device=str(device))
    else:
        shape = PRESETS[options.preset].longest(max(lengths))
        model = build_random_model(options.arch, shape, attn="sdpa", dtype=DTYPES[dtype], device=str(device))
    start = time.monotonic()
    for length in sorted(lengths):
        if options.time_limit and time.monotonic() - start > options.time_limit:
            result.notes.append(f"The time limit of {options.time_limit:g} s was reached before {length} tokens.")
            break
        reporter.problem(f"{length} tokens")
        base: Record = {"batch": options.batch, "length": length, "dtype": dtype}
        result.records += _one_length(options, model, base, device, reporter)
        add_speedups(result.records)
        if options.out is not None:
            result.save(options.out)
    return result


def _one_length(
    options: ModelOptions, model: Any, base: Record, device: torch.device, reporter: Reporter
) -> list[Record]:
    inputs = random_inputs(model, length=base["length"], batch=options.batch)
    names = [name for name in options.baselines if name != "none"] + [f"sparsepass, {hint}" for hint in options.hints]
    torch.compiler.reset()
    records: dict[str, Record] = {}
    runs: dict[str, Callable[[], Tensor]] = {}
    wanted: Tensor | None = None
    reporter.steps("first calls", len(names))
    for name in names:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        record = records[name] = {"variant": name, "does": "dense" if name in DENSE else "model", **base}
        call = _variant(model, name, inputs)
        begun = time.perf_counter()
        try:
            with recording() as held:
                logits = call().float().cpu()
        except torch.OutOfMemoryError as error:
            record["failed"] = f"out of memory: {first_line(error)}"
            continue
        finally:
            reporter.advance()
        record["first_call_s"] = round(time.perf_counter() - begun, 3)
        if device.type == "cuda":
            record["peak_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        if name not in DENSE:
            record["plans"] = [graph.key for graph in held.compiled]
        wanted = logits if wanted is None else wanted
        record["error"] = float(f"{float((logits - wanted).norm() / wanted.norm()):.3g}")
        # Sparse budgets change the result, on random weights in a way that says little: only dense runs are judged.
        exact = name in DENSE or all(plan == "dense" for plan in record.get("plans", ()))
        record["correct"] = bool(torch.isfinite(logits).all()) and not (
            exact and record["error"] > CLOSE[base["dtype"]]
        )
        if record["correct"]:
            runs[name] = call
        else:
            record["why"] = f"logits differ from those of {names[0]} by {record['error']}"
    reporter.steps("timing", len(runs) * options.rounds)
    effort = Effort(options.rounds, options.budget_ms, options.seed)
    for name, rounds in time_variants(runs, Clock(device, 1 << 40), effort, reporter.advance).items():
        records[name] |= summary(rounds)
    return list(records.values())


def _variant(model: Any, name: str, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    compiled = model
    if name == "inductor":
        compiled = torch.compile(model, dynamic=False)
    elif name != "eager":
        compiled = torch.compile(model, backend=sparsepass.backend, dynamic=False)
    hint = name.removeprefix("sparsepass, ") if name not in DENSE else NO_HINT

    def run() -> Tensor:
        with torch.no_grad(), sparsepass.task(None if hint == NO_HINT else hint):
            logits: Tensor = compiled(**inputs, logits_to_keep=1).logits
            return logits

    return run
