"""Sizes and numbers that are symbols, operands that broadcast, ATen's names: found, right, and no graph too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import sparsepass
from sparsepass import Policy
from sparsepass.graph import torch_private

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
T = torch.Tensor
ATEN = torch.ops.aten
RULE = {"task": "*", "budget": {"method": "pooled_topk", "density": 1.0, "block": 64}}
EVERY = Policy.from_json({"version": 1, "rules": [RULE]})
SOME = Policy.from_json({"version": 1, "rules": [RULE, {**RULE, "heads": "0-1"}]})


def drawn(*sizes: int) -> T:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def qkv(batch: int = 2, heads: int = 4, length: int = 128, kv_heads: int | None = None) -> tuple[T, ...]:
    kv = (batch, kv_heads or heads, length, 16)
    return drawn(batch, heads, length, 16), drawn(*kv), drawn(*kv)


def options(policy: Policy = EVERY) -> dict[str, Any]:
    return {"sparsepass.policy": policy, "sparsepass.always_sparse": True, "sparsepass.inductor": False}


def run(code: Callable[..., T], *calls: tuple[T, ...], dynamic: bool | None = None, policy: Policy = EVERY) -> Any:
    """The report of the last call, after all were compared with eager; Dynamo alone makes as many graphs."""
    with torch.no_grad():
        alone = CompileCounter()
        plain = torch.compile(code, backend=alone, dynamic=dynamic)
        for call in calls:
            plain(*call)
        torch._dynamo.reset()
        before = torch_private.compile_count()
        compiled = torch.compile(code, backend="sparsepass", options=options(policy), dynamic=dynamic)
        for call in calls:
            torch.testing.assert_close(compiled(*call), code(*call), rtol=2e-5, atol=2e-5)
        assert torch_private.compile_count() - before <= alone.frame_count
        return sparsepass.explain(compiled, *calls[-1])


def outcomes(report: Any) -> list[str]:
    return [str(site.outcome) for graph in report.graphs for site in graph.sites]


def reasons(report: Any) -> list[str]:
    return [skip.reason for graph in report.graphs for skip in graph.refused] + [
        site.entry.reason for graph in report.graphs for site in graph.sites if site.entry.reason
    ]


def causal(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def written(q: T, k: T, v: T) -> T:
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v


@pytest.mark.parametrize("code", [causal, written, grouped])
@pytest.mark.parametrize("policy", [SOME], ids=["rules of some heads"])
def test_batch_and_heads_that_vary_share_a_graph(code: Callable[..., T], policy: Policy) -> None:
    shared = 2 if code is grouped else 1
    calls = [qkv(size, 2 * size, 100 + size, 2 * size // shared) for size in (2, 3, 4)]
    assert outcomes(run(code, *calls, dynamic=True, policy=policy)) == ["sparse"]


@pytest.mark.parametrize("dim", [0, 1])
def test_sizes_that_follow_the_data_are_no_error(dim: int) -> None:
    def chosen(x: T, keep: T) -> T:
        cut = x.index_select(dim, keep.nonzero().squeeze(1))
        return F.scaled_dot_product_attention(cut, cut, cut)

    calls = [(drawn(6, 6, 64, 16), torch.arange(6) < count) for count in (3, 5)]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert outcomes(run(chosen, *calls)) == ["sparse"]


def test_a_head_size_that_follows_the_data_is_refused() -> None:
    def chosen(x: T, keep: T) -> T:
        cut = x[..., keep.nonzero().squeeze(1)]
        return F.scaled_dot_product_attention(cut, cut, cut)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = run(chosen, (drawn(2, 2, 64, 32), torch.arange(32) < 16))
    assert "follows the data" in reasons(report)[0]


def test_a_head_size_that_is_marked_dynamic_is_not_guarded() -> None:
    inputs = qkv()
    for one in inputs:
        torch._dynamo.mark_dynamic(one, 3)
    assert "marked as dynamic" in reasons(run(causal, inputs))[0]


class Numbers(nn.Module):
    """Numbers of a module, which ``dynamic=True`` makes symbols."""

    def __init__(self, code: Callable[[Numbers, T, T, T], T], scale: float = 0.3, cap: float = 2.0) -> None:
        super().__init__()
        self.code, self.scale, self.cap = code, scale, cap

    def forward(self, q: T, k: T, v: T) -> T:
        return self.code(self, q, k, v)


NUMBERS: dict[str, Callable[[Numbers, T, T, T], T]] = {
    "sdpa": lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=m.scale),
    "two": lambda m, q, k, v: torch.softmax(q @ k.mT * m.scale / m.cap, -1) @ v,
    "both": lambda m, q, k, v: torch.softmax((q * m.scale) @ (k * m.scale).mT, -1) @ v,
    "cap": lambda m, q, k, v: torch.softmax(m.cap * torch.tanh(q @ k.mT * m.scale / m.cap), -1) @ v,
    "cap_then": lambda m, q, k, v: torch.softmax(torch.tanh(q @ k.mT / m.cap) * m.cap / m.scale, -1) @ v,
    "added": lambda m, q, k, v: torch.softmax(q @ k.mT * m.scale + m.cap, -1) @ v,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(("scale", "cap"), [(0.3, 2.0), (-0.3, -2.0)])
def test_dynamic_numbers_are_multiplied(name: str, scale: float, cap: float) -> None:
    assert outcomes(run(Numbers(NUMBERS[name], scale, cap), qkv(), dynamic=True)) == ["sparse"]


def test_a_dynamic_fill_is_refused() -> None:
    def fill(m: Numbers, q: T, k: T, v: T) -> T:
        i = torch.arange(q.shape[2])
        return torch.softmax((q @ k.mT).masked_fill(i[None] > i[:, None], m.cap), -1) @ v

    assert "a number that is not known" in reasons(run(Numbers(fill, cap=-1e9), qkv(), dynamic=True))[0]


BROADCAST: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = {
    "query of batch 1": ((1, 4, 80, 16), (3, 4, 96, 16), (3, 4, 96, 16), None),
    "key of batch 1": ((3, 4, 80, 16), (1, 4, 96, 16), (1, 4, 96, 16), None),
    "values of batch 1": ((3, 4, 80, 16), (3, 4, 96, 16), (1, 4, 96, 8), None),
    "one query head": ((2, 1, 80, 16), (2, 4, 96, 16), (2, 4, 96, 16), None),
    "one key head": ((2, 4, 80, 16), (2, 1, 96, 16), (2, 1, 96, 16), None),
    "one value head": ((2, 4, 80, 16), (2, 4, 96, 16), (2, 1, 96, 16), None),
    "two dimensions": ((80, 16), (96, 16), (96, 16), (80, 96)),
    "three": ((3, 80, 16), (3, 96, 16), (3, 96, 16), (3, 80, 96)),
    "three, one of 1": ((3, 80, 16), (1, 96, 16), (1, 96, 16), None),
    "ranks differ": ((2, 4, 80, 16), (4, 96, 16), (96, 16), None),
    "five": ((2, 3, 4, 80, 16), (2, 1, 4, 96, 16), (1, 3, 4, 96, 16), (1, 3, 1, 1, 96)),
    "mask of heads": ((2, 4, 80, 16), (2, 4, 96, 16), (2, 4, 96, 16), (4, 1, 96)),
}


@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("spelling", ["sdpa", "written"])
def test_operands_broadcast_as_in_eager(name: str, spelling: str) -> None:
    *sizes, seen = BROADCAST[name]
    mask = None if seen is None else drawn(*seen)
    q, k, v = (drawn(*one) for one in sizes)

    def attend(q: T, k: T, v: T) -> T:
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) * 0.25
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v

    found = outcomes(run(attend, (q, k, v)))
    assert found == ["sparse"] or spelling == "written"


def test_grouped_queries_without_a_batch() -> None:
    assert outcomes(run(grouped, tuple(one[0] for one in qkv(1, 4, 96, 2)))) == ["sparse"]


class Window(nn.Module):
    def forward(self, q: T, k: T, v: T) -> T:
        i = torch.arange(q.shape[2])
        far = (i[None, :] > i[:, None]) | (i[:, None] - i[None, :] > 40)
        k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
        weights = torch.softmax((q @ k.mT * 0.25).masked_fill(far, float("-inf")), -1, dtype=torch.float32)
        return (weights.to(q.dtype) @ v).transpose(1, 2).contiguous()


class Causal(nn.Module):
    def forward(self, q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("model", [Window(), Causal()], ids=["written", "sdpa"])
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_programs_are_matched(model: nn.Module, decomposed: bool) -> None:
    inputs = qkv(kv_heads=2)
    with torch.no_grad():
        program = torch.export.export(model, inputs)
        program = program.run_decompositions() if decomposed else program
        report = run(program.module(), inputs)
    assert outcomes(report) == ["sparse"]
    wanted = "causal" if isinstance(model, Causal) else "causal window 41"
    assert str(report.graphs[0].sites[0].entry.site.mask) == wanted


CALLED: dict[str, Callable[[T, T, T], T]] = {
    "packet": lambda q, k, v: ATEN.scaled_dot_product_attention(q, k, v, is_causal=True),
    "overload": lambda q, k, v: ATEN.scaled_dot_product_attention.default(q, k, v),
    "flash": lambda q, k, v: ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0],
    "math": lambda q, k, v: ATEN._scaled_dot_product_attention_math(q, k, v, None, 0.0, True)[0],
    "mT": lambda q, k, v: torch.softmax(q @ ATEN.mT(k) * 0.25, -1) @ v,
    "mH": lambda q, k, v: torch.softmax(q @ k.mH * 0.25, -1) @ v,
    "adjoint": lambda q, k, v: torch.softmax(q @ k.adjoint() * 0.25, -1) @ v,
}


@pytest.mark.parametrize("name", CALLED)
def test_operations_called_by_their_aten_names_are_matched(name: str) -> None:
    assert outcomes(run(CALLED[name], qkv())) == ["sparse"]


def test_a_kernel_whose_other_results_are_used_is_named() -> None:
    def both(q: T, k: T, v: T) -> T:
        out, lse = ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        mixed: T = out * lse.mean()
        return mixed

    assert "SDPA's kernel" in reasons(run(both, qkv()))[0]
