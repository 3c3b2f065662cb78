"""``sparsepass calibrate``: from a model to a policy file, a report, and one number."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from sparsepass.errors import OptionError, close_names, shown
from sparsepass.host.files import check_input, check_output, json_text, write_json
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.options import check_paths, option
from sparsepass.measure.calibrate.cell import NOMINAL, Cell, Goal
from sparsepass.measure.calibrate.log import Log
from sparsepass.measure.calibrate.refine import Refine
from sparsepass.measure.calibrate.result import Calibration
from sparsepass.measure.calibrate.run import Refining, calibrate, check_goal, ladders
from sparsepass.measure.calibrate.setting import setting_text
from sparsepass.measure.tasks.base import Task
from sparsepass.measure.tasks.score import Mode, questions_at_once
from sparsepass.methods import encode_budget, make_method
from sparsepass.policies.policy import Policy
from sparsepass.types import Budget

METHODS = ("a_shape(sink=64, block=64, last=2)", "pooled_topk(density=0.1, block=64, last=2)")
"""Tried if none are given: what is cheapest to select, and computes the question's own blocks whole."""

_ASKED, _SAFE, _RUN, _OUTPUT = "Model and mix", "What is safe", "Run", "Output"


@dataclass(frozen=True)
class Asked:
    """Which model, which mix of tasks, on which machine: what ``calibrate`` and ``evaluate`` share."""

    model: Path | None = option(None, "Local checkpoint folder; default: the testbed.", _ASKED)
    testbed: str = option("small", "Size of the testbed, where no model is given.", _ASKED)
    tasks: tuple[str, ...] = option((), "Tasks by name; default: one of each class.", _ASKED)
    documents: Path | None = option(None, "JSON lines of your own questions on your own documents.", _ASKED, use="read")
    chat: bool = option(False, "Ask in the tokenizer's chat template.", _ASKED)
    weights: tuple[float, ...] = option((), "Of the tasks in the mix, in their order; default: all alike.", _ASKED)
    lengths: tuple[int, ...] = option((1024, 2048, 4096, 8192), "Tokens of context and question.", _ASKED)
    device: str = option("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one.", _RUN)
    dtype: str = option("", "Default: bf16 on a GPU, fp32 on the CPU.", _RUN, choices=("", "bf16", "fp16", "fp32"))
    threads: int = option(0, "CPU threads; 0 leaves them as they are.", _RUN)
    mode: str = option(
        "",
        "How questions are asked; default: forced on a GPU, shared on the CPU where the last blocks are whole.",
        _RUN,
        choices=("", *get_args(Mode)),
    )
    seed: int = option(0, "Of the samples.", _RUN)
    log: tuple[Path, ...] = option((), "JSON lines of what was measured, gone on with; others are read, too.", _OUTPUT)
    again: bool = option(False, "Begin the log anew.", _OUTPUT)
    as_json: bool = option(False, "JSON on stdout, no tables.", _OUTPUT)


@dataclass(frozen=True)
class CalibrateOptions(Asked):
    """``sparsepass calibrate``."""

    methods: tuple[str, ...] = option(
        METHODS, "A name (its own steps), name=0.05,0.1, or in full: 'top_p(coverage=0.9, stride=8)'.", _SAFE
    )
    refine: str = option("", "Budgets by layer, or head, where that pays.", _SAFE, choices=("", "layers", "heads"))
    loss: float = option(0.05, "Tolerated share of the dense accuracy.", _SAFE)
    confidence: float = option(0.95, "That a verified budget loses no more, per task and length.", _SAFE)
    questions: int = option(0, "Asked about each context; 0: as many as share its prefill.", _SAFE)
    search: int = option(8, "Contexts of 16 questions per budget in the search, at most.", _SAFE)
    verify: int = option(64, "Held-out contexts of 16 questions per budget that is verified, at most.", _SAFE)
    floors: int = option(0, "Contexts per task and length whose kept attention mass gives the policy floors.", _SAFE)
    time_limit: float = option(0.0, "Seconds after which no further cell is begun; 0: none.", _RUN)
    name: str = option("calibrated", "Of the policy.", _OUTPUT)
    out: Path | None = option(None, "Policy file.", _OUTPUT, use="write")
    report: Path | None = option(None, "HTML report.", _OUTPUT, use="write")
    plot: Path | None = option(None, "Picture of the heat map.", _OUTPUT, use="picture")
    details: Path | None = option(None, "JSON file of every cell and trial.", _OUTPUT, use="write")


