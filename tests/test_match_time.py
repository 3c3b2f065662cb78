"""The cost of matching and rewriting grows with the graph, not with its square."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import sparsepass
from sparsepass.sites import find_sites

HEADS, DIM, LENGTH = 2, 8, 128
FEW, MANY = 8, 32
MOST = 2.5 * MANY / FEW
"""Times as long for four times the layers, with room for a busy machine; with a cost that is quadratic it is 16."""
OPTIONS = {"sparsepass.inductor": False, "sparsepass.always_sparse": True, "sparsepass.task": "single_qa"}


def layers(count: int, implementation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Causal attention over and over, under one mask, as models have it."""

    def run(x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(LENGTH)
        seen = (place[None, :] <= place[:, None])[None, None].expand(x.shape[0], 1, -1, -1)
        added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)
        for _ in range(count):
            q, k, v = ((x * 0.5).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for _ in range(3))
            if implementation == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            else:
                k, v = (one[:, :, None].expand(-1, -1, 1, -1, -1).reshape(q.shape) for one in (k, v))
                scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5 + added
                weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
                y = torch.matmul(F.dropout(weights, p=0.0, training=False), v)
            x = x + y.transpose(1, 2).contiguous().flatten(2)
        return x

    return run


def seconds(count: int, implementation: str) -> dict[str, float]:
    """The fastest of several rounds, of matching alone and of the whole pass; time of this thread, not of others."""
    found: dict[str, float] = {}

    def measure(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        runs: dict[str, Callable[[], Any]] = {
            "matching": lambda: find_sites(gm.graph),
            "pass": lambda: sparsepass.backend(gm, inputs, options=OPTIONS),
        }
        assert len(find_sites(gm.graph).sites) == count
        for name, run in runs.items():
            times = []
            for _ in range(2):
                began = time.thread_time()
                run()
                times.append(time.thread_time() - began)
            found[name] = min(times)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layers(count, implementation), backend=measure, dynamic=False)(
            torch.randn(1, LENGTH, HEADS * DIM)
        )
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_cost_is_linear_in_the_layers(implementation: str) -> None:
    few, many = seconds(FEW, implementation), seconds(MANY, implementation)
    for name in few:
        assert many[name] <= MOST * few[name], (name, few[name], many[name])
