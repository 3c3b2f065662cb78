"""torch.func transforms, tensor subclasses and replaced functions: right, and left alone with the reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsepass.policies.policy import builtin_policy
from sparsepass.rewriting.ops import SPARSE_ATTENTION
from tests.seen_graphs import Seen

T = torch.Tensor
pytestmark = pytest.mark.usefixtures("fresh_dynamo")
G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 4, 128, 16, generator=G) for _ in range(3))


def fused(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written(q: T, k: T, v: T) -> T:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def mapped(q: T, k: T, v: T) -> T:
    return torch.vmap(written)(q, k, v)


def mapped_fused(q: T, k: T, v: T) -> T:
    return torch.vmap(fused)(q[:, None], k[:, None], v[:, None])


def mapped_over_heads(q: T, k: T, v: T) -> T:
    return torch.vmap(written, in_dims=1, out_dims=1)(q, k, v)


def mapped_twice(q: T, k: T, v: T) -> T:
    return torch.vmap(torch.vmap(written))(q, k, v)


def mapped_queries(q: T, k: T, v: T) -> T:  # keys and values come from outside
    return torch.vmap(lambda one: written(one, k[0], v[0]))(q)


def pushed(q: T, k: T, v: T) -> T:
    return torch.func.jvp(lambda q: written(q, k, v), (q,), (q,))[1]  # type: ignore[no-any-return]


def curvature(q: T, k: T, v: T) -> T:
    inner = lambda q: written(q, k, v).pow(2).sum()  # noqa: E731
    return torch.func.jvp(torch.func.grad(inner), (q,), (q,))[1]  # type: ignore[no-any-return]


INSIDE = [mapped, mapped_fused, mapped_over_heads, mapped_twice, mapped_queries, pushed, curvature]


@pytest.mark.parametrize("function", INSIDE, ids=lambda one: one.__name__)
def test_attention_inside_a_transform_is_left_alone(function: Callable[[T, T, T], T]) -> None:
    with torch.no_grad():
        want = function(Q, K, V)
        seen = Seen(function)
        torch.testing.assert_close(seen(Q, K, V), want, rtol=1e-4, atol=1e-5)
    assert seen.sparse == 0
    assert "torch.func transform" in seen.reasons


def test_attention_beside_a_transform_is_rewritten() -> None:
    def model(q: T, k: T, v: T) -> T:
        scaled = torch.vmap(lambda one: one * 2)(q)
        return fused(scaled, k, v) + torch.vmap(written)(q, k, v)

    with torch.no_grad():
        seen = Seen(model)
        torch.testing.assert_close(seen(Q, K, V), model(Q, K, V), rtol=1e-4, atol=1e-5)
    assert seen.sparse == 1


def test_a_mask_made_by_vmap_is_read_as_a_tensor() -> None:
    def model(q: T, k: T, v: T) -> T:
        places = torch.arange(128)
        rows = torch.vmap(lambda i: torch.vmap(lambda j: j <= i)(places))(places)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rows[None, None])

    with torch.no_grad():
        seen = Seen(model)
        torch.testing.assert_close(seen(Q, K, V), fused(Q, K, V), rtol=1e-4, atol=1e-5)


def test_functional_call_is_as_any_other() -> None:
    layer = torch.nn.Linear(16, 16)

    def model(q: T, k: T, v: T) -> T:
        return fused(torch.func.functional_call(layer, {"weight": torch.eye(16)}, (q,)), k, v)

    with torch.no_grad():
        seen = Seen(model)
        torch.testing.assert_close(seen(Q, K, V), model(Q, K, V), rtol=1e-4, atol=1e-5)
    assert seen.sparse == 1


def test_jagged_tensors_are_left_alone() -> None:
    rows = [torch.randn(length, 4, 16, generator=G) for length in (40, 90)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)

    def model(x: T) -> T:
        x = x.transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x)

    with torch.no_grad():
        want = model(nested).transpose(1, 2).values()
        seen = Seen(model)
        torch.testing.assert_close(seen(nested).transpose(1, 2).values(), want, rtol=1e-4, atol=1e-5)
    assert seen.sparse == 0
    assert any("NestedTensor" in reason for graph in seen.graphs for reason in graph.findings.view.left_alone.values())


def two(tensor: T) -> T:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(tensor, tensor.clone())  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", [fused, written], ids=lambda one: one.__name__)
def test_wrapper_subclasses_are_left_alone(attention: Callable[[T, T, T], T]) -> None:
    with torch.no_grad():
        seen = Seen(attention)
        got: Any = seen(two(Q), two(K), two(V))
        torch.testing.assert_close(got.a, attention(Q, K, V), rtol=1e-4, atol=1e-5)
    assert seen.sparse == 0
    assert "TwoTensor" in seen.reasons


def test_plain_activations_beside_a_subclass_are_rewritten() -> None:
    """Quantized weights are subclasses; what a layer with them yields is not."""

    def model(q: T, k: T, v: T, weight: Any) -> T:
        return fused(q, k, v) + weight.a.sum()  # type: ignore[no-any-return]

    with torch.no_grad():
        seen = Seen(model)
        weight = two(torch.eye(16))
        torch.testing.assert_close(seen(Q, K, V, weight), fused(Q, K, V) + 16, rtol=1e-4, atol=1e-5)
    assert seen.sparse == 1


def replacement(
    query: T,
    key: T,
    value: T,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> T:
    """Another attention, which takes fewer arguments than torch's: its output says that it ran."""
    weights = query @ key.transpose(-1, -2) * 0.25
    if is_causal:
        weights = weights.masked_fill(torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return (weights.exp() / weights.exp().sum(-1, keepdim=True)) @ value + 1.0


@pytest.mark.parametrize("hint", ["multi_hop", "dense"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_replaced_function_gets_the_calls_of_the_model_alone(
    monkeypatch: pytest.MonkeyPatch, in_graph: bool, hint: str
) -> None:
    """``in_graph``: the replacement is one node for Dynamo, and no attention of ours."""

    def model(q: T, k: T, v: T) -> T:
        hidden = torch.ones(128, 128, dtype=torch.bool).triu(1)
        out = torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, float("-inf")), -1) @ v
        return out + F.scaled_dot_product_attention(q, k, v, is_causal=True)

    given = torch.compiler.allow_in_graph(replacement) if in_graph else replacement
    monkeypatch.setattr(F, "scaled_dot_product_attention", given)
    with torch.no_grad():
        want = model(Q, K, V)
        seen = Seen(model)
        if hint == "dense":
            seen.options["sparsepass.policy"] = builtin_policy()
            seen.options["sparsepass.always_sparse"] = False
        torch.testing.assert_close(seen(Q, K, V), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "linear"])
