"""Safe density against length: read off loss curves, fitted by a power law, with bootstrap intervals over contexts.

For each length the loss under budgets of rising density is made monotone (isotonic regression), and the safe density is
where it falls to what is tolerated, interpolated in the logarithm of the density. The law is a power of the length,
least squares in logarithms. All intervals are percentiles over resampled contexts, curve and fit done anew for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLED = 1000


@dataclass(frozen=True)
class Curve:
    """One task at one length: ``right`` and ``net`` (lost - gained) float64 [contexts, budgets], what dense got right
    and what each budget lost net of it; ``densities``: what the budgets computed, rising."""

    length: int
    right: Tensor
    net: Tensor
    densities: tuple[float, ...]

    def losses(self, rows: Tensor) -> Tensor:
        """Loss of each budget, float64 [..., budgets], over contexts ``rows`` int64 [..., contexts]."""
        right, net = self.right[rows].sum(-2), self.net[rows].sum(-2)
        return torch.where(right > 0, net / right.clamp(min=1e-9), 0.0)

    def safe(self, tolerated: float, rows: Tensor | None = None) -> Tensor:
        """The safe density over contexts ``rows`` (all, each once, if absent), float64 [...]; 1 where none is safe, the
        sparsest one's where all are."""
        if rows is None:
            rows = torch.arange(len(self.right))
        losses = falling(self.losses(rows))
        density = torch.tensor([*self.densities, 1.0], dtype=torch.float64).log()
        whole = torch.cat([losses, torch.zeros_like(losses[..., :1])], -1)  # dense loses nothing
        under = whole <= tolerated
        first = under.to(torch.int8).argmax(-1)
        before = (first - 1).clamp(min=0)
        high, low = (whole.gather(-1, at[..., None])[..., 0] for at in (before, first))
        share = ((high - tolerated) / (high - low).clamp(min=1e-12)).clamp(0.0, 1.0)
        found = density[before] + share * (density[first] - density[before])
        return torch.where(first == 0, density[0], found).exp()


def falling(losses: Tensor) -> Tensor:
    """The nearest curve, in squares, that never rises along the last dimension: max over starts of min over ends."""
    count = losses.shape[-1]
    sums = torch.cat([torch.zeros_like(losses[..., :1]), losses.cumsum(-1)], -1)
    best = torch.full_like(losses, -torch.inf)
    for place in range(count):
        ends = torch.arange(place + 1, count + 1)
        starts = torch.arange(place + 1)
        means = (sums[..., ends][..., None, :] - sums[..., starts][..., :, None]) / (ends[None, :] - starts[:, None])
        best[..., place] = means.amax(-1).amin(-1)
    return best


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Fit:
    """Safe density by length for one task: ``density = scale * (length / 1024)^-exponent``."""

    lengths: tuple[int, ...]
    safe: tuple[Interval, ...]
    scale: Interval
    exponent: Interval
    falls: float
    """Share of the resamples in which safe density falls with length: how sure that is."""
    means: Tensor
    """Mean logarithm of the safe density over the lengths, in each resample: to compare tasks."""
    censored: bool = False
    """Whether the sparsest budget is safe at the shortest length: no fall can be read off from there."""

    def at(self, length: float) -> float:
        """Of the line, at a length in tokens; 1 at most."""
        return min(1.0, self.scale.value * math.exp(-self.exponent.value * math.log(length / 1024)))


def fit(curves: Sequence[Curve], tolerated: float, seed: int = 0) -> Fit:
    """Fit one task's curves, one per length; with one length the exponent is NaN."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.stack([curve.safe(tolerated) for curve in curves])
    drawn = []
    for curve in curves:
        count = len(curve.right)
        drawn.append(curve.safe(tolerated, torch.randint(count, (RESAMPLED, count), generator=generator)))
    resampled = torch.stack(drawn, -1)  # [RESAMPLED, lengths]
    x = torch.tensor([math.log(curve.length / 1024) for curve in curves], dtype=torch.float64)
    scale, exponent = _line(x, points.log())
    scales, exponents = _line(x, resampled.log())
    return Fit(
        tuple(curve.length for curve in curves),
        tuple(interval(float(points[place]), resampled[:, place]) for place in range(len(curves))),
        interval(float(scale), scales),
        interval(float(exponent), exponents),
        float((exponents > 0).double().mean()),
        resampled.log().mean(-1),
        censored=math.isclose(float(points[0]), curves[0].densities[0], rel_tol=1e-6),
    )


def interval(value: float, resampled: Tensor) -> Interval:
    """An estimate with the 2.5 and 97.5 percentiles of its resamples."""
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Interval(value, low, high)


def difference(one: Fit, other: Fit) -> Interval:
    """How many times the safe density of one task is another's, geometric mean over the lengths."""
    ratios = (one.means - other.means).exp()
    mean = [sum(math.log(safe.value) for safe in fit.safe) / len(fit.safe) for fit in (one, other)]
    return interval(math.exp(mean[0] - mean[1]), ratios)


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and exponent of the least-squares line through logarithms [..., lengths]."""
    if len(x) < 2:
        return y[..., 0].exp(), torch.full_like(y[..., 0], torch.nan)
    centered = x - x.mean()
    slope = (centered * y).sum(-1) / centered.square().sum()
    return (y.mean(-1) - slope * x.mean()).exp(), -slope
