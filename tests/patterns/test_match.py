"""The matcher: each spelling matches, near misses do not and say why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from sparsepass.graph.canonical import Made
from sparsepass.sites import Findings, find_sites

T = torch.Tensor


def captured(fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=keep, fullgraph=True)(*args)
    return graphs[0]


def found(fn: Callable[..., Any], *args: Any) -> Findings:
    return find_sites(captured(fn, *args).graph)


def qkv(heads: int = 4, kv_heads: int = 4, length: int = 32, dim: int = 16, rank: int = 4) -> tuple[T, T, T]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, n, length, dim) if rank == 4 else (2 * n, length, dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=g) for shape in shapes)
    return q, k, v


def causal(length: int = 32) -> T:
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


def operator_form(q: T, k: T, v: T) -> T:
    return ((q @ k.transpose(2, 3)) * 0.25).softmax(-1) @ v


def function_form(q: T, k: T, v: T) -> T:
    return torch.matmul(F.softmax(torch.mul(torch.matmul(q, torch.transpose(k, -1, -2)), 0.25), dim=3), v)


def divided(q: T, k: T, v: T) -> T:
    return torch.matmul(torch.softmax(q.matmul(k.mT) / 4.0, dim=-1), v)


def scale_first(q: T, k: T, v: T) -> T:
    return torch.matmul(torch.softmax(0.25 * torch.matmul(q, k.permute(0, 1, 3, 2)), dim=-1), v)


def with_casts(q: T, k: T, v: T) -> T:
    p = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(p, p=0.0, training=False), v.contiguous())


def unscaled(q: T, k: T, v: T) -> T:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1), v)


@pytest.mark.parametrize("spelling", [operator_form, function_form, divided, scale_first, with_casts, unscaled])
def test_eager_spellings_match(spelling: Callable[[T, T, T], T]) -> None:
    findings = found(spelling, *qkv())
    assert len(findings.sites) == 1
    assert not findings.refused
    attention = findings.sites[0].attention
    assert attention.spelling == "eager_softmax"
    assert attention.scale == (1.0 if spelling is unscaled else 0.25)
    names = [attention.query.name, attention.key.name, attention.value.name]
    assert [name.rstrip("_")[-1] for name in names] == ["q", "k", "v"] or spelling is with_casts


def test_additive_mask_is_bound() -> None:
    def masked(q: T, k: T, v: T) -> T:
        keep = torch.arange(32)[:, None] >= torch.arange(32)[None, :]
        bias = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        return torch.matmul(F.softmax(bias + torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-1), v)

    (site,) = found(masked, *qkv()).sites
    assert len(site.attention.masks) == 1
    assert str(site.site.mask) == "causal"


@pytest.mark.parametrize("repeat", ["expand", "interleave", "flag"])
def test_grouped_query_spellings(repeat: str) -> None:
    def grouped(q: T, k: T, v: T) -> T:
        if repeat == "flag":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def widen(x: T) -> T:
            if repeat == "interleave":
                return x.repeat_interleave(2, dim=1)
            b, h, s, d = x.shape
            return x[:, :, None, :, :].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)

        return F.scaled_dot_product_attention(q, widen(k), widen(v), is_causal=True)

    (site,) = found(grouped, *qkv(kv_heads=2)).sites
    assert (site.site.heads, site.site.kv_heads, site.site.grouped) == (4, 2, True)


def test_repetition_that_is_not_grouping_stays() -> None:
    """Tiling the heads (``repeat``) maps query heads to other K/V heads than grouping does."""

    def tiled(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    (site,) = found(tiled, *qkv(kv_heads=2)).sites
    assert site.site.kv_heads == 4


def wrong_axis(q: T, k: T, v: T) -> T:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-2), v)


def mask_after(q: T, k: T, v: T) -> T:
    p = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-1)
    return torch.matmul(p * (torch.arange(32) > 3), v)


def used_twice(q: T, k: T, v: T) -> tuple[T, T]:
    p = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-1)
    return torch.matmul(p, v), p


def scores_used(q: T, k: T, v: T) -> tuple[T, T]:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    return torch.matmul(F.softmax(scores, dim=-1), v), scores.amax(-1)


def data_scale(q: T, k: T, v: T) -> T:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * q.mean(), dim=-1), v)


def no_transpose(q: T, k: T, v: T) -> T:
    return torch.matmul(F.softmax(torch.matmul(q, k) * 0.25, dim=-1), v)


def dropped(q: T, k: T, v: T) -> T:
    return torch.matmul(F.dropout(F.softmax(torch.matmul(q, k.transpose(2, 3)), dim=-1), p=0.5, training=True), v)


def swapped(q: T, k: T, v: T) -> T:
    return torch.matmul(v, F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25, dim=-1))


def write_between(q: T, k: T, v: T) -> T:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    k.add_(1.0)
    return torch.matmul(F.softmax(scores, dim=-1), v)


NEAR_MISSES: dict[Callable[[T, T, T], Any], str] = {
    wrong_axis: "sums the values over another",
    mask_after: "changes the probabilities between the softmax",
    used_twice: "returned to the caller",
    scores_used: "also used by",
    data_scale: "scaled by 'mean', which is computed from data",
    write_between: "writes to memory",
}


@pytest.mark.parametrize("near", NEAR_MISSES, ids=lambda fn: fn.__name__)
def test_near_misses_are_refused_with_the_difference(near: Callable[[T, T, T], Any]) -> None:
    findings = found(near, *qkv())
    assert not findings.sites
    (refused,) = findings.refused
    assert NEAR_MISSES[near] in refused.reason, refused.reason
    assert refused.nodes


def test_swapped_probabilities_and_values_do_not_match() -> None:
    assert not found(swapped, *qkv(length=16)).sites


def test_softmax_that_is_no_attention_is_not_reported() -> None:
    def router(x: T) -> T:
        return F.softmax(x * 2, dim=-1).sum()

    findings = found(router, torch.randn(4, 8))
    assert not findings.sites
    assert not findings.refused


def test_keys_that_come_transposed_are_turned_back() -> None:
    (site,) = found(no_transpose, *qkv(length=16)).sites
    assert isinstance(site.attention.key, Made)
    assert site.attention.key.target == "permute"


def test_dropout_is_kept_for_the_plan_to_refuse() -> None:
    (site,) = found(dropped, *qkv()).sites
    assert site.attention.dropout_p == 0.5


def test_three_dimensions_are_a_batch_of_one_head() -> None:
    def bmm(q: T, k: T, v: T) -> T:
        return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, dim=-1), v)

    (site,) = found(bmm, *qkv(rank=3)).sites
    assert site.query_shape == (8, 1, 32, 16)
    assert site.attention.restore == (("flatten", 0, 1),) or site.attention.restore == (("squeeze", 1),)


def test_sdpa_arguments_are_read() -> None:
    def attend(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.5)

    (site,) = found(attend, *qkv()).sites
    assert (site.attention.is_causal, site.attention.scale) == (True, 0.5)
    assert str(site.site.mask) == "causal"
    assert math.isclose(site.site.head_dim, 16)


def test_decode_is_told_apart() -> None:
    def decode(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q[:, :, -1:], k, v)

    (site,) = found(decode, *qkv()).sites
    assert site.site.phase == "decode"
