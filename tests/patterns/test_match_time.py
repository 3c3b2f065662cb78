"""The cost of matching and rewriting grows with the graph, not with its square."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

import sparsepass
from sparsepass.sites import find_sites

HEADS, DIM, LENGTH = 2, 8, 128
FEW, MANY = 8, 32
MOST = 1.25 * MANY / FEW
"""Times as many calls for four times the layers; with a cost that is quadratic it is 16."""
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


def calls(count: int, implementation: str) -> dict[str, int]:
    """Calls of functions, Python's and built in, made by matching alone and by the whole pass; no clock is read."""
    found: dict[str, int] = {}

    def measure(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        runs: dict[str, Callable[[], Any]] = {
            "matching": lambda: find_sites(gm.graph),
            "pass": lambda: sparsepass.backend(gm, inputs, options=OPTIONS),
        }
        assert len(find_sites(gm.graph).sites) == count
        for name, run in runs.items():
            run()  # what is made once in a process is made
            found[name] = calls_of(run)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(layers(count, implementation), backend=measure, dynamic=False)(
            torch.randn(1, LENGTH, HEADS * DIM)
        )
    return found


def calls_of(run: Callable[[], Any]) -> int:
    made = 0

    def seen(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    former = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(former)
    return made


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_cost_is_linear_in_the_layers(implementation: str) -> None:
    few, many = calls(FEW, implementation), calls(MANY, implementation)
    for name in few:
        assert many[name] <= MOST * few[name], (name, few[name], many[name])
