"""A site's output lies in memory as the captured one did, where a reader can tell; without a copy where none can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparsepass
from sparsepass.errors import GraphInvariantError
from sparsepass.graph.strides import lies_alike, restoring
from sparsepass.rewriting.ops import SPARSE_ATTENTION
from sparsepass.rewriting.rewriter import Rewriter
from tests.seen_graphs import Seen

T = torch.Tensor
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@torch.library.custom_op("sparsepass_tests::in_memory_order", mutates_args=())
def in_memory_order(x: T) -> T:
    """As a kernel of a user's reads: the numbers as they lie, weighted by their place."""
    flat = torch.as_strided(x, (x.numel(),), (1,), x.storage_offset())
    places = torch.arange(x.numel(), dtype=torch.float32, device=x.device) / x.numel()
    return (flat.float() * places).reshape(x.shape)


@in_memory_order.register_fake
def _(x: T) -> T:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def heads(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[T, T, T]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 192, 16, generator=g).to(device, dtype) for _ in range(3))
    return q, k, v


def fused(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written(q: T, k: T, v: T) -> T:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def batched(q: T, k: T, v: T) -> T:
    q, k, v = (one.flatten(0, 1) for one in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v)


def summed(q: T, k: T, v: T) -> T:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.25, -1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, v)


def transposed_query(q: T, k: T, v: T) -> T:
    q, k, v = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (q, k, v))
    return fused(q, k, v)


def checked(x: T) -> T:
    return in_memory_order(x if x.is_contiguous() else x.contiguous())  # type: ignore[no-any-return]


def written_to(x: T) -> T:
    """A copy that would be no copy: ``x`` is read after what was made of it is written to."""
    y = x.transpose(1, 2).contiguous()
    y.add_(1.0)
    return in_memory_order(y) + x.transpose(1, 2)  # type: ignore[no-any-return]


READERS: dict[str, Callable[[T], T]] = {
    "memory": in_memory_order,
    "checked": checked,
    "through a view": lambda x: in_memory_order(x.transpose(1, 2)),
    "explicit": lambda x: in_memory_order(x.contiguous()),
    "pointwise": lambda x: in_memory_order(x * 2),
    "as_strided": lambda x: torch.as_strided(x, (16, 8), (1, 16)) + 0,
    "written to": written_to,
    "returned": lambda x: x,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("attention", [fused, written, batched, summed, transposed_query], ids=lambda one: one.__name__)
def test_memory_is_read_as_captured(attention: Callable[[T, T, T], T], reader: str) -> None:
    def model(q: T, k: T, v: T) -> T:
        return READERS[reader](attention(q, k, v))

    with torch.no_grad():
        want = model(*heads())
        seen = Seen(model)
        got = seen(*heads())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride()
    assert seen.sparse == 1


def test_the_check_of_strides_sees_what_is_not_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rewriter, "_laid_out", lambda self, new, old: new)
    with torch.no_grad(), pytest.raises(Exception, match="strides") as caught:
        Seen(lambda q, k, v: in_memory_order(fused(q, k, v)))(*heads())
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), GraphInvariantError)


