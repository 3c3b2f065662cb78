"""``explain`` and the counters: what is reported is what ran."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparsepass
from sparsepass import Report
from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.types import Budget
from tests.tiny import SPARSE_OPTIONS, everything_sparse, model, tokens

X = torch.randn(2, 4, 300, 16)


def two_sites(x: torch.Tensor) -> torch.Tensor:
    y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    return F.scaled_dot_product_attention(y, x, x, dropout_p=0.1)


def explained(fn: Any, *args: Any, density: float = 0.5, **kwargs: Any) -> Report:
    options = {**SPARSE_OPTIONS, "sparsepass.policy": everything_sparse(density, block=64)}
    return sparsepass.explain(fn, *args, task="single_qa", options=options, **kwargs)


def test_every_site_is_listed_with_its_outcome(fresh_dynamo: None) -> None:
    report = explained(two_sites, X)
    (graph,) = report.graphs
    first, second = graph.sites
    assert first.outcome == "sparse"
    assert second.outcome == "dense"
    assert second.entry.reason
    assert graph.runs == 1
    assert first.density_asked == 0.5
    assert first.blocks_visible == 2 * 4 * 15
    assert first.kernel == ("native" if cpu_native.available(torch.float32) else "gathered")
    assert first.density_achieved is not None
    assert 0.5 <= first.density_achieved < 1.0
    assert report.peak_memory_bytes


def test_the_report_round_trips_and_draws(fresh_dynamo: None, tmp_path: Any) -> None:
    report = explained(two_sites, X)
    assert Report.from_json(report.to_json()).to_json() == report.to_json()
    json.loads(report.to_json())
    assert report.draw(tmp_path / "graph.png").stat().st_size > 1000


def test_counts_are_of_this_call_alone(fresh_dynamo: None) -> None:
    options = {**SPARSE_OPTIONS, "sparsepass.policy": everything_sparse(1.0, block=64)}
    fn = torch.compile(two_sites, backend=sparsepass.backend, options=options)
    with torch.no_grad():
        for _ in range(3):
            fn(X)
    report = sparsepass.explain(fn, X)
    assert report.graphs[0].sites[0].blocks_computed == 2 * 4 * 15
    assert report.graphs[0].runs == 1


def test_budgets_that_differ_by_head(fresh_dynamo: None) -> None:
    def one(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = torch.randn(1, 4, 640, 16)
    budget = Budget("pooled_topk", {"density": 1.0, "block": 64, "head_densities": (1.0, 0.5, 0.5, 1.0)})
    own = Policy(name="heads", rules=(Rule(None, budget),))
    report = sparsepass.explain(one, x, task="multi_hop", options={**SPARSE_OPTIONS, "sparsepass.policy": own})
    visible = sum(range(1, 11))
    kept = next(k for k in range(1, 11) if sum(min(k, i) for i in range(1, 11)) >= 0.5 * visible)
    half = sum(min(kept, i) for i in range(1, 11))
    assert report.graphs[0].sites[0].blocks_computed == 2 * visible + 2 * half


def test_layers_may_have_their_own_budgets(fresh_dynamo: None) -> None:
    budget = Budget("pooled_topk", {"density": 0.5, "block": 64})
    own = Policy(name="layers", rules=(Rule(None, budget, layers=Ranges.parse("1")),))
    report = sparsepass.explain(
        model(), tokens(1, 300), use_cache=False, task="multi_qa", options={**SPARSE_OPTIONS, "sparsepass.policy": own}
    )
    assert [site.outcome for site in report.graphs[0].sites] == ["dense_masked", "sparse"]


def test_what_was_measured_to_be_slower_stays_dense_with_the_reason(fresh_dynamo: None) -> None:
    policy = everything_sparse(0.5)
    options = {"sparsepass.inductor": False, "sparsepass.policy": policy}
    report = sparsepass.explain(two_sites, X, task="single_qa", options=options)
    site = report.graphs[0].sites[0]
    assert site.outcome == "dense"
    assert "300 keys" in site.entry.reason


def test_attention_inside_a_checkpoint_is_rewritten(fresh_dynamo: None) -> None:
    from torch.utils.checkpoint import checkpoint

    def inner(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def outer(x: torch.Tensor) -> Any:
        return checkpoint(inner, x, use_reentrant=False)

    (graph,) = explained(outer, X).graphs
    assert not graph.refused
    assert graph.sites[0].outcome == "sparse"


def test_compiling_is_logged(fresh_dynamo: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sparsepass"):
        explained(two_sites, X)
    assert "2 attention sites, 1 sparse" in caplog.text