def run(options: CalibrateOptions) -> int:
    """Calibrates and writes what was asked for. Returns the exit status: 1 if no cell has a safe budget."""
    check_asked(options)
    budgets = ladders(options.methods)
    steps = [step for steps in budgets.values() for step in steps]
    mode = mode_of(options, steps)
    each = options.questions or (NOMINAL if mode in QUESTIONS else 1)
    more = NOMINAL if each == 1 else 1
    goal = Goal(options.loss, options.confidence, each, more * options.search, more * options.verify, seed=options.seed)
    check_goal(goal)
    with Session.open(options, mode, steps, options.questions) as session:
        refine = Refining(cast(Refine, options.refine), session.meter.layers, session.meter.heads)
        weights = weights_of(options, session.tasks)
        total = len(options.lengths) * len(session.tasks) * len(budgets)
        with Bars("calibrating", total, quiet=options.as_json) as bars:
            found = calibrate(
                session.meter,
                session.tasks,
                options.lengths,
                budgets,
                goal,
                weights=weights,
                about=session.about,
                refine=refine,
                time_limit=options.time_limit,
                done=bars.done,
                tick=bars.tick,
            )
        policy = found.policy(options.name)
        if options.floors:
            from sparsepass.measure.calibrate.floors import measure_floors

            policy = found.policy(
                options.name, measure_floors(session.meter, session.tasks, found, policy, options.floors)
            )
    _print(found, options)
    _write(found, policy, options)
    return int(not any(cell.budget for cell in found.cells))


def check_asked(options: Asked) -> None:
    """Refuses paths, of logs too, that could not be read or written afterwards. Raises ``OptionError``."""
    check_paths(options)
    for place, path in enumerate(options.log):
        (check_input if place else check_output)(path, OptionError)


def _print(found: Calibration, options: CalibrateOptions) -> None:
    """Before anything is written: what was measured for hours is then seen whatever happens to the files."""
    if options.as_json:
        print(json_text(as_json(found), OptionError, indent=1), flush=True)
        return
    from rich.console import Console

    from sparsepass.measure.calibrate.report import table

    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table(found))


def _write(found: Calibration, policy: Policy, options: CalibrateOptions) -> None:
    if options.out is not None:
        policy.save(options.out)
    if options.report is not None:
        from sparsepass.measure.calibrate.report import write_html

        write_html(found, options.name, options.report)
    if options.plot is not None:
        from sparsepass.measure.calibrate.plots import draw_calibration

        draw_calibration(found, options.plot)
    if options.details is not None:
        write_json(options.details, as_json(found), OptionError)
    if not options.as_json:
        for what, path in (("Policy", options.out), ("Report", options.report), ("Log", next(iter(options.log), None))):
            if path is not None:
                print(f"{what}: {path}")


def as_json(found: Calibration) -> dict[str, Any]:
    """All that was found, as plain JSON."""
    from sparsepass.measure.calibrate.words import how_sure, the_number

    def plain(cell: Cell) -> dict[str, Any]:
        trials = [{**asdict(trial), "budget": setting_text(trial.budget)} for trial in cell.trials]
        budget = None if cell.budget is None else setting_text(cell.budget)
        return {**asdict(replace(cell, trials=())), "budget": budget, "trials": trials}

    fixed = found.fixed()
    return {
        "number": the_number(found),
        "sure": how_sure(found),
        "fixed": {"budget": None if fixed.budget is None else setting_text(fixed.budget), "density": fixed.density},
        "policy_density": found.mean_density(),
        "goal": asdict(found.goal),
        "about": dict(found.about),
        "complete": found.complete,
        "cells": [plain(cell) for cell in found.cells],
    }


@dataclass
class Session:
    """A model that is ready to be measured, and what holds for it."""

    model: Any
    tasks: list[Task]
    meter: Any
    about: dict[str, Any]
    log: Log

    @staticmethod
    def open(options: Asked, mode: str, budgets: Sequence[Budget], questions: int) -> Session:
        """Load the model, compile it for these budgets, open the log. Raises ``OptionError`` and others of ours.

        ``mode``: see ``mode_of``. ``questions``: asked about each context, 0 for as many as one sequence holds.
        """
        from sparsepass.kernels.support import default_block
        from sparsepass.measure.bench.options import Machine
        from sparsepass.measure.bench.problem import DTYPES
        from sparsepass.measure.bench.trial import device_of
        from sparsepass.measure.calibrate.measure import ModelMeter
        from sparsepass.measure.calibrate.rows import TokenRows
        from sparsepass.measure.calibrate.switch import BudgetSwitch
        from sparsepass.measure.tasks.score import score
        from sparsepass.policies.fingerprint import fingerprint

        device = device_of(Machine(device=options.device, threads=options.threads))
        dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
        if options.model is None:
            from sparsepass.measure.testbed import load

            model = load(options.testbed, dtype=dtype, device=str(device))
        else:
            from sparsepass.measure.models import load_model

            model = load_model(str(options.model), attn="sdpa", dtype=dtype, device=str(device))
        about = {**fingerprint(model), "mode": mode}
        tasks = tasks_of(options)
        align = max((int(budget.params.get("block") or default_block(device)) for budget in budgets), default=64)
        first = next(iter(options.log), None)
        asked = {"questions": questions, "block": align}
        log = Log(first, {**about, **asked}, options.log[1:], again=options.again)
        share = questions or partial(QUESTIONS.get(mode, one_question), align=align)
        rows = TokenRows(model) if mode == "forced" and questions in (0, 1) else None
        scorer = partial(score, align=align, mode=cast("Mode | None", mode or None))
        meter = ModelMeter(model, tasks, BudgetSwitch(), log, scorer, share, rows)
        return Session(model, tasks, meter, about, log)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.log.close()


