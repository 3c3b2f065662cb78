"""``sparsepass coverage``: every architecture, several side by side."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError
from sparsepass.host.files import read_text, write_whole
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.options import check_paths, option
from sparsepass.measure.coverage.architectures import Kind, architectures
from sparsepass.measure.coverage.inputs import Phase, phases_of
from sparsepass.measure.coverage.own import checkpoint_kind, is_function, own_model
from sparsepass.measure.coverage.progress import progress
from sparsepass.measure.coverage.store import Record, Sweep, merged
from sparsepass.measure.coverage.tables import line, markdown, text
from sparsepass.measure.coverage.worker import Task, run_all
from sparsepass.reports.explain import versions

SAMPLE = ("llama", "gemma2", "qwen3", "gpt2", "opt", "bert", "t5", "vit")
"""Architectures of ``--sample``: grouped queries, windows, softcap, an encoder, an encoder-decoder, vision."""


BEGIN, END = "<!-- tables: written by sparsepass coverage --markdown -->", "<!-- end of tables -->"
"""Marks of the part of a Markdown file that is written anew."""


@dataclass(frozen=True)
class CoverageOptions:
    """``sparsepass coverage``."""

    arch: tuple[str, ...] = option((), "transformers model_types; default: all of the kinds.", "Models")
    kinds: tuple[str, ...] = option(
        (), "Kinds of models; default: all, decoders first.", "Models", choices=tuple(map(str, Kind))
    )
    sample: bool = option(False, "Eight architectures that differ.", "Models")
    model: str = option(
        "", "Your own: module:function or file.py:function, returning (model, inputs); or a checkpoint.", "Models"
    )
    trust_remote_code: bool = option(False, "Run the code that a checkpoint brings along.", "Models")
    implementations: tuple[str, ...] = option(
        ("sdpa", "eager"), "attn_implementation of the models.", "Models", choices=("sdpa", "eager")
    )
    phases: tuple[str, ...] = option(
        ("prefill", "padded", "decode"), "What they are asked to do.", "Input", choices=("prefill", "padded", "decode")
    )
    length: int = option(450, "Tokens of the prompt; blocks have 64.", "Input")
    fuse_attention: bool = option(False, "Count what Inductor's own fuse_attention replaces, too.", "Run")
    jobs: int = option(1, "Processes that measure side by side, one thread each.", "Run")
    limit: float = option(120.0, "Seconds for one model and phase.", "Run")
    minutes: float = option(0.0, "Ends after so long, with what there is in --out; 0: no end.", "Run")
    retry: bool = option(False, "Measure again what failed in the file's earlier run.", "Run")
    again: bool = option(False, "Measure again what the file has.", "Run")
    merge: tuple[Path, ...] = option(
        (), "Files of other runs, put together in --out; nothing is measured.", "Run", use="read"
    )
    out: Path | None = option(
        None, "JSON file (.json, .json.gz), written all along; gone on with if it is there.", "Output", use="write"
    )
    markdown: Path | None = option(
        None, "Markdown file for the tables; of a file with marks the part between them.", "Output", use="write"
    )
    as_json: bool = option(False, "The same JSON on stdout, no tables.", "Output")


def run(options: CoverageOptions) -> int:
    """Measures what the file does not have. Returns the exit status: 1 if an output differs from eager's.

    A sweep that ``--minutes`` has ended gives 0. Raises ``OptionError``.
    """
    _check(options)
    check_paths(options)
    through = True
    if options.merge:
        sweep = merged([Sweep.load(file) for file in options.merge])
        records = list(sweep.records.values())
    elif is_function(options.model):
        sweep = _begun(options)
        records = [_own(options)]
        for record in records:
            sweep.add(record)
    else:
        sweep = _begun(options)
        records, through = _sweep(options, sweep)
    if options.as_json:
        json.dump({"versions": sweep.versions, **asdict_plain(options), "records": records}, sys.stdout, indent=1)
        print(flush=True)
    else:
        print(text(records))
    if options.out is not None:
        sweep.save(options.out)
    if options.markdown is not None:
        _write(options.markdown, markdown(records, sweep))
    return int(through and any(record.get("equal") is False for record in records))


def _write(file: Path, tables: str) -> None:
    held = read_text(file, "document of --markdown", OptionError) if file.exists() else ""
    before, begin, rest = held.partition(BEGIN)
    _, end, after = rest.partition(END)
    text = f"{before}{begin}\n\n{tables}\n{end}{after}" if begin and end else tables
    write_whole(file, text, OptionError)


def _check(options: CoverageOptions) -> None:
    if options.jobs < 1:
        raise OptionError(f"--jobs is {options.jobs}; accepted: 1 or more, at most one for each core.")
    if options.limit <= 0 or options.minutes < 0:
        raise OptionError(f"--limit {options.limit:g}, --minutes {options.minutes:g}: accepted are positive numbers.")
    if options.merge and (options.model or options.arch or options.sample):
        raise OptionError("--merge measures nothing: leave out --arch, --model and --sample.")


def _begun(options: CoverageOptions) -> Sweep:
    """The sweep of the file, if it is of this machine's versions, or a new one."""
    sweep = Sweep(versions(), {"length": options.length})
    if options.out is not None and options.out.exists() and not options.again:
        earlier = Sweep.load(options.out)
        if (earlier.versions, earlier.settings) == (sweep.versions, sweep.settings):
            return earlier
        print(f"{options.out} is of other versions or another length: measured anew.", file=sys.stderr)
    return sweep


