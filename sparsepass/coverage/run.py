"""``sparsepass coverage``: every architecture, one after the other."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsepass.bench.arguments import Command
from sparsepass.bench.options import option
from sparsepass.bench.progress import reporter
from sparsepass.coverage.architectures import Kind, architectures
from sparsepass.coverage.inputs import Phase, own_model, phases_of
from sparsepass.coverage.store import Record, Sweep
from sparsepass.coverage.tables import line, markdown, text
from sparsepass.coverage.worker import Task, Worker
from sparsepass.inspection import versions

SAMPLE = ("llama", "gemma2", "qwen3", "gpt2", "opt", "bert", "t5", "vit")
"""Architectures of ``--sample``: grouped queries, windows, softcap, an encoder, an encoder-decoder, vision."""


@dataclass(frozen=True)
class CoverageOptions:
    """``sparsepass coverage``."""

    arch: tuple[str, ...] = option((), "transformers model_types; default: all of the kinds.", "Models")
    kinds: tuple[str, ...] = option(
        (), "Kinds of models; default: all, decoders first.", "Models", choices=tuple(map(str, Kind))
    )
    sample: bool = option(False, "Eight architectures that differ.", "Models")
    model: str = option("", "Your own: module:function or file.py:function, returning (model, inputs).", "Models")
    implementations: tuple[str, ...] = option(
        ("sdpa", "eager"), "attn_implementation of the models.", "Models", choices=("sdpa", "eager")
    )
    phases: tuple[str, ...] = option(
        ("prefill", "padded", "decode"), "What they are asked to do.", "Input", choices=("prefill", "padded", "decode")
    )
    length: int = option(450, "Tokens of the prompt; blocks have 64.", "Input")
    fuse_attention: bool = option(False, "Count what Inductor's own fuse_attention replaces, too.", "Run")
    limit: float = option(120.0, "Seconds for one architecture.", "Run")
    time_limit: float = option(0.0, "Seconds after which no further architecture is begun; 0: none.", "Run")
    retry: bool = option(False, "Measure again what failed in the file's earlier run.", "Run")
    again: bool = option(False, "Measure again what the file has.", "Run")
    out: Path | None = option(
        None, "JSON file, written after every architecture; gone on with if it is there.", "Output"
    )
    markdown: Path | None = option(None, "Markdown file for the tables.", "Output")
    as_json: bool = option(False, "The same JSON on stdout, no tables.", "Output")


def run(options: CoverageOptions) -> int:
    """Measures what the file does not have. Returns the exit status: 1 if an output differs from eager's."""
    settings = json.loads(json.dumps({"length": options.length}))
    sweep = Sweep(versions(), settings)
    if options.out is not None and options.out.exists() and not options.again:
        earlier = Sweep.load(options.out)
        if (earlier.versions, earlier.settings) == (sweep.versions, sweep.settings):
            sweep = earlier
        else:
            print(f"{options.out} is of other versions or another length: measured anew.", file=sys.stderr)
    if options.model:
        records = [_own(options)]
        for record in records:
            sweep.add(record)
    else:
        records = _sweep(options, sweep)
    if options.out is not None:
        sweep.save(options.out)
    if options.markdown is not None:
        options.markdown.write_text(markdown(records, sweep), encoding="utf-8")
    if options.as_json:
        json.dump({"versions": sweep.versions, **asdict_plain(options), "records": records}, sys.stdout, indent=1)
        print()
    else:
        print(text(records))
    return int(any(record.get("equal") is False for record in records))


def asdict_plain(options: CoverageOptions) -> dict[str, Any]:
    """The options as JSON takes them."""
    return {"settings": json.loads(json.dumps(asdict(options), default=str))}


def tasks(options: CoverageOptions) -> list[Task]:
    """What is asked for, whether the file has it or not. Raises ``OptionError``."""
    names = SAMPLE if options.sample and not options.arch else options.arch
    wanted = architectures(options.kinds, names)
    if options.sample and not options.arch:
        wanted = list({name: (kind, name) for kind, name in reversed(wanted)}.values())[::-1]
        wanted = [(Kind.ENCODER if name == "bert" else kind, name) for kind, name in wanted]
    found = []
    for kind, name in wanted:
        phases = [phase for phase in phases_of(kind) if phase in options.phases]
        cases = tuple((attn, phase) for attn in options.implementations for phase in phases)
        if cases:
            found.append(Task(kind, name, cases, options.length, options.fuse_attention))
    return found


def _sweep(options: CoverageOptions, sweep: Sweep) -> list[Record]:
    wanted = tasks(options)
    left = [task for task in (_left(task, sweep, options) for task in wanted) if task.cases]
    began = time.monotonic()
    with reporter(len(left), quiet=options.as_json) as bars, Worker(options.limit) as worker:
        for task in left:
            if options.time_limit and time.monotonic() - began > options.time_limit:
                bars.say(f"The time limit of {options.time_limit:g} s was reached; run the command again to go on.")
                break
            bars.problem(f"{task.arch} ({task.kind})")
            bars.steps("", len(task.cases))
            for record in worker.run(task):
                sweep.add(record)
                bars.say("  " + line(record))
                bars.advance()
            if options.out is not None:
                sweep.save(options.out)
    return list(_of(wanted, sweep))


def _left(task: Task, sweep: Sweep, options: CoverageOptions) -> Task:
    cases = tuple(
        (attn, phase)
        for attn, phase in task.cases
        if (held := sweep.records.get((str(task.kind), task.arch, attn, str(phase)))) is None
        or (options.retry and "error" in held and held.get("stage") != "absent")
    )
    return Task(task.kind, task.arch, cases, task.length, task.fused)


def _of(wanted: list[Task], sweep: Sweep) -> Iterator[Record]:
    for task in wanted:
        for attn, phase in task.cases:
            record = sweep.records.get((str(task.kind), task.arch, attn, str(phase)))
            if record is not None:
                yield record


def _own(options: CoverageOptions) -> Record:
    from sparsepass.coverage.measure import measure

    model, call = own_model(options.model)
    head = {"kind": "own", "arch": options.model, "implementation": "own", "phase": str(Phase.OWN)}
    return head | measure(model, call, fused=options.fuse_attention)


COMMAND = Command(
    "coverage",
    CoverageOptions,
    run,
    "Which attention of which transformers architectures is rewritten, and why the rest is not. Interrupted, it goes "
    "on where it was.",
    "Example: sparsepass coverage --arch llama gemma2 --phases prefill padded --out coverage.json",
)
