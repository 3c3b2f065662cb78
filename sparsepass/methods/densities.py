"""What methods that follow the data were measured to compute, and to cost, on structured inputs.

``methods/densities.json`` has, per curve (a method with its other parameters at their defaults) and length, the share
computed at several dials; where it was timed also the density of pooled top-k that takes as long, and what of that is
selection beyond pooled top-k's own. Dials are interpolated linearly, lengths in their logarithm. Rebuild it by
``docs/measurements/densities.py``.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from itertools import pairwise

Points = tuple[tuple[float, ...], ...]
"""By rising dial: (dial, share computed), or with two more, the cost and what of it is selection."""


def density(curve: str, dial: float, dial_at_all: float, length: int) -> float:
    """Share of the visible area computed at a dial, causal, ``length`` tokens.

    Beyond the cheapest dial that was measured: its share. Past the lengths measured: the nearest one's.
    """
    tables = _curves()[curve]
    lengths = sorted(tables)
    shares = [_at(_ending(tables[one], dial_at_all), dial, 1) for one in lengths]
    return _between([math.log2(one) for one in lengths], shares, math.log2(max(1, length)))


def extra(curve: str, dial: float, length: int, *, linear: bool, effort: float = 1.0) -> float:
    """What a method costs beyond the share it computes, as a density: what pooled top-k would compute in that time.

    ``linear``: the selection's time grows with the length and not with its square, so its part falls with the length.
    ``effort``: what the selection takes over what it takes at default parameters. 0 for what was not timed.
    """
    timed = {one: points for one, points in _curves().get(curve, {}).items() if len(points[0]) == 4}
    if not timed:
        return 0.0
    nearest = min(timed, key=lambda one: abs(math.log2(one / max(1, length))))
    points = timed[nearest]
    share, cost, selection = (_at(points, dial, entry) for entry in (1, 2, 3))
    return max(0.0, cost - share - selection) + selection * effort * (nearest / max(1, length) if linear else 1.0)


@functools.cache
def _curves() -> dict[str, dict[int, Points]]:
    text = resources.files("sparsepass.methods").joinpath("densities.json").read_text(encoding="utf-8")
    found: dict[str, dict[int, Points]] = {}
    for one in json.loads(text)["measured"]:
        found.setdefault(one["curve"], {})[one["length"]] = tuple(tuple(point) for point in one["points"])
    return found


def _ending(points: Points, dial_at_all: float) -> Points:
    """With the dial at which everything is computed."""
    return tuple(sorted((*(point[:2] for point in points), (dial_at_all, 1.0))))


def _at(points: Points, dial: float, entry: int) -> float:
    return _between([point[0] for point in points], [point[entry] for point in points], dial)


def _between(places: list[float], values: list[float], place: float) -> float:
    """Linear between the points, constant outside."""
    for (low, high), (first, second) in zip(pairwise(places), pairwise(values), strict=True):
        if place <= high:
            return first + (second - first) * max(0.0, place - low) / (high - low)
    return values[-1]
