"""Gradients that a graph turns on and off itself: what needs them stays dense and keeps them, the rest is rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sparsepass.errors import KernelInputError
from sparsepass.functional import sparse_attention
from sparsepass.graph.surroundings import grad_modes
from sparsepass.rewriting.ops import SPARSE_ATTENTION, WATCHED_ATTENTION
from tests.seen_graphs import Seen

T = torch.Tensor
pytestmark = pytest.mark.usefixtures("fresh_dynamo")
G = torch.Generator().manual_seed(0)
K, V = (torch.randn(1, 2, 128, 16, generator=G) for _ in range(2))
X = torch.randn(1, 2, 128, 16, generator=G)
HEADS = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()


def attend(x: T) -> T:
    return F.scaled_dot_product_attention(x, K, V, is_causal=True)


def written(x: T) -> T:
    return torch.softmax(x @ K.transpose(-1, -2) * 0.25, -1) @ V


def enabled(x: T) -> T:
    with torch.enable_grad():
        return attend(x).pow(2).sum()


def residual(x: T) -> T:
    with torch.enable_grad():
        return (x + written(x)).pow(2).sum()


def by_call(x: T) -> T:
    torch.set_grad_enabled(True)
    y = attend(x * 2).pow(2).sum()
    torch.set_grad_enabled(False)
    return y


def no_inference(x: T) -> T:
    with torch.inference_mode(False):
        return attend(x * 2).pow(2).sum()


def biased(x: T) -> T:
    with torch.enable_grad():
        bias = x.sum(-1)[..., None] * 0.1 + torch.zeros(128)
        return F.scaled_dot_product_attention(K, K, V, attn_mask=bias).pow(2).sum()


def checkpointed(x: T) -> T:
    with torch.enable_grad():
        return checkpoint(attend, x, use_reentrant=False).pow(2).sum()  # type: ignore[no-any-return]


def checkpoint_enables(x: T) -> T:
    return checkpoint(enabled, x, use_reentrant=False)  # type: ignore[no-any-return]


def torch_module(x: T) -> T:
    with torch.enable_grad():
        tokens = x.transpose(1, 2).flatten(2)
        return HEADS(tokens, tokens, tokens, need_weights=False)[0].pow(2).sum()  # type: ignore[no-any-return]


def detached_part(x: T) -> T:  # the value path alone has a gradient
    with torch.enable_grad():
        y = x.detach()
        return (torch.softmax(y @ K.transpose(-1, -2) * 0.25, -1) @ x).pow(2).sum()


ENABLING: list[Callable[[T], T]] = [
    *(enabled, residual, by_call, no_inference, biased, checkpointed, checkpoint_enables, torch_module, detached_part)
]


@pytest.mark.parametrize("function", ENABLING, ids=lambda one: one.__name__)
def test_gradients_enabled_inside_are_kept(function: Callable[[T], T]) -> None:
    def gradient(run: Any) -> T:
        x = X.clone().requires_grad_()
        with torch.no_grad():
            energy = run(x)
        return torch.autograd.grad(energy, x)[0]

    seen = Seen(function)
    torch.testing.assert_close(gradient(seen), gradient(function), rtol=1e-4, atol=1e-5)
    assert seen.sparse == 0
    assert "gradients are needed" in seen.reasons or "higher-order" in seen.reasons


def test_only_what_needs_gradients_is_refused() -> None:
    def mixed(x: T) -> T:
        with torch.no_grad():
            fixed = attend(x)
        return attend(x).sum() + (x * fixed).sum()

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    seen = Seen(mixed)
    seen(x).backward()
    mixed(y).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert seen.sparse == 1
    assert "gradients are needed" in seen.reasons


def test_a_detached_query_is_not_read_past_its_detach() -> None:
    """Reading ``x`` itself would make the op see a tensor that requires gradients."""

    def detached(x: T) -> T:
        with torch.enable_grad():
            return written(x.detach())

    with torch.no_grad():
        seen = Seen(detached)
        out = seen(X.clone().requires_grad_())
    assert not out.requires_grad
    torch.testing.assert_close(out, written(X), rtol=1e-4, atol=1e-5)


def test_nothing_requires_gradients_where_they_are_enabled() -> None:
    with torch.no_grad():
        seen = Seen(enabled)
        torch.testing.assert_close(seen(X), enabled(X), rtol=1e-4, atol=1e-3)
    assert seen.sparse == 1


@pytest.mark.parametrize("name", ["grad", "vjp", "jacrev"])
def test_functional_gradients(name: str) -> None:
    def taken(x: T) -> Any:
        if name == "grad":
            return torch.func.grad(lambda x: written(x).pow(2).sum())(x)
        if name == "vjp":
            out, back = torch.func.vjp(attend, x)[:2]
            return back(out)[0]
        return torch.func.jacrev(lambda x: attend(x).sum(-1)[..., :2])(x)

    with torch.no_grad():
        seen = Seen(taken)
        torch.testing.assert_close(seen(X), taken(X), rtol=1e-4, atol=1e-5)
    assert seen.sparse == 0
    assert "torch.func transform" in seen.reasons


def test_grad_modes_follow_nesting() -> None:
    graph = torch.fx.Graph()
    outer = graph.call_function(torch.autograd.grad_mode._enter_inference_mode, (False,))
    inner = graph.call_function(torch.autograd.grad_mode._enter_inference_mode, (True,))
    off = graph.call_function(torch._C._set_grad_enabled, (True,))
    left = graph.call_function(torch.autograd.grad_mode._exit_inference_mode, (inner,))
    end = graph.call_function(torch.autograd.grad_mode._exit_inference_mode, (outer,))
    modes = grad_modes(graph, start=False)
    assert [modes[node] for node in (outer, inner, off, left, end)] == [True, False, True, True, False]


BUDGET = "pooled_topk(density=1.0, block=64)"
REST = (None, None, 0.25, -1, 0, False, BUDGET, 0)
CALLS: dict[str, Callable[[T], Any]] = {
    "query": lambda x: sparse_attention(x, K, V, density=1.0),
    "key": lambda x: sparse_attention(K, x, V, density=1.0),
    "value": lambda x: sparse_attention(K, K, x, density=1.0),
    "bias": lambda x: sparse_attention(K, K, V, density=1.0, bias=x[..., :1]),
    "sinks": lambda x: sparse_attention(K, K, V, density=1.0, sinks=x[0, :, 0, 0]),
    "slopes": lambda x: sparse_attention(K, K, V, density=1.0, slopes=x[0, :, 0, 0]),
    "query ": lambda x: SPARSE_ATTENTION(x, K, V, *REST),
    "bias ": lambda x: SPARSE_ATTENTION(K, K, V, *REST, bias=x[..., :1]),
    "query  ": lambda x: WATCHED_ATTENTION(x, K, V, *REST, sampled=4),
}


@pytest.mark.parametrize("name", CALLS)
def test_direct_calls_refuse_derivatives(name: str) -> None:
    """Neither the function nor the op gives an output that is silently cut off from its inputs."""
    needs = X.clone().requires_grad_()
    with pytest.raises(KernelInputError, match=f"{name.strip()} requires gradients.*no_grad"):
        CALLS[name](needs)
    with forward_ad.dual_level(), pytest.raises(KernelInputError, match="forward-mode"):
        CALLS[name](forward_ad.make_dual(X, X))
    with torch.no_grad():
        CALLS[name](needs)
    CALLS[name](X)


def test_the_op_inside_transforms() -> None:
    def op(x: T) -> T:
        return SPARSE_ATTENTION(x, K, V, *REST)  # type: ignore[no-any-return]

    for taken in (lambda: torch.func.jvp(op, (X,), (X,)), lambda: torch.func.grad(lambda x: op(x).sum())(X)):
        with pytest.raises(KernelInputError, match="computes none"):
            taken()
    with pytest.raises(KernelInputError, match="vmap"):
        torch.vmap(lambda x: sparse_attention(x, K, V, density=1.0))(X[None])
