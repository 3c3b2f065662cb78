"""Attention outside the graphs is told, once; and what is compiled inside something is found before it is run."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsepass
from sparsepass.errors import PolicyError
from sparsepass.measure.models import ModelError, load_model
from sparsepass.reports.compiled_inside import is_compiled
from sparsepass.reports.explain import NOT_USED
from sparsepass.rewriting import elsewhere

OPTIONS = {"sparsepass.inductor": False}
X = torch.randn(1, 64, 16)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).view(1, -1, 2, 8).transpose(1, 2)
        return self.attend(heads).transpose(1, 2).reshape(x.shape)

    def attend(self, heads: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(heads, heads, heads)


class DisabledAttention(Attention):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, heads: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(heads, heads, heads)


class BrokenAttention(Attention):
    """In two graphs, the second of which has the site."""

    def attend(self, heads: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(heads, heads, heads)


class LinearAttention(Attention):
    def attend(self, heads: torch.Tensor) -> torch.Tensor:
        return heads @ (heads.transpose(-1, -2) @ heads)


@torch.library.custom_op("sparsepass_tests::flash_attn_forward", mutates_args=())
def flash_attn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@flash_attn_forward.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


class KernelAttention(Attention):
    def attend(self, heads: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.sparsepass_tests.flash_attn_forward(heads, heads, heads)
        return out


def logged(net: nn.Module, caplog: pytest.LogCaptureFixture, calls: int = 3) -> list[str]:
    elsewhere._told.clear()
    net.compile(backend="sparsepass", options=OPTIONS)
    with caplog.at_level(logging.WARNING, logger="sparsepass"), torch.no_grad():
        for _ in range(calls):
            net(X)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(DisabledAttention, "DisabledAttention ran in a compiled graph"), (KernelAttention, "kernel of another package")],
)
def test_attention_outside_is_logged_once(
    fresh_dynamo: None, caplog: pytest.LogCaptureFixture, kind: Any, words: str
) -> None:
    (line,) = logged(nn.Sequential(kind(), kind()), caplog)
    assert words in line


@pytest.mark.parametrize("kind", [Attention, BrokenAttention, LinearAttention])
def test_nothing_is_logged_where_nothing_is_missing(
    fresh_dynamo: None, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    assert logged(nn.Sequential(kind(), kind()), caplog) == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [(DisabledAttention, "Dynamo broke the graph"), (KernelAttention, "not matched"), (LinearAttention, "no softmax")],
)
def test_the_report_says_why_nothing_is_sparse(fresh_dynamo: None, kind: Any, words: str) -> None:
    report = sparsepass.explain(kind(), X)
    assert report.compiled
    assert "No attention was matched" in report.notes[0]
    assert words in report.notes[0]


class Pipeline:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def __call__(self, x: torch.Tensor) -> Any:
        return self.net(x)


def closing_over(net: nn.Module) -> Any:
    return lambda: net(X)


def test_what_is_compiled_inside_is_found() -> None:
    plain, inner = nn.Sequential(Attention()), nn.Sequential(Attention())
    inner[0].compile(backend="sparsepass")
    kept = nn.Sequential()
    kept.wrapped = torch.compile(Attention(), backend="sparsepass")  # type: ignore[assignment]
    forward = Attention()
    forward.forward = torch.compile(forward.forward, backend="sparsepass")  # type: ignore[method-assign]
    for one in (inner, kept, nn.Sequential(forward)):
        assert all(map(is_compiled, (one, one.forward, functools.partial(one, X), Pipeline(one), closing_over(one))))
    for none in (plain, plain.forward, DisabledAttention(), Pipeline(plain), F.softmax, closing_over(plain)):
        assert not is_compiled(none)


def test_a_policy_that_is_not_used_is_told(fresh_dynamo: None) -> None:
    net = nn.Sequential(Attention())
    net[0].compile(backend="sparsepass", options=OPTIONS)
    assert NOT_USED in sparsepass.explain(net, X, policy="prior").notes


def test_what_is_missing_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"missing\.json"):
        sparsepass.explain(Attention(), X, policy=tmp_path / "missing.json")
    with pytest.raises(ModelError, match="no such folder"):
        load_model(str(tmp_path / "missing"), attn="sdpa", dtype=torch.float32, device="cpu")
