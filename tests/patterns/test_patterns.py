"""Attention of users' own models, patterns from other packages, attention behind single nodes."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import sparsepass
from examples import own_models, own_pattern
from sparsepass.patterns import catalogue
from sparsepass.reports.report import GraphReport
from tests.tiny import SPARSE_OPTIONS, everything_sparse

T = torch.Tensor
LENGTH, WIDTH = 200, own_models.WIDTH
OPTIONS = {**SPARSE_OPTIONS, "sparsepass.policy": everything_sparse(1.0, block=64)}


def x(*shape: int) -> T:
    return torch.randn(shape or (2, LENGTH, WIDTH), generator=torch.Generator().manual_seed(0))


def run(model: Callable[..., Any], *args: T) -> GraphReport:
    """The report of a model that computes, at full density, what it computes uncompiled."""
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(*args)
        compiled: Any = torch.compile(model, backend=sparsepass.backend, options=OPTIONS)
        report = sparsepass.explain(compiled, *args, task="single_qa")
        torch.testing.assert_close(compiled(*args), wanted, atol=2e-5, rtol=2e-5)
    (graph,) = report.graphs
    return graph


MASKS = {
    "nanoGPT": "full + tensor",  # the triangle is a buffer: what it holds is not in the graph
    "einops": "causal",
    "timm": "full",
    "bmm and a bias": "full + bias",
    "nn.MultiheadAttention": "causal",
    "SDPA": "full + bias",
}


@pytest.mark.parametrize("name", MASKS)
def test_models_written_by_hand(name: str) -> None:
    graph = run(own_models.models(LENGTH)[name], x())
    assert not graph.refused
    (site,) = graph.sites
    assert site.blocks_computed > 0
    assert str(site.entry.site.mask) == MASKS[name]


def test_probabilities_that_are_returned() -> None:
    graph = run(own_models.models(LENGTH)["returns probabilities"], x())
    assert not graph.sites
    assert "returned to the caller" in graph.refused[0].reason


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Registers entry points of the group for one test."""

    def register(**values: str) -> None:
        found = [importlib.metadata.EntryPoint(name, value, catalogue.GROUP) for name, value in values.items()]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found if group == catalogue.GROUP else [])
        catalogue.every_pattern.cache_clear()

    yield register
    monkeypatch.undo()
    catalogue.every_pattern.cache_clear()


def test_a_pattern_of_another_package(registered: Callable[..., None]) -> None:
    model = own_pattern.Attend(LENGTH)
    refused = run(model, x(1, 4, LENGTH, 16)).refused
    assert "multiplied by" in refused[0].reason
    registered(gpt1="examples.own_pattern:MULTIPLIED_MASK")
    graph = run(model, x(1, 4, LENGTH, 16))
    assert not graph.refused
    assert graph.sites[0].entry.site.spelling == "multiplied_mask"
    assert graph.sites[0].blocks_computed == 4 * 10


def test_a_pattern_that_does_not_load_is_logged(
    registered: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    registered(missing="examples.own_pattern:MISSING", wrong="examples.own_pattern:Attend")
    with caplog.at_level(logging.WARNING, logger="sparsepass"):
        assert catalogue.every_pattern() == catalogue.CATALOGUE
    assert "'missing'" in caplog.text
    assert "accepted is a sparsepass.patterns.pattern.Pattern" in caplog.text


def test_checkpointed_regions_are_written_out() -> None:
    projection = nn.Linear(16, 16)

    def inner(q: T) -> T:
        q = projection(q)
        return (q @ q.transpose(-2, -1) * 0.25).softmax(-1) @ q

    def model(q: T) -> Any:
        y = checkpoint(inner, q, use_reentrant=False)
        return checkpoint(lambda t: checkpoint(inner, t, use_reentrant=False) * 2, y, use_reentrant=False)

    graph = run(model, x(2, 4, LENGTH, 16))
    assert len(graph.sites) == 2
    assert all(site.blocks_computed for site in graph.sites)
    assert not graph.refused


def test_checkpointed_regions_stay_where_gradients_are_needed() -> None:
    def model(q: T) -> Any:
        return checkpoint(lambda t: F.scaled_dot_product_attention(t, t, t), q, use_reentrant=False)

    torch._dynamo.reset()
    q = x(2, 4, LENGTH, 16).requires_grad_()
    compiled: Any = torch.compile(model, backend=sparsepass.backend, options=OPTIONS)
    compiled(q).sum().backward()
    wanted = torch.autograd.grad(model(q).sum(), q)[0]
    assert q.grad is not None
    torch.testing.assert_close(q.grad, wanted)


def multi_head(**kwargs: Any) -> Callable[[T], Any]:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **kwargs.pop("module", {})).eval()
    part = kwargs.pop("part", 0)
    return lambda y: module(y, y, y, **kwargs)[part]


def padding() -> T:
    hidden = torch.zeros(2, LENGTH, dtype=torch.bool)
    hidden[0, LENGTH // 2 :] = True
    return hidden


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"need_weights": False},
        {"need_weights": False, "key_padding_mask": padding()},
        {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), "key_padding_mask": padding()},
        {"attn_mask": torch.randn(8, LENGTH, LENGTH), "need_weights": False},
        {"attn_mask": torch.ones(LENGTH, LENGTH).triu(1).bool(), "is_causal": True, "need_weights": False},
        {"module": {"bias": False}},
    ],
    ids=["plain", "no weights", "padding", "both", "by head", "causal", "no bias"],
)
def test_multi_head_attention_is_written_out(kwargs: dict[str, Any]) -> None:
    (site,) = run(multi_head(**dict(kwargs)), x()).sites
    assert site.blocks_computed > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (multi_head(part=1), (x(),), "returns its attention weights"),
        (multi_head(module={"add_bias_kv": True}), (x(),), "has keys of its own"),
        (multi_head(module={"add_zero_attn": True}), (x(),), "adds a key of zeros"),
        (nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True).eval(), (x(),), "set_fastpath_enabled(False)"),
        (lambda q: flex_attention(q, q, q), (x(2, 4, LENGTH, 16),), "this is FlexAttention"),
    ],
    ids=["weights", "bias_kv", "zero", "encoder layer", "flex"],
)
def test_what_stays_is_named(model: Callable[..., Any], args: tuple[T, ...], reason: str) -> None:
    graph = run(model, *args)
    assert not graph.sites
    assert reason in graph.refused[0].reason


def test_writes_are_read_in_their_order() -> None:
    def model(q: T) -> T:
        scores = q @ q.mT
        scores /= 4.0
        scores.masked_fill_(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ q

    (site,) = run(model, x(2, 4, LENGTH, 16)).sites
    assert str(site.entry.site.mask) == "causal"
    assert site.blocks_computed


def test_a_write_that_something_else_sees_is_refused() -> None:
    def model(q: T) -> tuple[T, T]:
        scores = q @ q.mT
        first = scores[..., :1]
        scores.mul_(0.25)
        return scores.softmax(-1) @ q, first * 2

    graph = run(model, x(2, 4, LENGTH, 16))
    assert not graph.sites
    assert "is also used by 'first'" in graph.refused[0].reason


def test_lengths_may_be_dynamic() -> None:
    model = own_models.models(LENGTH)["einops"]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=sparsepass.backend, options=OPTIONS, dynamic=True)
    with torch.no_grad():
        for length in (200, 210, 333):
            y = x(2, length, WIDTH)
            torch.testing.assert_close(compiled(y), model(y), atol=2e-5, rtol=2e-5)
