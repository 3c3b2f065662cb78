"""Calls whose budgets are told apart by the text that reached the op: what the guard tests and measurements compare."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import sparsepass
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.rewriting import ops
from sparsepass.types import Budget, TaskClass
from tests.tiny import SPARSE_OPTIONS

BLOCK = 64
HEADS, SITES = 2, 2
DENSITIES = {"single_qa": 0.1, "multi_qa": 0.3, "multi_hop": 0.5, "aggregation": 0.7, "unknown": 0.9}
EDGES = (128, 320, 640)
"""Buckets up to 640 tokens; the first is dense for every hint, the last has half the density."""
HINTS: list[str | None] = [None, "dense", *DENSITIES]
LENGTHS = [60, 128, 129, 320, 321, 640, 641]
_BUDGET = 9
"""Place of the budget's text among the arguments of the op."""

_seen = threading.local()


def policy(share: float = 1.0) -> Policy:
    rules = []
    for task, density in DENSITIES.items():
        for low, high, part in ((EDGES[0], EDGES[1], share), (EDGES[1], EDGES[2], share / 2)):
            budget = Budget("pooled_topk", {"density": density * part, "block": BLOCK})
            rules.append(Rule(TaskClass(task), budget, above=low, up_to=high))
    return Policy(name="guards", rules=tuple(rules))


def options(**changes: Any) -> dict[str, Any]:
    return {**SPARSE_OPTIONS, "sparsepass.policy": policy(), **changes}


def attend(x: torch.Tensor) -> torch.Tensor:
    """Two sites of attention: [B, H, S, D] to the same."""
    first = F.scaled_dot_product_attention(x, x + 1, x, is_causal=True)
    return F.scaled_dot_product_attention(first, x, x, is_causal=True)


def inputs(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, HEADS, length, 16, generator=torch.Generator().manual_seed(length))


def expected(task: str | None, length: int, sites: int = SITES) -> list[str]:
    """The budgets of a call, from the policy's definition: one a site, none where it is dense."""
    if task == "dense" or length <= EDGES[0] or length > EDGES[2]:
        return []
    density = DENSITIES[task or "unknown"] * (1.0 if length <= EDGES[1] else 0.5)
    return [f"pooled_topk(density={density}, block={BLOCK})"] * sites


@contextlib.contextmanager
def spying() -> Iterator[None]:
    """``budgets_of`` sees what the op is given, in each thread its own calls."""
    real = ops._attend

    def spy(*args: Any, **kwargs: Any) -> Any:
        if getattr(_seen, "texts", None) is not None:
            _seen.texts.append(args[_BUDGET])
        return real(*args, **kwargs)

    ops._attend = spy
    try:
        yield
    finally:
        ops._attend = real


def budgets_of(call: Callable[[], Any]) -> list[str]:
    """The budgets that reached the op in this thread during a call, in order."""
    _seen.texts = []
    try:
        call()
        return list(_seen.texts)
    finally:
        _seen.texts = None


def budgets_run(fn: Any, length: int, task: str | None, batch: int = 1) -> list[str]:
    """The budgets of one call without gradients, under a hint or none."""
    x = inputs(length, batch)

    def call() -> None:
        with torch.no_grad(), contextlib.nullcontext() if task is None else sparsepass.task(task):
            fn(x)

    return budgets_of(call)
