"""An evaluation as tables and sentences."""

from __future__ import annotations

from itertools import combinations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsepass.measure.calibrate.evaluate import Evaluation, Measured
from sparsepass.measure.calibrate.fit import Fit, difference
from sparsepass.measure.calibrate.hypotheses import Tested, hypotheses_of
from sparsepass.measure.calibrate.setting import setting_text
from sparsepass.measure.calibrate.words import tokens

Fits = dict[str, dict[str, Fit]]
"""By method and task."""


def tables(found: Evaluation) -> RenderableType:
    """Per task and length, then by method the heat map and the law, then what it amounts to."""
    parts: list[RenderableType] = [_places(found)]
    if not found.places:
        return Group(*parts, Text("No place where dense does not fail and fixed budgets were asked.", style="bold"))
    fits = {method: found.fits(method) for method in found.methods}
    tests = [hypotheses_of(found, method) for method in found.methods]
    parts += [_laws(found, method, laws) for method, laws in fits.items()]
    return Group(*parts, *(Text(sentence, style="bold") for sentence in sentences(found, fits, tests)))


def _places(found: Evaluation) -> Table:
    equal, best = found.equal_compute, found.best_fixed
    table = Table(title="Loss, share of the dense accuracy, and its upper bound", title_justify="left")
    table.add_column("task")
    for name in ("length", "questions", "dense right", "policy density", "policy loss"):
        table.add_column(name, justify="right")
    for title, step in (("fixed, nearly equal", equal), ("best fixed", best)):
        table.add_column(f"{title}: {'none' if step is None else f'{found.density(step):.3f}'}", justify="right")
    for place in found.every:
        dense = place.dense.paired
        asked = str(place.policy.paired.questions)
        row = [place.task, tokens(place.length), asked, f"{dense.accuracy:.1%} of {dense.questions}"]
        if place.fails:
            table.add_row(*row, "", "dense fails")
            continue
        if not place.curves:
            table.add_row(*row, f"{place.policy.density:.3f}", _loss(found, place.policy), "not asked", "not asked")
            continue
        held = [place.policy, *(None if step is None else place.fixed[step] for step in (equal, best))]
        table.add_row(*row, f"{place.policy.density:.3f}", *(_loss(found, one) for one in held))
    return table


def _loss(found: Evaluation, held: Measured | None) -> Text:
    if held is None:
        return Text("")
    if held.budget is None:
        return Text("dense", style="dim")
    upper = held.paired.upper(1 - found.confidence)
    style = "green" if upper <= found.tolerated else "yellow" if held.paired.loss <= found.tolerated else "red"
    return Text(f"{held.paired.loss:+.1%} (<= {upper:.1%})", style=style)


def _laws(found: Evaluation, method: str, fits: dict[str, Fit]) -> Table:
    title = f"{method}: safe density = scale * (length / 1K) ^ -exponent, 95% intervals"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    lengths = sorted({length for fit in fits.values() for length in fit.lengths})
    missing = {(one.task, one.length): "dense fails" if one.fails else "not asked" for one in found.every}
    for name in (*(f"safe at {tokens(length)}" for length in lengths), "scale", "exponent", "falls with length"):
        table.add_column(name, justify="right")
    for task, fit in fits.items():
        safe = dict(zip(fit.lengths, map(str, fit.safe), strict=True))
        falls = f"{fit.falls:.1%} sure" if len(fit.lengths) > 1 else "one length"
        falls = "as sparse as was tried" if fit.censored else falls
        at = [safe.get(one) or missing[task, one] for one in lengths]
        table.add_row(task, *at, str(fit.scale), str(fit.exponent), falls)
    return table


def sentences(found: Evaluation, fits: Fits, tests: list[Tested]) -> list[str]:
    """What the policy saves, and whether classes and lengths differ."""
    mine, best, equal = found.density(None), found.best_fixed, found.equal_compute
    kept = "keeps" if found.keeps(None) else "is not shown to keep"
    budget = found.fixed_budget(best)
    told = [
        f"The policy {kept} {1 - found.tolerated:.1%} of the dense accuracy in every task and length "
        f"({found.confidence:.0%} sure of each); it computes {mine:.3f} of the attention, mean over the mix.",
        f"The best fixed budget that does, {setting_text(budget)}, computes {found.density(best):.3f}: the policy "
        f"computes {mine / found.density(best):.2f} of that.",
    ]
    if equal is not None:
        told.append(
            f"The fixed budget that computes most nearly as much ({found.density(equal):.3f}) loses "
            f"{found.worst(equal):.1%} in its worst cell, the policy {found.worst(None):.1%}."
        )
    for test in tests:
        told += [_differ(test, fits[test.method]), _fall(test)]
    return told


def _differ(test: Tested, fits: dict[str, Fit]) -> str:
    if not test.differs and not test.alike:
        return f"{test.method}: one task alone cannot differ from others."
    ratios = {
        pair: difference(fits[pair[0]], fits[pair[1]])
        for pair in combinations(fits, 2)
        if fits[pair[0]].lengths == fits[pair[1]].lengths
    }
    shown = []
    for one in test.differs:
        pair = (one.tolerant.task, one.other.task)
        ratio = ratios.get((pair[1], pair[0])) or ratios.get(pair)
        way = pair[::-1] if pair[::-1] in ratios else pair
        safe = "" if ratio is None else f", safe densities {way[0]}/{way[1]} {ratio}"
        shown.append(
            f"{pair[1]} loses at least {one.gap:.0%} more than {pair[0]} at {tokens(one.other.length)} under "
            f"{one.other.budget}{safe}"
        )
    alike = f" Not told apart: {', '.join(f'{one} and {other}' for one, other in test.alike)}." if test.alike else ""
    pairs = len(shown) + len(test.alike)
    told = f"differs by task ({len(shown)} of {pairs} pairs; all bounds 95% at once): {'; '.join(shown)}"
    return f"{test.method}: tolerance {told if shown else 'is not shown to differ by task'}.{alike}"


def _fall(test: Tested) -> str:
    words = []
    for one in test.falls:
        if one.short is None or one.long is None:
            words.append(f"{one.task}: {one.verdict}")
            continue
        short, long = (
            f"{point.loss:.0%} at {tokens(point.length)} computing {point.density:.2f}"
            for point in (one.short, one.long)
        )
        words.append(f"{one.task}: {one.verdict} (loses {short}, {long})")
    return f"{test.method}: safe density with length, 95% at once: {'; '.join(words)}."
