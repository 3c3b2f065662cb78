"""``sparsepass evaluate``: a policy against dense and against fixed budgets, and the law of safe density by length."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError
from sparsepass.host.files import json_text, write_json
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.options import option
from sparsepass.measure.calibrate.cell import NOMINAL
from sparsepass.measure.calibrate.command import QUESTIONS, Asked, Bars, Session, check_asked, mode_of, weights_of
from sparsepass.measure.calibrate.evaluate import Evaluation, Measured, evaluate
from sparsepass.measure.calibrate.hypotheses import hypotheses_of
from sparsepass.measure.calibrate.run import ladders
from sparsepass.measure.calibrate.setting import setting_text
from sparsepass.policies.fingerprint import differences

_SAFE, _OUTPUT = "What is compared", "Output"


FIXED = (
    "a_shape(sink=64, block=64, last=2)=64,256,1024",
    "pooled_topk(density=0.1, block=64, last=2)=0.05,0.2,0.5,0.75",
    "pooled_topk(density=0.1, block=64)=0.05,0.1,0.2,0.35,0.5,0.75,0.9",
    "threshold(block=64)=0.5,0.1,0.02",
)
"""Compared if none are given."""


@dataclass(frozen=True)
class EvaluateOptions(Asked):
    """``sparsepass evaluate``."""

    policy: Path | None = option(None, "Policy file; default: the built-in prior.", _SAFE, use="read")
    fixed: tuple[str, ...] = option(FIXED, "Fixed budgets: a method's own steps, name=0.05,0.1, or in full.", _SAFE)
    loss: float = option(0.05, "Share of the dense accuracy that may be lost.", _SAFE)
    confidence: float = option(0.95, "Of the one-sided bounds.", _SAFE)
    questions: int = option(0, "Asked about each context; 0: as many as share its prefill.", _SAFE)
    contexts: int = option(32, "Fresh contexts of 16 questions per task and length, under the policy.", _SAFE)
    dense: int = option(16, "Of these, asked about densely whatever the policy answers.", _SAFE)
    mapped: int = option(4, "Of these, asked about under every fixed budget; under the best ones all.", _SAFE)
    time_limit: float = option(0.0, "Seconds after which fixed budgets are asked at no further place; 0: none.", _SAFE)
    out: Path | None = option(None, "JSON file.", _OUTPUT, use="write")
    plots: Path | None = option(None, "Folder for plots.", _OUTPUT, use="folder")


def run(options: EvaluateOptions) -> int:
    """Evaluates and prints. Returns the exit status: 1 if the policy is not shown to keep what was asked for."""
    from rich.console import Console

    from sparsepass.policies.policy import Policy, builtin_policy

    check_asked(options)
    if min(options.contexts, options.mapped, options.dense) < 2 or options.questions < 0:
        raise OptionError("--contexts, --mapped and --dense of 2 or more and --questions of 0 or more are accepted.")
    policy = builtin_policy() if options.policy is None else Policy.load(options.policy)
    methods = ladders(options.fixed)
    budgets = [step for steps in methods.values() for step in steps]
    mode = mode_of(options, [*budgets, *(rule.budget for rule in policy.rules)])
    more = 1 if options.questions > 1 or mode in QUESTIONS else NOMINAL
    with Session.open(options, mode, budgets, options.questions) as session:
        if policy.calibrated and (other := differences(policy.calibrated, session.model)):
            warnings.warn(
                f"Policy {policy.name!r} was calibrated for something else: {'; '.join(other)}.",
                RuntimeWarning,
                stacklevel=1,
            )
        weights = weights_of(options, session.tasks)
        each = options.contexts + options.dense + options.mapped * len(budgets)
        runs = more * each * len(options.lengths) * len(session.tasks)
        with Bars("evaluating", runs, quiet=options.as_json) as bars:
            found = evaluate(
                session.meter,
                session.tasks,
                options.lengths,
                policy,
                methods,
                contexts=more * options.contexts,
                mapped=more * options.mapped,
                dense=more * min(options.dense, options.contexts),
                tolerated=options.loss,
                confidence=options.confidence,
                seed=options.seed,
                weights=weights,
                time_limit=options.time_limit,
                tick=bars.step,
            )
    content = as_json(found)
    if options.as_json:
        print(json_text(content, OptionError, indent=1), flush=True)
    else:
        from sparsepass.measure.calibrate.evaluate_table import tables

        console = Console()
        (console if console.is_terminal else Console(width=130)).print(tables(found))
    if options.out is not None:
        write_json(options.out, content, OptionError)
    if options.plots is not None:
        from sparsepass.measure.calibrate.plots import draw

        for path in draw(found, options.plots):
            bars.say(f"Plot: {path}")
    return int(not found.keeps(None))


def as_json(found: Evaluation) -> dict[str, Any]:
    """All figures as plain JSON."""

    def plain(held: Measured) -> dict[str, Any]:
        error = 1 - found.confidence
        dense = held.budget is None
        return {
            "budget": setting_text(held.budget),
            "questions": held.paired.questions,
            "density": held.density,
            "accuracy": held.paired.sparse / max(1, held.paired.questions),
            "loss": 0.0 if dense else held.paired.loss,
            "lower": 0.0 if dense else held.paired.lower(error),
            "upper": 0.0 if dense else held.paired.upper(error),
        }

    def law(one: Any) -> dict[str, Any]:
        safe = [
            {"length": length, "safe": [point.value, point.low, point.high]}
            for length, point in zip(one.lengths, one.safe, strict=True)
        ]
        parts = {name: [getattr(one, name).value, getattr(one, name).low, getattr(one, name).high] for name in _LAW}
        return {"points": safe, **parts, "falls": one.falls, "censored": one.censored}

    best = found.best_fixed if found.places else None
    return {
        "tolerated": found.tolerated,
        "confidence": found.confidence,
        "complete": found.complete,
        "policy": {"density": found.density(None), "keeps": found.keeps(None), "worst_loss": found.worst(None)},
        "best_fixed": None if best is None else setting_text(found.fixed_budget(best)),
        "of_best_fixed": None if best is None else found.density(None) / found.density(best),
        "fixed": [
            {
                "budget": setting_text(found.fixed_budget(step)),
                "density": found.density(step),
                "keeps": found.keeps(step),
                "worst_loss": found.worst(step),
            }
            for step in range(found.steps)
        ],
        "places": [
            {
                "task": place.task,
                "task_class": str(place.task_class),
                "length": place.length,
                "questions": place.dense.paired.questions,
                "dense_accuracy": place.dense.paired.accuracy,
                "dense_fails": place.fails,
                "policy": plain(place.policy),
                "fixed": [plain(held) for held in place.fixed],
            }
            for place in found.every
        ],
        "fits": {method: {task: law(one) for task, one in found.fits(method).items()} for method in found.methods},
        "hypotheses": [asdict(hypotheses_of(found, method)) for method in found.methods if found.places],
    }


_LAW = ("scale", "exponent")

COMMAND = Command(
    "evaluate",
    EvaluateOptions,
    run,
    "A policy on fresh samples, against dense and fixed budgets at equal compute, and how the safe density follows the "
    "length.",
    "Example: sparsepass evaluate --policy policy.json --lengths 1K 4K --log runs.jsonl --plots plots",
)
