"""``sparsepass evaluate``: a policy against dense and against fixed budgets, and the law of safe density by length."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsepass.bench.arguments import Command
from sparsepass.bench.options import option
from sparsepass.calibrate.command import Asked, Bars, Session, tasks_of, weights_of
from sparsepass.calibrate.evaluate import Evaluation, evaluate, policy_budget
from sparsepass.calibrate.ladder import ladder
from sparsepass.errors import OptionError
from sparsepass.fingerprint import differences
from sparsepass.methods import encode_budget

_SAFE, _OUTPUT = "What is compared", "Output"


@dataclass(frozen=True)
class EvaluateOptions(Asked):
    """``sparsepass evaluate``."""

    policy: Path | None = option(None, "Policy file; default: the built-in prior.", _SAFE)
    fixed: str = option("pooled_topk", "Fixed budgets: a method's own steps, name=0.05,0.1, or in full.", _SAFE)
    loss: float = option(0.05, "Share of the dense accuracy that may be lost.", _SAFE)
    confidence: float = option(0.95, "Of the one-sided bounds.", _SAFE)
    questions: int = option(0, "Asked about each context; 0: as many as share its prefill.", _SAFE)
    contexts: int = option(32, "Fresh contexts per task and length.", _SAFE)
    out: Path | None = option(None, "JSON file.", _OUTPUT)
    plots: Path | None = option(None, "Folder for plots.", _OUTPUT)


def run(options: EvaluateOptions) -> int:
    """Evaluates and prints. Returns the exit status: 1 if the policy is not shown to keep what was asked for."""
    from rich.console import Console

    from sparsepass.policy import Policy, builtin_policy

    if options.contexts < 2 or options.questions < 0:
        raise OptionError("--contexts of 2 or more and --questions of 0 or more are accepted.")
    policy = builtin_policy() if options.policy is None else Policy.load(options.policy)
    fixed = ladder(options.fixed)
    given = {policy_budget(policy, t.task_class, length) for t in tasks_of(options) for length in options.lengths}
    budgets = [*fixed, *sorted((budget for budget in given if budget is not None), key=str)]
    with Session.open(options, budgets, options.questions) as session:
        if policy.calibrated and (other := differences(policy.calibrated, session.model)):
            warnings.warn(
                f"Policy {policy.name!r} was calibrated for something else: {'; '.join(other)}.",
                RuntimeWarning,
                stacklevel=1,
            )
        weights = weights_of(options, session.tasks)
        runs = options.contexts * len(options.lengths) * len(session.tasks) * (len(fixed) + 1)
        with Bars("evaluating", runs, quiet=options.as_json) as bars:
            found = evaluate(
                session.meter,
                session.tasks,
                options.lengths,
                policy,
                fixed,
                contexts=options.contexts,
                tolerated=options.loss,
                confidence=options.confidence,
                seed=options.seed,
                weights=weights,
                tick=bars.step,
            )
    content = as_json(found)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.as_json:
        print(json.dumps(content, indent=1))
    else:
        from sparsepass.calibrate.evaluate_table import tables

        console = Console()
        (console if console.is_terminal else Console(width=130)).print(tables(found))
    if options.plots is not None:
        from sparsepass.calibrate.plots import draw

        for path in draw(found, options.plots):
            bars.say(f"Plot: {path}")
    return int(not found.keeps(None))


def as_json(found: Evaluation) -> dict[str, Any]:
    """All figures as plain JSON."""

    def plain(held: Any) -> dict[str, Any]:
        return {
            "budget": "dense" if held.budget is None else encode_budget(held.budget),
            "density": held.density,
            "accuracy": held.paired.sparse / max(1, held.paired.questions),
            "loss": 0.0 if held.budget is None else held.paired.loss,
            "upper": 0.0 if held.budget is None else held.paired.upper(1 - found.confidence),
        }

    def law(one: Any) -> dict[str, Any]:
        safe = [
            {"length": length, "safe": [point.value, point.low, point.high]}
            for length, point in zip(one.lengths, one.safe, strict=True)
        ]
        parts = {name: [getattr(one, name).value, getattr(one, name).low, getattr(one, name).high] for name in _LAW}
        return {"points": safe, **parts, "falls": one.falls}

    return {
        "tolerated": found.tolerated,
        "confidence": found.confidence,
        "policy": {"density": found.density(None), "keeps": found.keeps(None), "worst_loss": found.worst(None)},
        "fixed": [
            {
                "budget": encode_budget(found.places[0].fixed[step].budget),
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
                "questions": place.policy.paired.questions,
                "dense_accuracy": place.policy.paired.accuracy,
                "policy": plain(place.policy),
                "fixed": [plain(held) for held in place.fixed],
            }
            for place in found.places
        ],
        "fits": {task: law(one) for task, one in found.fits().items()},
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