PATHS: dict[str, Callable[[T], T]] = {
    "transformers, sdpa": lambda x: x.transpose(1, 2).contiguous().reshape(2, 192, 64),
    "transformers, eager": lambda x: x.transpose(1, 2).contiguous().reshape(2, 192, -1).contiguous(),
    "BERT": lambda x: x.permute(0, 2, 1, 3).contiguous().view(2, 192, 64),
    "GPT-2": lambda x: x.transpose(1, 2).reshape(2, 192, 64),
    "projected": lambda x: F.linear(x.transpose(1, 2).flatten(2), torch.ones(8, 64)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("attention", [fused, written, transposed_query], ids=lambda one: one.__name__)
def test_models_get_no_further_copy(attention: Callable[[T, T, T], T], path: str) -> None:
    """The graph has no node that the captured one does not have, but the op."""

    def model(q: T, k: T, v: T) -> T:
        return PATHS[path](attention(q, k, v))

    with torch.no_grad():
        want = model(*heads())
        seen = Seen(model)
        got = seen(*heads())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert got.stride() == want.stride()
    op = next(node for node in seen.nodes if node.target is SPARSE_ATTENTION)
    captured = {node.name for graph in seen.graphs for node in graph.captured.graph.nodes}
    assert [user.name for user in op.users if user.name not in captured] == []


LAYOUTS: dict[str, T] = {
    "contiguous": torch.empty(2, 3, 5, 4),
    "tokens first": torch.empty(2, 5, 3, 4).transpose(1, 2),
    "last is outer": torch.empty(4, 2, 3, 5).permute(1, 2, 3, 0),
    "cut": torch.empty(2, 5, 3, 8).transpose(1, 2)[..., :4],
    "of size 1": torch.empty(1, 5, 1, 4).transpose(1, 2),
    "three dimensions": torch.empty(5, 2, 4).transpose(0, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_are_restored(name: str) -> None:
    captured = LAYOUTS[name]
    given = torch.rand(captured.shape)
    steps = restoring(captured)
    assert steps is not None
    out = given
    for target, *rest in steps:
        out = getattr(out, target)(*rest) if isinstance(target, str) else target(out, *rest)
    assert torch.equal(out, given)
    assert lies_alike(out, captured)


def test_strides_that_cannot_be_made_are_told() -> None:
    assert restoring(torch.empty(2, 1, 5, 4).expand(2, 3, 5, 4)) is None
    assert restoring(torch.empty(2, 3, 5, 8)[..., ::2]) is None


@pytest.mark.parametrize(
    ("budget", "more"),
    [
        ("pooled_topk(density=0.5, block=64)", {}),
        ("dense", {}),
        ("full", {"softcap": 5.0}),
        ("full", {"sinks": torch.zeros(4)}),
        ("full", {"sinks": torch.zeros(2, 4, 192)}),
        ("full", {"bias": torch.zeros(192, 192)[None, None]}),
    ],
    ids=lambda one: str(one)[:24],
)
def test_the_fake_op_lies_as_the_real_one(budget: str, more: dict[str, Any]) -> None:
    q, k, v = heads()
    arguments = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, None, None, 0.25, -1, 0, False, budget, 0)
    torch.library.opcheck(SPARSE_ATTENTION, arguments, more, test_utils="test_faketensor")
    out = SPARSE_ATTENTION(*arguments, **more)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("reader", ["memory", "checked", "explicit", "returned"])
@pytest.mark.parametrize("attention", [fused, written, batched], ids=lambda one: one.__name__)
def test_memory_is_read_as_captured_on_cuda(attention: Callable[[T, T, T], T], reader: str, mode: str | None) -> None:
    def model(q: T, k: T, v: T) -> T:
        return READERS[reader](attention(q, k, v))

    given = heads("cuda", torch.bfloat16)
    with torch.no_grad():
        want = model(*given)
        seen = Seen(model, inductor=True, mode=mode)
        for _ in range(3):
            got = seen(*given)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert got.stride() == want.stride()
    assert seen.sparse == 1


def test_empty_tensors_in_later_calls_give_what_eager_gives() -> None:
    """A batch of 0 has strides of its own, which nobody can read anything by."""

    def attend(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    compiled = torch.compile(attend, backend="sparsepass", options={"sparsepass.inductor": False})
    with sparsepass.task("single_qa"):
        for batch, number, q_len, kv_len in ((2, 2, 2048, 2048), (3, 2, 2048, 2048), *EMPTY):
            q = torch.randn(batch, number, q_len, 16)
            k, v = torch.randn(2, batch, number, kv_len, 16).unbind()
            out = compiled(q, k, v)
            assert out.shape == q.shape
            if 0 in (batch, number, q_len, kv_len):
                torch.testing.assert_close(out, attend(q, k, v))


EMPTY = ((0, 2, 2048, 2048), (2, 0, 2048, 2048), (2, 2, 0, 2048), (2, 2, 64, 0), (0, 2, 0, 0))
"""Batch, heads, queries and keys of calls that follow others."""
