"""Many threads serve while another compiles without end: how many calls ran a budget that is not their hint's?

    python docs/measurements/guard_threads.py --calls 100000

Prints what was wrong, and exits with 1 if anything was. Calls are made under ``with``, by decorated functions, in
asyncio tasks with ``to_thread``, and under ``task("auto")`` with a bound. The served function is compiled first, since
threads that miss the same graph at once each compile it: Dynamo then reaches its limit and runs the function dense.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sparsepass
from sparsepass.graph import torch_private
from tests.planning.guard_calls import (
    HINTS,
    LENGTHS,
    attend,
    budgets_of,
    budgets_run,
    expected,
    inputs,
    options,
    spying,
)


def decorated(fn: Any, task: str, length: int) -> list[str]:
    run = sparsepass.task(task)(fn)
    return budgets_run(run, length, None)


def in_asyncio(fn: Any, task: str, length: int) -> list[str]:
    async def request() -> list[str]:
        with sparsepass.task(task):
            return await asyncio.to_thread(budgets_run, fn, length, None)

    return asyncio.run(request())


def under_auto(fn: Any, task: str, length: int) -> list[str]:
    x = inputs(length)

    def call() -> None:
        with torch.no_grad(), sparsepass.task("auto", at_most=task):
            fn(x)

    return budgets_of(call)


def one_call(fn: Any, draw: random.Random) -> tuple[str, list[str], list[str]]:
    """A random call: in words, what ran, and what should have."""
    task, length, kind = draw.choice(HINTS), draw.choice(LENGTHS), draw.random()
    ways = {"decorated": decorated, "asyncio": in_asyncio, "auto": under_auto}
    name = "with" if task is None or kind < 0.9 else draw.choice(list(ways))
    if name == "with" or task is None:
        ran = budgets_run(fn, length, task, batch=draw.choice([1, 2]))
    else:
        ran = ways[name](fn, task, length)
    return f"{name}, hint {task}, {length} tokens", ran, expected(task, length)


def compile_until(done: threading.Event) -> None:
    """Compile new functions without end, half of them with a hint inside."""
    number = 0
    while not done.is_set():
        number += 1
        inside = "single_qa" if number % 2 else None

        def fresh(x: torch.Tensor, inside: str | None = inside) -> torch.Tensor:
            if inside is None:
                return F.scaled_dot_product_attention(x, x, x, is_causal=True) + 1
            with sparsepass.task(inside):
                return F.scaled_dot_product_attention(x, x, x, is_causal=True) + 1

        torch._dynamo.reset_code(fresh.__code__)
        compiled = torch.compile(fresh, backend=sparsepass.backend, options=options())
        ran = budgets_run(compiled, 200, "multi_hop")
        if ran != expected(inside or "multi_hop", 200, sites=1):
            raise SystemExit(f"the compiling thread ran {ran}")
        done.wait(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=True, options=options())
    wrong: collections.Counter[str] = collections.Counter()
    done, lock, made = threading.Event(), threading.Lock(), [0]

    def serve(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(given.calls // given.threads):
            try:
                words, ran, should = one_call(fn, draw)
                found = "" if ran == should else f"{words}: ran {ran}"
            except Exception as error:  # every one is a finding
                found = f"{type(error).__name__}: {str(error)[:100]}"
            with lock:
                made[0] += 1
                wrong.update([found] if found else [])

    for length in LENGTHS:
        for task in HINTS:
            for batch in (1, 2):
                budgets_run(fn, length, task, batch)
    started, before = time.time(), torch_private.compile_count()
    compiling = threading.Thread(target=compile_until, args=(done,))
    serving = [threading.Thread(target=serve, args=(seed,)) for seed in range(given.threads)]
    with spying():
        for thread in [compiling, *serving]:
            thread.start()
        for thread in serving:
            thread.join()
        alive = compiling.is_alive()
        done.set()
        compiling.join()
    graphs = torch_private.compile_count() - before
    print(f"{made[0]} calls on {given.threads} threads, {graphs} graphs compiled meanwhile,", end=" ")
    print(f"{time.time() - started:.0f} s: {wrong.total()} wrong; the compiling thread {'lived' if alive else 'DIED'}")
    for text, count in wrong.most_common(10):
        print(f"  {count} x {text}")
    return 1 if wrong or not alive else 0


if __name__ == "__main__":
    sys.exit(main())
