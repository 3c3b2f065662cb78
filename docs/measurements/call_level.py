"""What a warm call takes after many compilations in one process, by parts, and the process's memory.

    python docs/measurements/call_level.py --compile lengths --fixed-order

``--compile``: ``functions`` compiles other functions, ``policies`` the served one under other policies, ``lengths``
the served one for other lengths and hints, ``resets`` drops everything and begins anew, ``mixed`` takes turns. Columns,
in microseconds: ``oldest`` and ``newest`` are whole calls by the first and the last graph of the served function;
``graph`` is our wrapper with the graph in it, ``wrapper`` our part of that, ``sizes`` its check of sizes; ``plan key``
one hint guard, ``backend ==`` what Dynamo compares per graph of another ``torch.compile``. ``graphs``: how many Dynamo
holds for the code. ``gc`` is one whole collection, in milliseconds; ``memory`` is resident, in MiB.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import sparsepass
from sparsepass.graph import torch_private
from sparsepass.rewriting import record
from tests.planning.guard_calls import DENSITIES, attend, inputs, options, policy

HINT, LENGTH = "multi_hop", 200


def compiled(fn: Any, share: float = 1.0) -> Any:
    chosen = options(**{"sparsepass.policy": policy(share)})
    return torch.compile(fn, backend=sparsepass.backend, dynamic=False, options=chosen)


def call(fn: Any, hint: str = HINT, length: int = LENGTH) -> None:
    with torch.no_grad(), sparsepass.task(hint):
        fn(inputs(length))


def another(number: int) -> Any:
    """A function with a code of its own."""
    source = f"def other(x):\n    return F.scaled_dot_product_attention(x, x + {number}, x, is_causal=True)"
    names: dict[str, Any] = {"F": F}
    exec(compile(source, f"<other {number}>", "exec"), names)
    return names["other"]


class Process:
    """One served function, and what is compiled beside it."""

    def __init__(self, kinds: list[str]) -> None:
        self.served = compiled(attend)
        self.newest: tuple[Any, str, int] = (self.served, HINT, LENGTH)
        self.kinds, self.numbers = itertools.cycle(kinds), itertools.count(1)
        self.begin()

    def begin(self) -> None:
        with record.recording() as recorded:
            call(self.served)
        self.graph = recorded.ran[0]
        self.newest = (self.served, HINT, LENGTH)

    def grow(self) -> None:
        """Compile one to three graphs more."""
        number, kind = next(self.numbers), next(self.kinds)
        if kind == "functions":
            fn = compiled(another(number))
            for hint in list(DENSITIES)[:3]:
                call(fn, hint)
        elif kind == "policies":
            self.newest = (compiled(attend, 1 - number / 1000), HINT, LENGTH)
            call(*self.newest)
        elif kind == "lengths":
            self.newest = (self.served, list(DENSITIES)[number % len(DENSITIES)], LENGTH + 1 + number // len(DENSITIES))
            call(*self.newest)
        else:
            torch_private.forget()
            self.begin()

    def measured(self) -> dict[str, float]:
        x, args = inputs(LENGTH), (inputs(LENGTH),)
        served, hint, length = self.newest
        last = inputs(length)
        with torch.no_grad(), sparsepass.task(hint):
            newest = micros(lambda: served(last))
        with torch.no_grad(), sparsepass.task(HINT):
            oldest, whole = micros(lambda: self.served(x)), micros(lambda: self.graph(*args))
            inner = micros(lambda: self.graph.compiled(*args))
            sizes, wanted = self.graph._sizes, self.graph._wanted
            assert sizes is not None  # it is sparse
            assert wanted is not None
            parts = {"sizes": micros(lambda: sizes.other(args)), "plan key": micros(wanted)}
        one, two = policy(), policy()
        started = time.perf_counter()
        gc.collect()
        return {
            "graphs": len(torch_private.graphs_of(attend)),
            "oldest": oldest,
            "newest": newest,
            "graph": whole,
            "wrapper": whole - inner,
            **parts,
            "backend ==": micros(lambda: one == two),
            "gc": (time.perf_counter() - started) * 1e3,
            "memory": resident(),
        }


def micros(fn: Callable[[], Any], repeat: int = 30) -> float:
    """Microseconds a call takes, the median; collections of garbage, which come now and then, apart."""
    for _ in range(3):
        fn()
    number = max(1, int(2e-4 / max(1e-9, timeit.timeit(fn, number=1))))
    return statistics.median(timeit.repeat(fn, number=number, repeat=repeat)) / number * 1e6


def resident() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["functions", "policies", "lengths", "resets"]
    parser.add_argument("--compile", choices=[*kinds, "mixed"], default="lengths")
    parser.add_argument("--at", type=int, nargs="+", default=[0, 50, 100, 200, 300], help="compilations")
    parser.add_argument("--fixed-order", action="store_true", help="as once a second thread has compiled")
    chosen = parser.parse_args()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10000
    if chosen.fixed_order:
        torch_private._keep_order_of_graphs()
    process = Process(kinds if chosen.compile == "mixed" else [chosen.compile])
    table = Table(title=f"{chosen.compile}, order {'fixed' if chosen.fixed_order else 'by use'}")
    before = torch_private.compile_count()
    for index, mark in enumerate(sorted(chosen.at)):
        while torch_private.compile_count() - before < mark:
            process.grow()
        found = process.measured()
        if not index:
            for name in ("compiled", *found):
                table.add_column(name, justify="right")
        table.add_row(str(torch_private.compile_count() - before), *(f"{figure:.4g}" for figure in found.values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
