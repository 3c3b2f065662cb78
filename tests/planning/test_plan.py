"""Plans of symbolic lengths: neighboring buckets with equal plans are merged, their reasons and rules are not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparsepass
from sparsepass import Policy


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def report(length: int, policy: Policy, **options: Any) -> sparsepass.Report:
    """Of a causal attention whose length is symbolic."""
    chosen = {"sparsepass.policy": policy, "sparsepass.inductor": False, **options}
    compiled = torch.compile(causal, backend=functools.partial(sparsepass.backend, options=chosen), dynamic=True)
    query = torch.zeros(1, 2, length, 64)
    return sparsepass.explain(compiled, query, query, query, task="single_qa")


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_rule_may_end_inside_a_merged_range() -> None:
    """Both sides of the edge at 300 are dense, so one graph serves them; no rule is asked about the whole range."""
    rules = [
        {"task": "*", "lengths": {"up_to": 300}, "budget": {"method": "dense"}},
        {"task": "*", "lengths": {"above": 700}, "budget": {"method": "pooled_topk", "density": 0.5}},
    ]
    policy = Policy.from_json({"version": 1, "default": "dense", "rules": rules})
    (graph,) = report(200, policy, **{"sparsepass.always_sparse": True}).graphs
    assert graph.bucket == "(0, 700]"
    assert any("<= 700" in guard for guard in graph.guards)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_reason_is_that_of_the_length_not_of_the_merged_range(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The prior has a budget for single_qa at 1200 tokens: it is the crossover that is dense there."""
    slower = {"device": "cpu", "dtype": "float32", "head_dim": 64, "density": 0.05, "sparse_ms": 2.0, "dense_ms": 1.0}
    records = [{**slower, "length": length} for length in (1024, 2048, 4096)]
    table = tmp_path / "crossover.json"
    table.write_text(json.dumps({"records": records}))
    monkeypatch.setenv("SPARSEPASS_TUNING", str(table))
    (graph,) = report(1200, sparsepass.Policy(default="prior")).graphs
    (site,) = graph.sites
    assert graph.bucket.startswith("(0, ")
    assert "policy is dense" not in site.entry.reason
    assert "faster" in site.entry.reason or "pays" in site.entry.reason
