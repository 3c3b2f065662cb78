"""What sparsepass costs beside the kernels: compile time against Inductor's, the pass alone, and the guard per call.

    python docs/measurements/overhead.py --layers 32 --rounds 2 --out docs/measurements/overhead_h200.json

Compile time is that of the first call with every cache off, on a narrow Llama of ``--layers`` layers; Inductor and
sparsepass (sparse plan, and all dense) take turns. The first round warms up the process and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import timeit
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import sparsepass
from sparsepass.planning.plan import Settings, plan_graph
from sparsepass.policies.policy import Policy, Rule
from sparsepass.reports.explain import versions
from sparsepass.sites import find_sites
from sparsepass.types import Budget

HALF = Policy(name="half", rules=(Rule(task=None, budget=Budget("pooled_topk", {"density": 0.5})),))
LENGTH = 2048


def model(layers: int, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        attn_implementation="sdpa",
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return LlamaForCausalLM(config).eval().to(device, dtype)


def first_call(built: Any, name: str, device: str) -> float:
    torch._dynamo.reset()
    options = {"sparsepass.always_sparse": True, "sparsepass.policy": HALF}
    if name == "inductor":
        fn = torch.compile(built, dynamic=False)
    else:
        fn = torch.compile(built, backend=sparsepass.backend, dynamic=False, options=options)
    ids = torch.randint(1, 512, (1, LENGTH), device=device)
    started = time.perf_counter()
    with torch.no_grad(), sparsepass.task("single_qa" if name == "sparse" else "dense"):
        fn(ids, use_cache=False)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def pass_alone(built: Any, device: str) -> dict[str, float]:
    """Seconds of finding the sites (matching, masks) and of planning them, on the captured graph."""
    taken: dict[str, float] = {}

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        started = time.perf_counter()
        findings = find_sites(gm.graph)
        found = time.perf_counter()
        plan_graph(findings, Settings(policy=HALF, always_sparse=True))
        taken.update(find_s=found - started, plan_s=time.perf_counter() - found, nodes=float(len(gm.graph.nodes)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(built, backend=backend, dynamic=False)(
            torch.randint(1, 512, (1, LENGTH), device=device), use_cache=False
        )
    return taken


def guard_cost() -> dict[str, float]:
    """Microseconds a call of a tiny compiled function takes with the hint guard and our wrapper, and without."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 1, 2, 16)
    quiet = {"sparsepass.inductor": False, "sparsepass.always_sparse": True, "sparsepass.task": "dense"}
    calls: dict[str, Any] = {}
    torch._dynamo.reset()
    with torch.no_grad():
        for name, policy in (("guarded", HALF), ("unguarded", Policy(name="dense"))):

            def own(x: torch.Tensor) -> torch.Tensor:  # a code object each: one's guards are not tried for the other
                return attend(x)

            own.__code__ = own.__code__.replace(co_name=name)
            calls[name] = torch.compile(own, backend=sparsepass.backend, options={**quiet, "sparsepass.policy": policy})
            calls[name](x)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(200):
            for name, fn in calls.items():
                taken[name].append(timeit.timeit(lambda fn=fn: fn(x), number=500) / 500 * 1e6)
    best = {name: min(times) for name, times in taken.items()}
    key = next(reversed(sparsepass.plan_keys))
    lookup = min(timeit.repeat(sparsepass.plan_keys[key], number=10000, repeat=20)) / 10000 * 1e6
    return {**best, "difference": best["guarded"] - best["unguarded"], "resolving the plan": lookup}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    built = model(chosen.layers, chosen.device)
    times: dict[str, list[float]] = {"inductor": [], "sparse": [], "dense": []}
    for round_index in range(chosen.rounds + 1):
        for name, taken in times.items():
            seconds = first_call(built, name, chosen.device)
            if round_index:
                taken.append(seconds)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    found = {
        "hardware": torch.cuda.get_device_name() if chosen.device == "cuda" else platform.processor() or "cpu",
        "versions": versions(),
        "command": f"python docs/measurements/overhead.py --layers {chosen.layers} --rounds {chosen.rounds}",
        "compile_s": times,
        "over_inductor": {name: medians[name] / medians["inductor"] for name in ("sparse", "dense")},
        "pass": pass_alone(built, chosen.device),
        "guard_us": guard_cost(),
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("figure", "value", title=f"{chosen.layers} layers, {found['hardware']}")
    for name, seconds in medians.items():
        table.add_row(f"first call, {name}", f"{seconds:.2f} s ({seconds / medians['inductor']:.2f}x)")
    for name, seconds in found["pass"].items():
        table.add_row(name, f"{seconds:.3f}")
    for name, micros in found["guard_us"].items():
        table.add_row(f"a call, {name}", f"{micros:.2f} us")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
