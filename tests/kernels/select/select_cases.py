"""Rules to test selections with, and how a selection is held against the eager reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.kernels.select.reference import always_listed_reference, block_logits_reference, select_scored_reference
from sparsepass.kernels.select.rule import Rule
from sparsepass.testing import Case

KEEPS = ("window", "threshold", "coverage")
DIALS = {
    "window": st.sampled_from([1.0, 16.0, 40.0, 2.0**30]),
    "threshold": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    "coverage": st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
}


@st.composite
def rules(draw: st.DrawFn, *, scores: tuple[str, ...] = ("pooled", "mass", "antidiagonal")) -> Rule:
    """A rule of any kind; strides divide blocks of 16."""
    keep = draw(st.sampled_from(KEEPS))
    score = None if keep == "window" else draw(st.sampled_from(scores))
    means = score in ("pooled", "mass")
    return Rule(
        keep,  # type: ignore[arg-type]
        draw(DIALS[keep]),
        score,  # type: ignore[arg-type]
        sink=draw(st.integers(0, 3)),
        sink_in_tokens=keep == "window" and draw(st.booleans()),
        window=draw(st.integers(1, 3)),
        last=draw(st.sampled_from([0, 0, 1, 2, 99])),
        stride=draw(st.sampled_from([4, 8, 16])),
        self_similarity=draw(st.sampled_from([None, None, 0.08, 0.2])) if means else None,
    )


def moved(rule: Rule, by: float) -> Rule:
    """The rule with a dial that computes a little more (``by`` positive) or less."""
    if rule.keep == "threshold":
        return replace(rule, dial=rule.dial * (1 - by))
    if rule.keep == "coverage":
        # Both 1 and a whole row of rounding errors mean everything.
        return replace(rule, dial=min(1.0, rule.dial + by) if by > 0 else rule.dial + by)
    return rule


def score_error(scores: Tensor, q: Tensor, k: Tensor, rule: Rule, mask: dict[str, Any]) -> float:
    """Largest difference from the reference's scores, over allowed blocks; infinite where only one has a score."""
    wanted = block_logits_reference(q, k, score=str(rule.score), stride=rule.stride, **mask)
    _, allowed = always_listed_reference(q, k, rule=replace(rule, self_similarity=None), **mask)
    pairs = allowed & ~((scores == -torch.inf) & (wanted == -torch.inf))
    difference = torch.where(pairs, (scores - wanted).abs(), 0.0).nan_to_num(nan=torch.inf)
    return float(difference.max())


def tolerance(case: Case, q: Tensor, k: Tensor) -> float:
    """What rounding keys' means to the inputs' dtype, and products in it, may move a score."""
    eps = torch.finfo(case.dtype).eps if case.dtype != torch.float32 else 1e-6
    largest = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * abs(case.scale)
    return 2 * eps * largest + 1e-5


def assert_rule_holds(
    named: Tensor, scores: Tensor | None, q: Tensor, k: Tensor, rule: Rule, dial: Tensor | None, mask: dict[str, Any]
) -> None:
    """``named`` bool [B, H, nq, nkv] is what the rule lists for ``scores``, but for sums that hit the dial exactly."""
    listed, allowed = always_listed_reference(q, k, rule=rule, dial=dial, **mask)
    assert not (named & ~allowed).any(), "a block without a visible pair was listed"
    if rule.self_similarity is None:
        assert not (listed & ~named).any(), "an always listed block is missing"
    if rule.keep == "window":
        assert torch.equal(named, listed)
        return
    margin = 1e-5
    dials = [None if dial is None else dial * (1 - by if rule.keep == "threshold" else 1) for by in (margin, -margin)]
    if dial is not None and rule.keep == "coverage":
        dials = [(dial + by).clamp(max=1.0) for by in (margin, -margin)]
    more, less = (
        select_scored_reference(q, k, rule=loose(moved(rule, by), by), dial=one, logits=scores, **mask)
        for by, one in zip((margin, -margin), dials, strict=True)
    )
    assert not (named & ~more).any(), "a block was listed that the rule leaves out"
    assert not (less & ~named).any(), "a block is missing that the rule takes"


def loose(rule: Rule, by: float) -> Rule:
    """The rule with a self-similarity a little greater (``by`` positive) or smaller: rounding decides at the edge."""
    if rule.self_similarity is None:
        return rule
    return replace(rule, self_similarity=rule.self_similarity + (1e-4 if by > 0 else -1e-4))
