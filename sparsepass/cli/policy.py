"""``sparsepass policy``: show, check and write policy files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsepass.errors import PolicyError, shown
from sparsepass.types import Budget, LengthBucket, TaskClass

if TYPE_CHECKING:
    from sparsepass.policies.policy import Policy

policy_app = typer.Typer(no_args_is_help=True, help="Show, check and write policies: which budget for which request.")
_CLASSES = [task for task in TaskClass if task is not TaskClass.DENSE]


@policy_app.command()
def show(
    file: Annotated[
        str, typer.Argument(help="Policy file, or 'prior' or 'published', the built-in ones.", show_default=True)
    ] = "prior",
    layer: Annotated[
        int | None, typer.Option(min=0, help="Of this layer; default: the most cautious of all layers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Show the budget of each task class in each length bucket."""
    from sparsepass.policies.policy import resolve_policy

    policy = resolve_policy(file)
    if as_json:
        rows = [
            {"low": bucket.low, "high": bucket.high}
            | {str(task): _budget_json(policy.budget(task, bucket, layer)) for task in _CLASSES}
            for bucket in policy.buckets
        ]
        typer.echo(json.dumps({"name": policy.name, "layer": layer, "buckets": rows}, indent=2))
        return
    table = Table(title=f"Policy {policy.name}" + ("" if layer is None else f", layer {layer}"), title_justify="left")
    table.add_column("Key length", no_wrap=True)
    for task in _CLASSES:
        table.add_column("unknown (no hint)" if task is TaskClass.UNKNOWN else str(task), justify="right")
    for bucket in policy.buckets:
        table.add_row(bucket_text(bucket), *(budget_text(policy.budget(task, bucket, layer)) for task in _CLASSES))
    table.caption = (
        "A number is the density of pooled_topk: the share of the visible blocks that is computed. The kernel is the "
        "dense one wherever sparse would not be faster."
    )
    table.caption_justify = "left"
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)


@policy_app.command()
def check(file: Annotated[Path, typer.Argument(help="Policy file.")]) -> None:
    """Check a policy file against the schema; the exit code is 0 if it is valid, else 2."""
    from sparsepass.policies.policy import Policy

    policy = Policy.load(file)
    for bucket in policy.buckets:
        for task in _CLASSES:
            policy.budget(task, bucket)  # raises where rules and buckets do not fit together
    typer.echo(
        f"{file} is valid: policy {policy.name!r}, {len(policy.rules)} rules, fingerprint {policy.fingerprint[:12]}."
    )


@policy_app.command()
def export(
    file: Annotated[Path, typer.Argument(help="File to write.")],
    policy: Annotated[str, typer.Option(help="The built-in policy to write: 'prior' or 'published'.")] = "prior",
    short: Annotated[
        bool,
        typer.Option(
            "--short", help='With what the prior gives by its name ("default": "prior"), not as rules to edit.'
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Write a built-in policy as a policy file: an example to edit, one rule per class and density."""

    if file.exists() and not force:
        raise PolicyError(f"{file} exists already; give another name, or --force to overwrite it.")
    named = _named(policy)
    (named if short else _as_rules(named)).save(file)
    typer.echo(f"Wrote {file}. See it with: sparsepass policy show {file}")


def bucket_text(bucket: LengthBucket) -> str:
    """``1K < L <= 2K``, in tokens; K is 1024."""
    low = f"{_tokens(bucket.low)} < " if bucket.low else ""
    return f"{low}L" + ("" if bucket.high is None else f" <= {_tokens(bucket.high)}")


def budget_text(budget: Budget) -> Text:
    """The density alone for the usual method, the whole budget for any other."""
    if budget.dense:
        return Text("dense", style="dim")
    if budget.method == "pooled_topk" and set(budget.params) == {"density"}:
        return Text(f"{budget.params['density']:.3f}", style="green")
    return Text(str(budget), style="green")


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def _budget_json(budget: Budget) -> dict[str, Any]:
    return {"method": budget.method, **budget.params}


def _named(name: str) -> Policy:
    from sparsepass.policies.policy import NAMED

    if name not in NAMED:
        raise PolicyError(f"No built-in policy is called {shown(name)}; accepted are {', '.join(map(repr, NAMED))}.")
    return NAMED[name]()


def _as_rules(policy: Policy) -> Policy:
    """The same budgets, written out: neighboring buckets with an equal budget share a rule, dense ones need none."""
    from sparsepass.policies.policy import Policy
    from sparsepass.policies.rule import Rule

    rules: list[Rule] = []
    for task in _CLASSES:
        runs: list[tuple[Budget, LengthBucket, LengthBucket]] = []
        for bucket in policy.buckets:
            budget = policy.budget(task, bucket)
            if runs and runs[-1][0] == budget:
                runs[-1] = (budget, runs[-1][1], bucket)
            else:
                runs.append((budget, bucket, bucket))
        rules += [Rule(task, budget, first.low, last.high) for budget, first, last in runs if not budget.dense]
    return Policy(
        name=f"{policy.name}-as-rules",
        rules=tuple(rules),
        description=f"The policy {policy.name!r} as rules. Of those that hold the last wins; lengths are key tokens.",
    )
