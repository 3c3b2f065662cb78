"""Prefill of a random Llama, end to end: eager SDPA, Inductor, sparsepass by hint. Writes JSON, prints a table.

    python docs/measurements/end_to_end.py --preset llama-8b --lengths 4096,32768 --out end_to_end_h200.json
    python docs/measurements/end_to_end.py --preset cpu --lengths 1024,4096,16384 --device cpu --out end_to_end_cpu.json

Inductor's caches are off, so that first calls are cold compiles; variants are timed in shuffled rounds,
and the logits of each are compared with eager's (on random weights, which says little of sparse budgets).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch
from rich.console import Console
from rich.table import Table

import sparsepass
from sparsepass.reports.explain import versions

PRESETS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "cpu": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 32768,
    },
}
VARIANTS: dict[str, str | None] = {
    "eager": None,
    "inductor": None,
    "no hint": None,
    "dense": "dense",
    "single_qa": "single_qa",
}


def build(preset: str, device: str, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**PRESETS[preset], attn_implementation="sdpa")).eval()
    finally:
        torch.set_default_dtype(before)


def variant(model: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    compiled = model
    if name == "inductor":
        compiled = torch.compile(model, dynamic=False)
    elif name != "eager":
        compiled = torch.compile(model, backend=sparsepass.backend, dynamic=False)

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), sparsepass.task(VARIANTS[name]):
            logits: torch.Tensor = compiled(ids, use_cache=False, logits_to_keep=1).logits
            return logits

    return run


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(fn: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, device: str) -> tuple[float, torch.Tensor]:
    synchronize(device)
    started = time.perf_counter()
    out = fn(ids)
    synchronize(device)
    return time.perf_counter() - started, out


ENOUGH_S, MOST_ROUNDS = 10.0, 25
"""Short calls are noisy: rounds go on past the wanted number until one of these is reached."""


def measure(model: Any, length: int, names: list[str], rounds: int, device: str, vocab: int) -> list[dict[str, Any]]:
    ids = torch.randint(1, vocab, (1, length), device=device)
    records: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    wanted: torch.Tensor | None = None
    torch._dynamo.reset()
    for name in names:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        runs[name] = variant(model, name)
        record: dict[str, Any] = {"length": length, "variant": name}
        records[name] = record
        try:
            with sparsepass_recording() as recording:
                record["first_call_s"], out = timed(runs[name], ids, device)
        except torch.cuda.OutOfMemoryError as error:
            record["error"] = f"out of memory: {str(error).splitlines()[0]}"
            del runs[name]
            continue
        if device == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if name not in ("eager", "inductor"):
            record["plans"] = [graph.key for graph in recording.compiled]
        wanted = out if wanted is None else wanted
        scale = wanted.float().norm()
        record["relative_difference"] = float((out.float() - wanted.float()).norm() / scale)
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = time.perf_counter()
    done = 0
    while done < rounds or (done < MOST_ROUNDS and time.perf_counter() - first < ENOUGH_S):
        done += 1
        for name in random.sample(sorted(runs), len(runs)):
            times[name].append(timed(runs[name], ids, device)[0])
    for name, taken in times.items():
        records[name]["median_s"] = statistics.median(taken)
        records[name]["range_s"] = [min(taken), max(taken)]
    return list(records.values())


def sparsepass_recording() -> Any:
    from sparsepass.rewriting.record import recording

    return recording()


def table(records: list[dict[str, Any]]) -> Table:
    shown = Table(
        "length", "variant", "median s", "range s", "over eager", "over inductor", "first call s", "peak GiB", "plan"
    )
    by = {(record["length"], record["variant"]): record.get("median_s") for record in records}

    def ratio(record: dict[str, Any], other: str) -> str:
        base, own = by.get((record["length"], other)), record.get("median_s")
        return f"{base / own:.2f}x" if base and own else "-"

    for record in records:
        if "error" in record:
            shown.add_row(str(record["length"]), record["variant"], record["error"][:40], *["-"] * 6)
            continue
        low, high = record["range_s"]
        shown.add_row(
            str(record["length"]),
            record["variant"],
            f"{record['median_s']:.4f}",
            f"{low:.4f}-{high:.4f}",
            ratio(record, "eager"),
            ratio(record, "inductor"),
            f"{record['first_call_s']:.1f}",
            f"{record.get('peak_gib', 0):.1f}",
            "; ".join(record.get("plans", [])),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    model = build(chosen.preset, chosen.device, torch.bfloat16 if chosen.device == "cuda" else torch.float32)
    records: list[dict[str, Any]] = []
    for length in (int(text) for text in chosen.lengths.split(",")):
        names = chosen.variants.split(",")
        records += measure(model, length, names, chosen.rounds, chosen.device, PRESETS[chosen.preset]["vocab_size"])
        if chosen.out:
            hardware = torch.cuda.get_device_name() if chosen.device == "cuda" else platform.processor() or "cpu"
            header = {"hardware": hardware, "threads": torch.get_num_threads(), "versions": versions()}
            command = "python docs/measurements/end_to_end.py " + " ".join(
                f"--{key} {value}" for key, value in vars(chosen).items() if key != "out"
            )
            chosen.out.write_text(json.dumps({**header, "command": command, "records": records}, indent=1) + "\n")
    Console(width=180).print(table(records))


if __name__ == "__main__":
    main()
