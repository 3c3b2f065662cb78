"""Requests without a hint: a router is fitted on a few, then serves others and says which it ran again.

A small Llama that was really trained answers questions whose class nobody names. A cheap prefill is tried first; where
a look at it says that it fell short, the request runs again densely. The router learns from the answers of other
requests, dense, cheap, and under a budget that breaks everything.

python examples/without_hints.py
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparsepass
import sparsepass.measure.auto
from sparsepass.graph import torch_private
from sparsepass.measure import testbed
from sparsepass.measure.auto.collect import collect
from sparsepass.measure.auto.compare import Goal
from sparsepass.measure.auto.fitting import fit_router
from sparsepass.measure.auto.probe import Probe
from sparsepass.measure.auto.records import Records
from sparsepass.measure.tasks.score import score
from sparsepass.measure.tasks.tokens import TOKEN_TASKS
from sparsepass.methods import decode_budget, encode_budget
from sparsepass.policies.rule import Rule

CHEAP = decode_budget("a_shape(window=64, sink=64, block=64, last=2)")
"""Answers three of the four tasks. Chains need rows in between, which it does not compute."""

STRESS = decode_budget("pooled_topk(density=0.35, block=64)")


def fitted(length: int, requests: int) -> sparsepass.measure.auto.Router:
    """A router for one length, from so many requests of each task."""
    model = testbed.load(dtype=torch.float32)
    with Console(stderr=True).status("Collecting: every task, dense, cheap and broken ..."):
        places = collect(model, TOKEN_TASKS, [length], [CHEAP, STRESS], templates=[0], requests=requests, seed=1)
    records = Records(tuple(places), {"probe": asdict(Probe())})
    router, held_out = fit_router(records, encode_budget(CHEAP), Goal(spare=0.05), candidate="recheck", name="example")
    for task, (missed, asked) in held_out.tasks.items():
        print(f"{task}: {missed} of {asked} requests lost that the router was not fitted on")
    return router


def served_model() -> Any:
    """Compiled under a policy with one rule: what a router tries first is cheap, all else dense."""
    torch_private.forget()
    model = testbed.load(dtype=torch.float32)
    policy = sparsepass.Policy("cheap first", (Rule(sparsepass.TaskClass.SINGLE_QA, CHEAP),))
    options = {"sparsepass.policy": policy, "sparsepass.always_sparse": True, "sparsepass.inductor": False}
    model.compile(backend=sparsepass.backend, dynamic=True, options=options)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a request (default: %(default)s)")
    parser.add_argument("--fit", type=int, default=16, help="requests per task to fit on (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=3, help="per task, to be served (default: %(default)s)")
    args = parser.parse_args(argv)

    router = fitted(args.length, args.fit)
    model = served_model()
    attached = sparsepass.measure.auto.attach(model, router)
    table = Table(title=f"Requests of {args.length} tokens without a hint", title_justify="left")
    for name in ("request of", "odds that cheap fell short", "ran again", "answer", "cheap alone"):
        table.add_column(name)
    again = 0
    for task in TOKEN_TASKS:
        for seed in range(args.requests):
            sample = task.draw(args.length, seed)
            found, cheap = (score(model, sample, task_hint=hint, mode="generate") for hint in ("auto", "single_qa"))
            decision = attached.decisions[-1]  # of the first: the second has its hint
            odds = decision.scores[0] - router.threshold
            again += bool(decision.again)
            words = ("right" if one == [1.0] else "wrong" for one in (found, cheap))
            table.add_row(str(task.task_class), f"{odds:+.1f}", "yes" if decision.again else "no", *words)
    Console().print(table)
    total = args.requests * len(TOKEN_TASKS)
    print(f"{again} of {total} requests ran again. The odds are in nats, over the router's threshold.")


if __name__ == "__main__":
    main()