def test_torch_modules_call_replaced_functions(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """nn.MultiheadAttention calls them, so that it is not written out with torch's own."""
    layer = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval()
    own = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: own(*args, **kwargs) + 1.0)

    def model(x: T) -> T:
        return layer(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    x = torch.randn(2, 64, 32, generator=G)
    with torch.no_grad():
        want = torch.compile(model, backend="eager")(x)  # run as it is, the module has a faster way without them
        torch.testing.assert_close(Seen(model)(x), want, rtol=1e-4, atol=1e-5)


def test_the_op_calls_torchs_own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a replaced function was called")

    want = fused(Q, K, V)
    for name in ("scaled_dot_product_attention", "linear", "softmax", "pad"):
        monkeypatch.setattr(F, name, never)
    for budget in ("dense", "full", "pooled_topk(density=1.0, block=64)", "top_p(coverage=1.0, block=64)"):
        out = SPARSE_ATTENTION(Q, K, V, None, None, 0.25, -1, 0, False, budget, 0)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


def test_names_of_operations_are_torchs_own() -> None:
    from sparsepass.graph.canonical import is_own

    assert is_own(F.scaled_dot_product_attention)
    assert is_own(F.softmax)
    assert is_own(operator.matmul)
    assert not is_own(replacement)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("function", [mapped, mapped_fused, pushed], ids=lambda one: one.__name__)
def test_transforms_on_cuda(function: Callable[[T, T, T], T], mode: str | None) -> None:
    given = [one.to("cuda", torch.bfloat16) for one in (Q, K, V)]
    with torch.no_grad():
        want = function(*given)
        seen = Seen(function, inductor=True, mode=mode)
        for _ in range(3):
            got = seen(*given)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert seen.sparse == 0


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [fused, written], ids=lambda one: one.__name__)
def test_subclasses_on_cuda(attention: Callable[[T, T, T], T]) -> None:
    given = [one.to("cuda", torch.bfloat16) for one in (Q, K, V)]
    with torch.no_grad():
        want = attention(*given)
        seen = Seen(attention, inductor=True, mode="reduce-overhead")
        for _ in range(3):
            got: Any = seen(*(two(one) for one in given))
    torch.testing.assert_close(got.a, want, rtol=2e-2, atol=2e-2)
    assert seen.sparse == 0