def asdict_plain(options: CoverageOptions) -> dict[str, Any]:
    """The options as JSON takes them."""
    return {"settings": json.loads(json.dumps(asdict(options), default=str))}


def tasks(options: CoverageOptions) -> list[Task]:
    """What is asked for, whether the file has it or not. Raises ``OptionError``."""
    if options.model:
        kind = checkpoint_kind(options.model, options.trust_remote_code)
        cases = _cases(kind, options)
        fused, trust = options.fuse_attention, options.trust_remote_code
        return [Task(kind, options.model, cases, options.length, fused, checkpoint=True, trust=trust)]
    names = SAMPLE if options.sample and not options.arch else options.arch
    wanted = architectures(options.kinds, names)
    if options.sample and not options.arch:
        wanted = list({name: (kind, name) for kind, name in reversed(wanted)}.values())[::-1]
        wanted = [(Kind.ENCODER if name == "bert" else kind, name) for kind, name in wanted]
    found = []
    for kind, name in wanted:
        cases = _cases(kind, options)
        if cases:
            found.append(Task(kind, name, cases, options.length, options.fuse_attention))
    return found


def _cases(kind: Kind, options: CoverageOptions) -> tuple[tuple[str, Phase], ...]:
    phases = [phase for phase in phases_of(kind) if phase in options.phases]
    return tuple((attn, phase) for attn in options.implementations for phase in phases)


SAVE_S = 5.0
"""How often the file is written while a sweep runs."""


def _sweep(options: CoverageOptions, sweep: Sweep) -> tuple[list[Record], bool]:
    """The records of what is asked for, and whether all of it was measured."""
    from sparsepass.kernels.runtime.build import library

    wanted = tasks(options)
    left = [task for task in (_left(task, sweep, options) for task in wanted) if task.cases]
    if options.jobs > 1:
        left = [part for task in left for part in _apart(task)]
        random.Random(0).shuffle(left)  # relatives are alike, and the slow ones would come together
        library()  # built once, not by every process
    cases, saved = sum(len(task.cases) for task in left), time.monotonic()
    done = 0
    with progress(cases, quiet=options.as_json) as shown:
        for record in run_all(left, options.jobs, options.limit, options.minutes * 60 or None):
            sweep.add(record)
            done += 1
            shown.done(line(record), alarming(record))
            if options.out is not None and time.monotonic() - saved > SAVE_S:
                sweep.save(options.out)
                saved = time.monotonic()
    if done < cases:
        print(
            f"--minutes {options.minutes:g} are over: {done} of {cases} measurements were made, {cases - done} are left"
            + (f". The same command goes on with {options.out}." if options.out else "; with --out they could go on."),
            file=sys.stderr,
        )
    return list(_of(wanted, sweep)), done >= cases


def _apart(task: Task) -> Iterator[Task]:
    """A task per implementation: they share no work."""
    for implementation in dict.fromkeys(attn for attn, _ in task.cases):
        yield replace(task, cases=tuple(case for case in task.cases if case[0] == implementation))


def alarming(record: Record) -> bool:
    """Whether something is to be seen to: it did not run, or gives other results."""
    return ("error" in record and record.get("stage") != "absent") or record.get("equal") is False


def _left(task: Task, sweep: Sweep, options: CoverageOptions) -> Task:
    cases = tuple(
        (attn, phase)
        for attn, phase in task.cases
        if (held := sweep.records.get((str(task.kind), task.arch, attn, str(phase)))) is None
        or (options.retry and "error" in held and held.get("stage") != "absent")
    )
    return replace(task, cases=cases)


def _of(wanted: list[Task], sweep: Sweep) -> Iterator[Record]:
    for task in wanted:
        for attn, phase in task.cases:
            record = sweep.records.get((str(task.kind), task.arch, attn, str(phase)))
            if record is not None:
                yield record


def _own(options: CoverageOptions) -> Record:
    from sparsepass.measure.coverage.measure import measure

    model, call = own_model(options.model)
    head = {"kind": "own", "arch": options.model, "implementation": "own", "phase": str(Phase.OWN)}
    return head | measure(model, call, fused=options.fuse_attention)


COMMAND = Command(
    "coverage",
    CoverageOptions,
    run,
    "Which attention of which transformers architectures is rewritten, and why the rest is not. Interrupted, it goes "
    "on where it was.",
    "Example: sparsepass coverage --arch llama gemma2 --phases prefill padded --jobs 2 --out coverage.json",
)
