"""An evaluation as tables and sentences."""

from __future__ import annotations

from itertools import combinations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsepass.calibrate.evaluate import Evaluation, Measured
from sparsepass.calibrate.fit import Fit, difference
from sparsepass.calibrate.words import tokens
from sparsepass.methods import encode_budget


def tables(found: Evaluation) -> RenderableType:
    """Per task and length, then the law, then what it amounts to."""
    fits = found.fits()
    parts: list[RenderableType] = [_places(found), _laws(fits)]
    return Group(*parts, *(Text(sentence, style="bold") for sentence in sentences(found, fits)))


def _places(found: Evaluation) -> Table:
    equal, best = found.equal_compute, found.best_fixed
    table = Table(title="Loss, share of the dense accuracy, and its upper bound", title_justify="left")
    table.add_column("task")
    for name in ("length", "dense right", "policy density", "policy loss"):
        table.add_column(name, justify="right")
    for title, step in (("fixed, nearly equal", equal), ("best fixed", best)):
        table.add_column(f"{title}: {'none' if step is None else f'{found.density(step):.3f}'}", justify="right")
    for place in found.places:
        row = [place.task, tokens(place.length), f"{place.policy.paired.accuracy:.1%}", f"{place.policy.density:.3f}"]
        held = [place.policy, *(None if step is None else place.fixed[step] for step in (equal, best))]
        table.add_row(*row, *(_loss(found, one) for one in held))
    return table


def _loss(found: Evaluation, held: Measured | None) -> Text:
    if held is None:
        return Text("")
    if held.budget is None:
        return Text("dense", style="dim")
    upper = held.paired.upper(1 - found.confidence)
    style = "green" if upper <= found.tolerated else "yellow" if held.paired.loss <= found.tolerated else "red"
    return Text(f"{held.paired.loss:+.1%} (<= {upper:.1%})", style=style)


def _laws(fits: dict[str, Fit]) -> Table:
    table = Table(title="Safe density = scale * (length / 1K) ^ -exponent, 95% intervals", title_justify="left")
    table.add_column("task")
    lengths = next(iter(fits.values())).lengths if fits else ()
    for name in (*(f"safe at {tokens(length)}" for length in lengths), "scale", "exponent", "falls with length"):
        table.add_column(name, justify="right")
    for task, fit in fits.items():
        falls = f"{fit.falls:.1%} sure" if len(fit.lengths) > 1 else "one length"
        table.add_row(task, *map(str, fit.safe), str(fit.scale), str(fit.exponent), falls)
    return table


def sentences(found: Evaluation, fits: dict[str, Fit]) -> list[str]:
    """What the policy saves, and whether classes and lengths differ."""
    mine, best, equal = found.density(None), found.best_fixed, found.equal_compute
    kept = "keeps" if found.keeps(None) else "is not shown to keep"
    told = [
        f"The policy {kept} {1 - found.tolerated:.1%} of the dense accuracy in every task and length "
        f"({found.confidence:.0%} sure of each); it computes {mine:.3f} of the attention, mean over the mix."
    ]
    if best is None:
        told.append("No fixed budget of those tried is shown to keep as much.")
    else:
        budget = found.places[0].fixed[best].budget
        name = "dense" if budget is None else encode_budget(budget)
        told.append(
            f"The best fixed budget that does, {name}, computes {found.density(best):.3f}: the policy computes "
            f"{mine / found.density(best):.2f} of that."
        )
    if equal is not None:
        told.append(
            f"The fixed budget that computes most nearly as much ({found.density(equal):.3f}) loses "
            f"{found.worst(equal):.1%} "
            f"in its worst cell, the policy {found.worst(None):.1%}."
        )
    differ = [
        f"{one}/{other} {difference(fits[one], fits[other])}"
        for one, other in combinations(fits, 2)
        if not difference(fits[one], fits[other]).low <= 1 <= difference(fits[one], fits[other]).high
    ]
    told.append(
        f"Tolerance differs by task: safe densities are to each other as {'; '.join(differ)}."
        if differ
        else "No two tasks differ in tolerance beyond the 95% intervals."
    )
    return told