def mode_of(options: Asked, budgets: Sequence[Budget]) -> str:
    """How questions are asked: as given, else by device and model; empty: by each task's metric.

    In ``shared`` a question's own rows are exact. So it is for budgets which compute them whole: others are asked about
    by ``forced`` if no mode is given. Raises ``OptionError`` for ``shared`` with such a budget.
    """
    from sparsepass.measure.bench.options import Machine
    from sparsepass.measure.bench.trial import device_of

    sparse = next((one for one in budgets if not one.dense and not getattr(make_method(one), "last", 0)), None)
    if options.mode == "shared" and sparse is not None:
        raise OptionError(
            "--mode shared computes each question exactly, behind the cache of its context, and under "
            f"{encode_budget(sparse)} a request would not. Give last=2 with the method, or take --mode forced."
        )
    if options.mode or options.model is not None:
        return options.mode
    cached = device_of(Machine(device=options.device)).type == "cpu" and sparse is None
    return "shared" if cached else "forced"


def one_question(length: int, align: int) -> int:
    """Where questions share nothing, more contexts tell more than more questions."""
    return 1


def many_questions(length: int, align: int) -> int:
    """Behind one cached context, which costs far more than a question: as many as are still worth asking."""
    return max(16, min(64, length // 128))


QUESTIONS: dict[str, Callable[..., int]] = {"shared": many_questions, "packed": questions_at_once}
"""Questions on a context, by mode; one elsewhere."""


TEXT_MIX = ("text_needle", "text_story_retrieval", "text_tracking", "text_common_words")
"""One task of each class, for models that read text."""


def tasks_of(options: Asked) -> list[Task]:
    """The tasks asked for; by default one of each class, on token ids for the testbed, in words for other models.

    Words are written with the model's own tokenizer. Raises ``OptionError`` and ``TaskError``.
    """
    from sparsepass.measure.tasks.catalogue import catalogue
    from sparsepass.measure.tasks.tokens import TOKEN_TASKS

    tokenizer = None if options.model is None else tokenizer_of(options.model)
    known = catalogue(tokenizer, chat=options.chat, documents=options.documents)
    for name in options.tasks:
        if name not in known:
            raise OptionError(f"--tasks {shown(name)} is not known. {close_names(name, known)}")
    mix = TEXT_MIX if options.model is not None else tuple(task.name for task in TOKEN_TASKS)
    return [known[name] for name in dict.fromkeys(options.tasks or mix)]


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a local checkpoint; None, for bytes, where the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError):
        return None


def weights_of(options: Asked, tasks: Sequence[Task]) -> dict[str, float]:
    """The weight of each task in the mix. Raises ``OptionError``."""
    given = options.weights or (1.0,) * len(tasks)
    if len(given) != len(tasks) or min(given) < 0 or sum(given) <= 0:
        names = ", ".join(task.name for task in tasks)
        raise OptionError(f"--weights {given}; accepted is a number of 0 or more for each of {names}, not all 0.")
    return {task.name: weight for task, weight in zip(tasks, given, strict=True)}


class Bars:
    """What is done and what is being asked: a bar on a terminal, lines elsewhere, nothing if ``quiet``."""

    def __init__(self, what: str, total: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=quiet or self._lines, transient=True)
        self._task = self._bar.add_task(what, total=total)
        self._contexts = 0
        self._began = time.monotonic()

    def __enter__(self) -> Bars:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def tick(self, text: str) -> None:
        self._contexts += 1
        self._bar.update(self._task, description=f"{text}, context {self._contexts}")

    def step(self, text: str) -> None:
        """One context is done, and counts."""
        self._bar.update(self._task, description=text, advance=1)

    def say(self, line: str) -> None:
        """A line on stderr, beside the bar."""
        if self._lines:
            print(line, file=sys.stderr, flush=True)
        elif not self._bar.disable:
            self._bar.console.print(line, markup=False)

    def done(self, cell: Cell) -> None:
        from sparsepass.measure.calibrate.words import note, tokens

        self._bar.advance(self._task)
        value, below = note(cell)
        spent = f"{time.monotonic() - self._began:.0f} s"
        line = (
            f"{cell.task} {tokens(cell.length)} {cell.method}: {value} ({below}; {cell.questions} questions), {spent}"
        )
        self.say(line)


COMMAND = Command(
    "calibrate",
    CalibrateOptions,
    run,
    "Which budget is safe for this model, these tasks, these lengths: measured, verified on held-out samples, and "
    "written as a policy. Interrupted, it goes on where it was.",
    "Example: sparsepass calibrate --lengths 1K 4K --loss 0.05 --out policy.json --report report.html --log runs.jsonl",
)
