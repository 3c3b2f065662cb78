"""``sparsepass auto``: collect signals, fit a router, compare what could decide."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError, close_names, shown
from sparsepass.host.files import json_text, write_json
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.options import check_paths, option

_ASKED, _SAFE, _RUN, _OUTPUT = "Model and requests", "What is safe", "Run", "Output"

CHEAP = "a_shape(window=64, sink=64, block=64, last=2)"
"""First and last tokens and what is near: what the testbed answers three of its four tasks under."""

STRESS = ("pooled_topk(density=0.35, block=64)",)
"""Breaks every task of the testbed: it teaches what falling short looks like, whatever was asked."""


@dataclass(frozen=True)
class CollectOptions:
    """``sparsepass auto collect``."""

    records: Path | None = option(None, "JSON file of the records, to be written.", _OUTPUT, use="write")
    testbed: str = option("small", "Size of the testbed.", _ASKED)
    tasks: tuple[str, ...] = option((), "Tasks on token ids by name; default: one of each class.", _ASKED)
    lengths: tuple[int, ...] = option((1024, 2048, 4096, 8192), "Tokens of context, question and answer.", _ASKED)
    requests: int = option(160, "Per task, template and length.", _ASKED)
    templates: tuple[int, ...] = option((0, 1), "Of the question; the first is fitted on.", _ASKED)
    cheap: str = option(CHEAP, "Budget that is tried first, in full.", _SAFE)
    stress: tuple[str, ...] = option(STRESS, "Budgets that fail, to learn from, in full.", _SAFE)
    policy: Path | None = option(
        None,
        "Policy file: what runs again gets what it gives requests without a hint; default: dense.",
        _SAFE,
        use="read",
    )
    rows: int = option(20, "Rows that a recheck runs again; 0: no recheck.", _SAFE)
    device: str = option("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one.", _RUN)
    dtype: str = option("", "Default: bf16 on a GPU, fp32 on the CPU.", _RUN, choices=("", "bf16", "fp16", "fp32"))
    threads: int = option(0, "CPU threads; 0 leaves them as they are.", _RUN)
    seed: int = option(0, "Of the requests.", _RUN)
    time_limit: float = option(0.0, "Seconds after which nothing more is begun; 0: none.", _RUN)


@dataclass(frozen=True)
class FitOptions:
    """``sparsepass auto fit``."""

    records: Path | None = option(None, "What `sparsepass auto collect` wrote.", _ASKED, use="read")
    cheap: str = option("", "Budget that is tried first; default: the records' first.", _SAFE)
    reads: str = option("router", "Signals that the router reads, by the name of a row of compare.", _SAFE)
    loss: float = option(0.01, "Share of the dense accuracy that may be lost.", _SAFE)
    confidence: float = option(0.95, "Of the bounds.", _SAFE)
    spare: float = option(0.015, "Share of a cell's requests that may run again for nothing.", _SAFE)
    name: str = option("fitted", "Of the router.", _OUTPUT)
    out: Path | None = option(None, "Router file.", _OUTPUT, use="write")


@dataclass(frozen=True)
class CompareOptions:
    """``sparsepass auto compare``."""

    records: Path | None = option(None, "What `sparsepass auto collect` wrote.", _ASKED, use="read")
    cheap: str = option("", "Budget that is tried first; default: the records' first.", _SAFE)
    loss: float = option(0.01, "Share of the dense accuracy that may be lost.", _SAFE)
    confidence: float = option(0.95, "Of the bounds.", _SAFE)
    spare: float = option(0.015, "Share of a cell's requests that may run again for nothing.", _SAFE)
    resamples: int = option(200, "Of the requests, for the intervals.", _RUN)
    out: Path | None = option(None, "JSON file.", _OUTPUT, use="write")
    plot: Path | None = option(None, "Picture (PNG).", _OUTPUT, use="picture")
    markdown: Path | None = option(None, "Document whose table is replaced by this one.", _OUTPUT, use="write")
    as_json: bool = option(False, "JSON on stdout, no tables.", _OUTPUT)


def collect(options: CollectOptions) -> int:
    """Runs the testbed and writes the records."""
    from sparsepass.measure.auto.collect import collect as run
    from sparsepass.measure.auto.probe import Probe
    from sparsepass.measure.auto.records import Records
    from sparsepass.measure.bench.options import Machine
    from sparsepass.measure.bench.problem import DTYPES
    from sparsepass.measure.bench.trial import device_of
    from sparsepass.measure.tasks.tokens import TOKEN_TASKS
    from sparsepass.measure.testbed import load
    from sparsepass.methods import decode_budget
    from sparsepass.policies.fingerprint import fingerprint
    from sparsepass.policies.policy import Policy

    if options.records is None:
        raise OptionError("--records FILE is missing: where to write what is collected.")
    check_paths(options)
    known = {task.name: task for task in TOKEN_TASKS}
    for name in options.tasks:
        if name not in known:
            raise OptionError(f"--tasks {shown(name)} is not known. {close_names(name, known)}")
    device = device_of(Machine(device=options.device, threads=options.threads))
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    model = load(options.testbed, dtype=dtype, device=str(device))
    settings = Probe(options.rows)
    about = {**fingerprint(model), "probe": asdict(settings), "requests": options.requests}

    started = time.monotonic()

    def done(place: Any) -> None:
        right = sum(place.right) / len(place.right)
        print(
            f"{time.monotonic() - started:6.1f} s {place.task} template {place.template} {place.length} "
            f"{place.budget}: density {place.density:.3f}, right {right:.3f}",
            file=sys.stderr,
            flush=True,
        )

    places = run(
        model,
        [known[name] for name in options.tasks or known],
        options.lengths,
        [decode_budget(text) for text in (options.cheap, *options.stress)],
        templates=options.templates,
        requests=options.requests,
        seed=options.seed,
        settings=settings,
        policy=None if options.policy is None else Policy.load(options.policy),
        time_limit=options.time_limit,
        done=done,
    )
    Records(tuple(places), about).save(options.records)
    return 0


def fit(options: FitOptions) -> int:
    """Fits a router, prints what held-out requests say of it, and writes it."""
    from rich.console import Console

    from sparsepass.measure.auto.fitting import fit_router
    from sparsepass.measure.auto.show import by_task

    records, cheap, goal = _given(options)
    router, verdict = fit_router(records, cheap, goal, candidate=options.reads, name=options.name)
    console = Console()
    title = f"Router {router.name}, {router.fingerprint}: every second request, not fitted on"
    (console if console.is_terminal else Console(width=120)).print(by_task(verdict, title, 1 - goal.confidence))
    if options.out is not None:
        router.save(options.out)
        print(f"Router: {options.out}")
    return 0


def compare(options: CompareOptions) -> int:
    """Compares every signal, and prints, draws and writes what was found."""
    from rich.console import Console

    from sparsepass.measure.auto.compare import compare as run
    from sparsepass.measure.auto.show import as_json, draw, tables, write_markdown

    records, cheap, goal = _given(options)
    found = run(records, cheap, goal, resamples=options.resamples)
    content = as_json(found)
    if options.as_json:
        print(json_text(content, OptionError, indent=1), flush=True)
    else:
        console = Console()
        (console if console.is_terminal else Console(width=140)).print(tables(found))
    if options.out is not None:
        write_json(options.out, content, OptionError)
    if options.plot is not None:
        draw(found, options.plot)
    if options.markdown is not None:
        write_markdown(found, int(records.about.get("requests", 0)), options.markdown)
    return 0


def _given(options: FitOptions | CompareOptions) -> tuple[Any, str, Any]:
    from sparsepass.measure.auto.compare import Goal
    from sparsepass.measure.auto.records import Records

    if options.records is None:
        raise OptionError("--records FILE is missing: what `sparsepass auto collect` wrote.")
    check_paths(options)
    records = Records.load(options.records)
    first = next(iter(records.tried()), "")
    return records, options.cheap or first, Goal(options.loss, options.confidence, options.spare)


COMMANDS = (
    Command(
        "collect",
        CollectOptions,
        collect,
        "Run tasks under a cheap budget and note the signals of each prefill beside whether its answer was right.",
        "Example: sparsepass auto collect --lengths 1K 4K --requests 160 --records records.json",
    ),
    Command(
        "fit",
        FitOptions,
        fit,
        "Fit a router on records: when to trust a cheap prefill. Held against the requests that it was not fitted on.",
        "Example: sparsepass auto fit --records records.json --out router.json",
    ),
    Command(
        "compare",
        CompareOptions,
        compare,
        "Which sign of a request predicts that a cheap budget is safe: on other requests, another template, another "
        "task.",
        "Example: sparsepass auto compare --records records.json --plot auto.png",
    ),
)
