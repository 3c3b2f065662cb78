"""The guard against wrong hints: all requests come as ``single_qa``, and some are not. Do right answers come back?

A small Llama that was really trained gets three streams of requests, each in a monitor of its own: one fact looked up,
chains of three hops, and the most frequent values of the whole context. Every request says ``single_qa``, which is
right for the first stream alone. The policy's floors, what each layer has to keep of the attention mass, come from
other requests with the right hint. Where a layer keeps less, the monitor runs the requests that follow under a denser
class.

python examples/guard.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sparsepass
from sparsepass.graph import torch_private
from sparsepass.measure import testbed
from sparsepass.measure.calibrate.floors import MARGIN
from sparsepass.measure.tasks.base import Sample
from sparsepass.measure.tasks.score import answer
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from sparsepass.policies.rule import Ranges, Rule

HINT = "single_qa"
STREAMS = ("token_needle", "token_chains", "token_frequent")
BUDGET = sparsepass.Budget("vertical_slash", {"density": 0.4, "block": 64})
"""Single columns by the last queries: enough for one fact or four, too little to count or to follow a chain."""
CALIBRATION = 1 << 20
"""Seeds of the requests that the floors come from begin here."""


@dataclass(frozen=True)
class Served:
    """One request under the guard, and the same without it and dense."""

    task: TokenTask
    ran_under: str
    kept: dict[int, float]
    """Attention mass by layer; empty where everything is kept."""
    raised_to: str | None
    right: bool
    again: bool
    """Whether it is right once it is repeated where the hint was raised after it."""
    unguarded: bool
    dense: bool


def make_policy(floors: dict[int, float]) -> sparsepass.Policy:
    """Lookups sparse, each layer with its floor; every other class dense."""
    task = sparsepass.TaskClass(HINT)
    layers = [Rule(task, BUDGET, layers=Ranges(((layer, layer),)), floor=floor) for layer, floor in floors.items()]
    return sparsepass.Policy("guarded", (Rule(task, BUDGET), *layers))  # the last that holds wins


def use(model: Any, policy: sparsepass.Policy) -> None:
    torch_private.forget()
    options = {"sparsepass.policy": policy, "sparsepass.always_sparse": True, "sparsepass.inductor": False}
    model.compile(backend=sparsepass.backend, options=options)


def right(model: Any, sample: Sample, hint: str = HINT) -> bool:
    return answer(model, sample, task_hint=hint, mode="forced") == [sample.questions[0].answer]


def find_floors(model: Any, length: int, requests: int) -> dict[int, float]:
    """By layer: a part of the least that it kept in any of some requests whose hint is right."""
    use(model, make_policy({}))
    with sparsepass.monitor() as watched:
        for seed in range(requests):
            right(model, TOKEN_TASKS[0].draw(length, CALIBRATION + seed))
    return {layer.layer: MARGIN * layer.least for layer in watched.report().layers if layer.layer is not None}


def serve(model: Any, samples: Sequence[tuple[TokenTask, Sample]]) -> list[Served]:
    """A stream of requests, all with the same hint, under one monitor; each also without it and dense."""
    served = []
    watched = sparsepass.monitor()
    for task, sample in samples:
        with watched:
            before, under = watched.report(), watched.raised.get(sparsepass.TaskClass(HINT), HINT)
            good = right(model, sample)
            raised = watched.raised.get(sparsepass.TaskClass(HINT), HINT)
            kept = kept_between(before, watched.report())
            again = right(model, sample) if raised != under else good
        alone = good if under == HINT else right(model, sample)  # the same computation, until the hint is raised
        dense = right(model, sample, "dense")
        to = str(raised) if raised != under else None
        served.append(Served(task, str(under), kept, to, good, again, alone, dense))
    return served


def kept_between(before: sparsepass.MassReport, after: sparsepass.MassReport) -> dict[int, float]:
    """Mass kept by layer in the calls between two reports."""
    seen = {(one.used, one.layer): (one.mean * one.rows, one.rows) for one in before.layers}
    kept: dict[int, float] = {}
    for one in after.layers:
        total, rows = seen.get((one.used, one.layer), (0.0, 0))
        if one.rows > rows and one.layer is not None:
            kept[one.layer] = (one.mean * one.rows - total) / (one.rows - rows)
    return kept


def log_table(served: Sequence[Served], floors: dict[int, float]) -> Table:
    found = Table(title=f"Requests in their order, all with the hint {HINT}", title_justify="left")
    for name in (
        "request of",
        "ran under",
        "mass kept / floor",
        "raised to",
        "guarded",
        "repeated",
        "unguarded",
        "dense",
    ):
        found.add_column(name, no_wrap=True)
    for one in served:
        where = min(one.kept, key=lambda layer: one.kept[layer] / floors[layer], default=None)
        mass = "all" if where is None else f"{one.kept[where]:.3f} / {floors[where]:.3f}, layer {where}"
        repeated = said(one.again) if one.raised_to else ""
        answers = (said(one.right), repeated, said(one.unguarded), said(one.dense))
        found.add_row(str(one.task.task_class), one.ran_under, mass, one.raised_to or "", *answers)
    found.caption = (
        "Mass kept: of the layer nearest to its floor. Repeated: the same request once more, after the raise."
    )
    found.caption_justify = "left"
    return found


def said(good: bool) -> str:
    return "[green]right[/green]" if good else "[red]wrong[/red]"


def summary(served: Sequence[Served]) -> Table:
    found = Table(title="Right answers", title_justify="left")
    for name in ("requests of", "unguarded", "guarded", "with repeats", "dense", "raised after request"):
        found.add_column(name, justify="right" if name not in ("requests of",) else "left")
    for kind in dict.fromkeys(str(one.task.task_class) for one in served):
        mine = [one for one in served if str(one.task.task_class) == kind]
        shares = [
            sum(getattr(one, arm) for one in mine) / len(mine) for arm in ("unguarded", "right", "again", "dense")
        ]
        raises = [str(number) for number, one in enumerate(mine, 1) if one.raised_to] or ["none"]
        found.add_row(kind, *(f"{share:.2f}" for share in shares), ", ".join(raises))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a request (1024)")
    parser.add_argument("--requests", type=int, default=8, help="per stream (8)")
    parser.add_argument("--calibrate", type=int, default=8, help="requests that the floors come from (8)")
    args = parser.parse_args(argv)
    started, console = time.perf_counter(), Console(width=None if Console().is_terminal else 120)

    model = testbed.load(dtype=torch.float32)
    tasks = [task for task in TOKEN_TASKS if task.name in STREAMS]
    served: list[Served] = []
    with Progress(console=console, transient=True) as bar, torch.no_grad():
        job = bar.add_task("Floors", total=1 + len(tasks))
        floors = find_floors(model, args.length, args.calibrate)
        use(model, make_policy(floors))
        for task in tasks:
            bar.update(job, advance=1, description=str(task.task_class))
            served += serve(model, [(task, task.draw(args.length, seed)) for seed in range(args.requests)])
    console.print(log_table(served, floors))
    console.print(summary(served))
    lookups = [one for one in served if one.task.name == STREAMS[0]]
    false = sum(one.raised_to is not None for one in lookups)
    console.print(f"False alarms: {false} of {len(lookups)} requests whose hint was right were escalated.")
    console.print(f"{BUDGET.method} {dict(BUDGET.params)}; {time.perf_counter() - started:.0f} s.", markup=False)


if __name__ == "__main__":
    main()
