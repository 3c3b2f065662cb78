"""Masks composed at random from terms in many spellings, near misses included: what is recognized is exact, always."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsepass.masks.recognize import MaskTerms
from sparsepass.types import Band, Skip
from tests.masks.mask_graphs import check

Tensors = dict[str, torch.Tensor]
Term = Callable[[Tensors], torch.Tensor]
LENGTH = 12


def context(pad: torch.Tensor, ids: torch.Tensor, pos: torch.Tensor) -> Tensors:
    """What terms are made of: inputs [B, S], index grids of rank 4, and their one-dimensional forms."""
    batch, length = pad.shape
    i = torch.arange(length, device=pad.device)
    return {
        "pad": pad,
        "ids": ids,
        "pos": pos,
        "i": i,
        "b": torch.arange(batch, device=pad.device)[:, None, None, None],
        "q": i[None, None, :, None],
        "k": i[None, None, None, :],
        "square": torch.ones(length, length, dtype=torch.bool, device=pad.device),
    }


def documents(c: Tensors, step: int = 1, dim: int = -1, first: int = 0) -> torch.Tensor:
    start = c["pos"][:, first : first + 1] - 1
    return (torch.diff(c["pos"], prepend=start, dim=-1) != step).cumsum(dim)


def same(ids: torch.Tensor, c: Tensors) -> torch.Tensor:
    return ids[c["b"], c["q"]] == ids[c["b"], c["k"]]


CAUSAL: list[Term] = [
    lambda c: c["k"] <= c["q"],
    lambda c: c["q"] >= c["k"],
    lambda c: c["k"] < c["q"] + 1,
    lambda c: ~(c["k"] > c["q"]),
    lambda c: (c["q"] - c["k"]) >= 0,
    lambda c: torch.le(c["k"] + 3, 3 + c["q"]),
    lambda c: c["square"].tril(),
    lambda c: ~torch.triu(c["square"], diagonal=1),
    lambda c: torch.ones_like(c["square"], dtype=torch.float32).tril().bool(),
    lambda c: c["square"].float().masked_fill(c["square"].triu(1), 0.0) == 1,
    lambda c: torch.full(c["square"].shape, -1.0).triu(diagonal=1) == 0,
    lambda c: c["i"][None, :] <= c["i"].unsqueeze(-1),
    lambda c: (c["i"].view(1, -1) > c["i"].view(-1, 1)).logical_not(),
    lambda c: (c["i"][:, None] <= c["i"]).transpose(0, 1),
    lambda c: torch.where(c["q"] < c["k"], False, True),
    lambda c: c["square"].triu().t(),
]
PADDING: list[Term] = [
    lambda c: c["pad"].bool()[:, None, None, :],
    lambda c: c["pad"].to(torch.bool)[c["b"], c["k"]],
    lambda c: (c["pad"] != 0)[:, None, None].expand(-1, 1, c["pad"].shape[1], -1),
    lambda c: c["pad"].bool().unsqueeze(1).unsqueeze(2),
    lambda c: (c["pad"][:, None, None, :] > 0) & c["square"],
    lambda c: ~(c["pad"] == 0).view(c["pad"].shape[0], 1, 1, -1),
    lambda c: c["k"] < c["pad"].sum(-1)[:, None, None, None],
    lambda c: (c["pos"] > 1)[:, None, None, :],
]
SEGMENTS: list[Term] = [
    lambda c: c["ids"][:, None, :, None] == c["ids"][:, None, None, :],
    lambda c: same(c["ids"], c),
    lambda c: torch.eq(c["ids"].unsqueeze(1).unsqueeze(-1), c["ids"][:, None, None]),
    lambda c: ~(c["ids"][:, None, None, :] - c["ids"][:, None, :, None]).ne(0),
]
PACKED: list[Term] = [
    lambda c: same(documents(c), c) & (c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]]),
    lambda c: (c["pos"][:, None, :, None] >= c["pos"][:, None, None, :]) & same(documents(c), c),
    lambda c: same(documents(c), c) & (c["k"] <= c["q"]),
    lambda c: (
        same(documents(c), c)
        & (c["pos"][c["b"], c["k"]] > c["pos"][c["b"], c["q"]] - 3)
        & (c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]])
    ),
    lambda c: same(documents(c), c) & ((c["pos"][c["b"], c["k"]] - c["pos"][c["b"], c["q"]]).abs() <= 2),
]
TRUE: list[Term] = [
    lambda c: c["square"],
    lambda c: c["q"] >= 0,
    lambda c: c["k"] < c["pad"].shape[1],
    lambda c: c["q"].new_ones((), dtype=torch.bool),
    lambda c: torch.zeros_like(c["square"]).logical_not(),
    lambda c: same((torch.diff(c["i"][None], prepend=c["i"][None, :1] - 1) != 1).cumsum(-1), {**c, "b": c["b"] * 0}),
]


def windows(width: int) -> list[Term]:
    return [
        lambda c: c["k"] > c["q"] - width,
        lambda c: c["q"] - c["k"] < width,
        lambda c: (c["k"] - c["q"]) > -width,
        lambda c: c["square"].triu(-(width - 1)),
        lambda c: ~(c["k"] + width <= c["q"]),
    ]


def bidirectional(width: int) -> list[Term]:
    return [
        lambda c: abs(c["q"] - c["k"]) <= width,
        lambda c: (c["k"] - c["q"]).abs() < width + 1,
        lambda c: ~(torch.abs(c["q"] - c["k"]) > width),
        lambda c: (c["k"] >= c["q"] - width) & (c["k"] <= c["q"] + width),
    ]


def near_misses(width: int) -> list[Term]:
    """Terms like the ones above that mean something else. Some are bands all the same; most must be refused."""
    return [
        lambda c: c["k"] < c["q"],
        lambda c: c["k"] <= c["q"] + 1,
        lambda c: c["q"] <= c["k"],
        lambda c: c["square"].tril(width),
        lambda c: c["square"].tril(-1),
        lambda c: c["square"].tril().t(),
        lambda c: c["k"] + c["q"] <= width,
        lambda c: 2 * c["k"] <= c["q"],
        lambda c: c["k"] <= 2 * c["q"],
        lambda c: c["k"] < width,
        lambda c: c["q"] > width,
        lambda c: c["k"] // width == c["q"] // width,
        lambda c: (c["k"] % width) == 0,
        lambda c: abs(c["q"] - c["k"]) >= width,
        lambda c: abs(c["q"] - c["k"]) < width,
        lambda c: (c["k"] <= c["q"]) | (c["k"] < width),
        lambda c: (c["k"] <= c["q"]) | (c["q"] < 0),
        lambda c: (c["k"] > c["q"]) | (c["k"] < c["q"]),
        lambda c: c["k"] == c["q"],
        lambda c: c["k"] != c["q"],
        lambda c: c["pad"].bool()[:, None, :, None],
        lambda c: c["pad"].bool()[:, None, None, :].flip(-1),
        lambda c: c["pad"].bool().roll(1, -1)[c["b"], c["k"]],
        lambda c: c["pad"].bool()[c["b"], c["k"] - 1],
        lambda c: c["pad"].bool()[c["b"] * 0, c["k"]],
        lambda c: c["pad"].bool()[c["b"], c["pos"].clamp(0, 4)[:, None, None, :]],
        lambda c: (c["pad"] == 1)[c["b"], c["k"]] | (c["pad"] == 2)[c["b"], c["k"]],
        lambda c: c["pad"].bool()[:, None, None, :] & c["pad"].bool()[:, None, :, None],
        lambda c: c["pad"].bool()[:, None, None, :] == c["pad"].bool()[:, None, :, None],
        lambda c: c["ids"][c["b"], c["k"]] <= c["ids"][c["b"], c["q"]],
        lambda c: c["ids"][c["b"], c["k"]] == c["pos"][c["b"], c["q"]],
        lambda c: same(c["ids"], c).logical_not(),
        lambda c: c["ids"][c["b"] * 0, c["k"]] == c["ids"][c["b"], c["q"]],
        lambda c: c["ids"][c["b"], c["k"]] == c["ids"][c["b"], c["q"]] + 1,
        lambda c: same(c["ids"] // 2, c),
        lambda c: c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]],
        lambda c: c["pos"][c["b"], c["k"]] > c["pos"][c["b"], c["q"]] - width,
        lambda c: same(documents(c, dim=0), c) & (c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]]),
        lambda c: same(documents(c, step=2), c) & (c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]]),
        lambda c: same(documents(c, first=1), c) & (c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]]),
        lambda c: same(documents(c), c) & (c["ids"][c["b"], c["k"]] <= c["ids"][c["b"], c["q"]]),
        lambda c: same(documents(c), c) & (c["pos"][c["b"] * 0, c["k"]] <= c["pos"][c["b"] * 0, c["q"]]),
        lambda c: same(documents(c), c) & (c["pos"][c["b"], c["k"]] < c["pos"][c["b"], c["q"]]),
        lambda c: same((c["pos"] == 0).cumsum(-1), c) & (c["pos"][c["b"], c["k"]] <= c["pos"][c["b"], c["q"]]),
        lambda c: c["i"][None, None, 1:, None][:, :, :1] >= c["k"],
        lambda c: torch.cat([c["k"], c["k"]], -1)[..., : c["pad"].shape[1]] <= c["q"],
        lambda c: c["k"].to(torch.uint8) - 3 <= c["q"].to(torch.uint8),
        lambda c: c["k"].float() <= c["q"].float() + 0.5,
    ]


def conjunctions(terms: list[Term], how: list[int]) -> Term:
    """``terms`` joined by the spellings of 'and' that ``how`` names."""
    joins: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        lambda a, b: a & b,
        lambda a, b: torch.logical_and(a, b),
        lambda a, b: a * b,
        lambda a, b: torch.where(a, b, False),
        lambda a, b: (b & torch.ones_like(a)).masked_fill(~a, False),
        lambda a, b: ~(~a | ~b),
        lambda a, b: (a.float() * b.float()).bool(),
    ]

    def joined(c: Tensors) -> torch.Tensor:
        mask = terms[0](c)
        for term, join in zip(terms[1:], how, strict=False):
            other = term(c)
            mask = joins[join](mask, other)
        return mask

    return joined


FINISHES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda m: m,
    lambda m: torch.where(m, torch.zeros((), dtype=torch.float32), torch.finfo(torch.float32).min),
    lambda m: torch.zeros_like(m, dtype=torch.bfloat16).masked_fill(~m, torch.finfo(torch.bfloat16).min),
    lambda m: (1.0 - m.to(torch.float16)) * torch.finfo(torch.float16).min,
    lambda m: torch.where(m.logical_not(), float("-inf"), 0.0),
    lambda m: m.contiguous().clone()[..., : m.shape[-1]],
]


def recognized(
    terms: list[Term], finishes: list[Callable[[torch.Tensor], torch.Tensor]], dynamic: bool
) -> list[MaskTerms | Skip]:
    """What each of the masks, all made in one graph, is recognized as."""

    def model(pad: torch.Tensor, ids: torch.Tensor, pos: torch.Tensor) -> list[torch.Tensor]:
        pad + ids + pos  # tells Dynamo that their lengths are the same
        batch, length = pad.shape
        masks = [term(context(pad, ids, pos)) for term in terms]
        return [finish(mask.expand(batch, 1, length, length)) for mask, finish in zip(masks, finishes, strict=True)]

    calls = [inputs(seed, length) for seed, length in enumerate((LENGTH, 5, 20) if dynamic else (LENGTH, LENGTH))]
    if dynamic:
        for tensor in calls[0]:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
    sites = check(model, *calls, dynamic=None if dynamic else False)
    assert all(site.calls >= 1 or isinstance(site.terms, Skip) for site in sites)
    return [site.terms for site in sites[: len(terms)]]


def inputs(seed: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, 3, (3, length), generator=generator) for _ in range(3)]
    draw[1] = draw[1].sort(-1).values
    draw[2][0] = torch.arange(length) % 5
    draw[2][1] = torch.arange(length) + 7
    return draw[0], draw[1], draw[2]


@pytest.mark.parametrize("group", ["causal", "padding", "segments", "packed", "true", "window", "bidirectional"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_spelling_is_recognized(group: str, dynamic: bool) -> None:
    terms: dict[str, list[Term]] = {
        "causal": CAUSAL,
        "padding": PADDING,
        "segments": SEGMENTS,
        "packed": PACKED,
        "true": TRUE,
        "window": windows(4),
        "bidirectional": bidirectional(3),
    }
    expected = {"causal": Band(right=0), "true": Band(), "window": Band(left=3), "bidirectional": Band(3, 3)}
    finishes = [FINISHES[position % len(FINISHES)] for position in range(len(terms[group]))]
    for position, found in enumerate(recognized(terms[group], finishes, dynamic)):
        assert not isinstance(found, Skip), (position, found)
        if group in expected:
            assert found.band == expected[group], position
            assert not found.padding
            assert found.segments is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_near_misses_are_exact_or_refused(dynamic: bool) -> None:
    terms = near_misses(3)
    found = recognized(terms, [FINISHES[0]] * len(terms), dynamic)
    assert len(found) == len(terms)
    assert sum(isinstance(terms, Skip) for terms in found) > len(terms) // 2


@st.composite
def compositions(draw: st.DrawFn) -> Term:
    """Any terms, joined; about half of the draws hold a near miss or a union."""
    width = draw(st.integers(1, LENGTH + 1))
    good = [*CAUSAL, *PADDING, *SEGMENTS, *PACKED, *TRUE, *windows(width), *bidirectional(width)]
    pool = st.one_of(st.sampled_from(good), st.sampled_from(good), st.sampled_from(near_misses(width)))
    terms = draw(st.lists(pool, min_size=1, max_size=4))
    joined = conjunctions(terms, draw(st.lists(st.integers(0, 6), min_size=4, max_size=4)))
    match draw(st.integers(0, 9)):
        case 0:
            return lambda c: ~joined(c)
        case 1:
            other = draw(pool)
            return lambda c: joined(c) | other(c)
    return joined


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(compositions(), st.sampled_from(FINISHES)), min_size=1, max_size=4), st.booleans())
def test_recognized_means_equal(
    masks: list[tuple[Term, Callable[[torch.Tensor], torch.Tensor]]], dynamic: bool
) -> None:
    """The comparison is inside ``check``: element by element, at every call."""
    recognized([term for term, _ in masks], [finish for _, finish in masks], dynamic)
