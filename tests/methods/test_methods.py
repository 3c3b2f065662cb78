"""Methods: parameters and their ranges, the text form of a budget, budgets that differ by head."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.errors import KernelInputError, PolicyError
from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.attend.reference import listed_blocks
from sparsepass.kernels.types import Visible
from sparsepass.methods import (
    METHODS,
    AShape,
    Dense,
    FlexPrefill,
    Full,
    Method,
    PooledTopK,
    Threshold,
    TopP,
    VerticalSlash,
    XAttention,
    budget_from_json,
    budget_to_json,
    decode_budget,
    encode_budget,
    make_method,
    merge_heads,
    method_names,
)
from sparsepass.types import DENSE, Budget

DENSITIES = st.floats(0, 1, exclude_min=True)
EXPECTED = st.none() | DENSITIES
BLOCK = st.sampled_from([None, 64, 128])
FEW = st.integers(0, 9)
MANY = st.none() | st.integers(1, 1 << 20)
SLASHED = ("vertical_slash", "flex_prefill")
COSINES = st.none() | st.floats(-1, 1)
POOLED = st.one_of(
    st.builds(PooledTopK, DENSITIES, BLOCK, self_similarity=COSINES, last=FEW),
    st.lists(DENSITIES, min_size=1, max_size=5).map(lambda heads: PooledTopK(max(heads), None, tuple(heads), last=1)),
)
SAMPLES: dict[type[Method], st.SearchStrategy[Any]] = {
    Dense: st.just(Dense()),
    Full: st.just(Full()),
    AShape: st.builds(AShape, st.integers(1, 1 << 30), st.integers(0, 1 << 20), BLOCK, FEW),
    PooledTopK: POOLED,
    Threshold: st.builds(
        Threshold, st.floats(0, 1), sink=FEW, window=st.integers(1, 9), last=FEW, block=BLOCK, self_similarity=COSINES,
        expected_density=EXPECTED,
    ),
    TopP: st.builds(
        TopP, DENSITIES, st.sampled_from(["pooled", "mass"]), sink=FEW, window=st.integers(1, 9), block=BLOCK,
        self_similarity=COSINES, expected_density=EXPECTED, last=FEW,
    ),
    XAttention: st.builds(XAttention, DENSITIES, st.sampled_from([4, 8, 16, 32]), BLOCK, EXPECTED, FEW),
    VerticalSlash: st.builds(VerticalSlash, DENSITIES, MANY, MANY, st.sampled_from([64, 256]), BLOCK),
    FlexPrefill: st.builds(
        FlexPrefill, DENSITIES, st.floats(0, 1), st.integers(0, 4096), DENSITIES, block=BLOCK,
        expected_density=EXPECTED,
    ),
}  # fmt: skip
"""A new method adds its own line: the matrix below then covers it."""


def test_every_method_has_a_sample_and_a_name() -> None:
    assert set(SAMPLES) == set(METHODS)
    assert method_names() == ("dense", "full", "a_shape", "pooled_topk", "threshold", "top_p", "xattention", *SLASHED)


@pytest.mark.parametrize("method_type", METHODS)
def test_round_trips(method_type: type[Method]) -> None:
    @settings(deadline=None)
    @given(SAMPLES[method_type])
    def check(method: Method) -> None:
        budget = method.budget()
        text = encode_budget(budget)
        assert make_method(budget) == method
        assert decode_budget(text) == budget
        assert encode_budget(decode_budget(text)) == text
        assert "\n" not in text
        assert budget_from_json(budget_to_json(budget)) == budget
        assert 0 < method.mean_density <= method.max_density * (1 + 1e-12) <= 1 + 1e-12
        assert method.uniform().max_density == method.max_density
        assert hash(method) == hash(make_method(budget))

    check()


@pytest.mark.parametrize("method_type", [one for one in METHODS if one.dial is not None])
def test_cap_computes_as_much_as_each(method_type: type[Method]) -> None:
    @settings(deadline=None)
    @given(SAMPLES[method_type], SAMPLES[method_type], st.booleans())
    def check(one: Method, other: Method, dense: bool) -> None:
        dial = str(method_type.dial)
        other = replace(one.uniform(), **{dial: getattr(other.uniform(), dial)})  # type: ignore[type-var]
        cap = method_type.cap([one, other, *([Dense()] if dense else [])])
        (most,) = set(cap.dials(3))
        distance = [abs(method_type.dial_at_all - value) for value in (most, *one.uniform().dials(1), *other.dials(1))]
        assert distance[0] == (0 if dense else min(distance))
        assert method_type.cap([cap, one, other]) == method_type.cap([cap]) == cap

    check()


def test_cap_refuses_what_cannot_share_a_batch() -> None:
    small, large = PooledTopK(0.1, 64), PooledTopK(0.2, 128)
    for methods in ([small, large], [Dense()], []):
        with pytest.raises(PolicyError, match=r"must share a method.*pooled_topk \(density\)"):
            PooledTopK.cap(methods)
    assert PooledTopK.cap([small, PooledTopK(0.3, 64, (0.3, 0.1))]) == PooledTopK(0.3, 64)
    assert PooledTopK(0.3, 64, (0.3, 0.1)).dials(2) == (0.3, 0.1)
    with pytest.raises(PolicyError, match="dense has no dial"):
        Dense().dials(2)


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)])
def test_a_dial_overrides_the_methods_own(shape: tuple[int, int]) -> None:
    query, key = torch.randn(2, 4, 512, 16), torch.randn(2, 2, 512, 16)
    dials = torch.linspace(0.3, 0.9, shape[0] * shape[1]).view(shape)
    options: dict[str, Any] = {"scale": 0.25, "visible": Visible(right=0), "counter": None}
    lists = PooledTopK(0.9, 64).select(query, key, dial=dials, **options)
    for item, head in product(range(2), range(4)):
        density = float(dials.expand(2, 4)[item, head])
        own = PooledTopK(density, 64).select(query, key, **options)
        assert torch.equal(lists.kv_num_blocks[item, head], own.kv_num_blocks[item, head])
        width = own.kv_indices.shape[-1]
        assert torch.equal(lists.kv_indices[item, head, :, :width], own.kv_indices[item, head])
    for wrong in (dials.double(), dials[0], torch.ones(3, 4)):
        with pytest.raises(KernelInputError, match=r"accepted is a number, or float32 \[2 or 1, 4 or 1\]"):
            PooledTopK(0.9, 64).select(query, key, dial=wrong, **options)


@pytest.mark.parametrize("method_type", [one for one in METHODS if one.dial is not None])
@pytest.mark.parametrize("through_the_dial", [False, True])
def test_every_visible_block_is_listed_at_the_dial_of_all(method_type: type[Method], through_the_dial: bool) -> None:
    query, key = torch.randn(2, 4, 700, 16), torch.randn(2, 2, 700, 16)
    needed = {"density": 0.1} if method_type in (PooledTopK, VerticalSlash) else {}
    own: Method = method_type(**needed, block=64)  # type: ignore[call-arg]
    cap = method_type.cap([own, Dense()])
    dial = torch.full((2, 1), method_type.dial_at_all) if through_the_dial else None
    counter = torch.zeros(3, dtype=torch.int64)
    lists = cap.select(query, key, scale=0.25, visible=Visible(right=0), counter=counter, dial=dial)
    assert torch.equal(lists.kv_num_blocks.expand(2, 4, -1), torch.arange(1, 12).expand(2, 4, 11))
    assert counter.tolist() == [0, 0, 2 * 4 * 66]
    full = block_sparse_attention(query, key, key, lists, scale=0.25, visible=Visible(right=0))[0]
    wide = key.repeat_interleave(2, 1)
    want = torch.nn.functional.scaled_dot_product_attention(query, wide, wide, is_causal=True, scale=0.25)
    torch.testing.assert_close(full, want, atol=1e-4, rtol=1e-4)


def test_text_form() -> None:
    assert encode_budget(DENSE) == "dense"
    assert decode_budget("dense()") == DENSE
    assert encode_budget(Budget("pooled_topk", {"block": None, "density": 1})) == "pooled_topk(density=1.0)"
    heads = Budget("pooled_topk", {"density": 0.2, "head_densities": [0.1, 0.2]})
    assert encode_budget(heads) == "pooled_topk(density=0.2, head_densities=(0.1, 0.2))"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "needs 'density'"),
        ({"density": 0}, "density is 0; accepted is a number above 0 and at most 1"),
        ({"density": 1.01}, "density is 1.01"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": True}, "density is True"),
        ({"density": "0.1"}, "density is '0.1'"),
        ({"density": 0.1, "block": 32}, "block is 32; accepted are 64, 128"),
        ({"density": 0.1, "block": True}, "block is True"),
        ({"density": 0.1, "last": -1}, "last is -1; accepted is a whole number of at least 0"),
        ({"density": 0.1, "blok": 64}, "'blok'.*Did you mean 'block'"),
        ({"density": 0.1, "head_densities": []}, "head_densities is"),
        ({"density": 0.1, "head_densities": "0.1"}, "head_densities is"),
        ({"density": 0.1, "head_densities": (0.1, 2)}, r"head_densities\[1\] is 2"),
        ({"density": 0.1, "head_densities": (0.1, 0.2)}, "largest of head_densities is 0.2"),
    ],
)
def test_bad_parameters(params: Mapping[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_method(Budget("pooled_topk", params))


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("a_shape", {"window": 0}, "window is 0; accepted is a whole number of at least 1"),
        ("a_shape", {"sink": 1.5}, "sink is 1.5"),
        ("a_shape", {"block": 32}, "a_shape block is 32"),
        ("threshold", {"alpha": -0.1}, "alpha is -0.1; accepted is a number from 0"),
        ("threshold", {"alpha": float("nan")}, "alpha is nan"),
        ("threshold", {"window": 0}, "window is 0"),
        ("threshold", {"last": -1}, "last is -1"),
        ("threshold", {"self_similarity": 2}, "self_similarity is 2; accepted is a cosine"),
        ("a_shape", {"last": 1.5}, "last is 1.5"),
        ("top_p", {"coverage": 0}, "coverage is 0"),
        ("top_p", {"last": -1}, "last is -1"),
        ("xattention", {"last": "2"}, "last is '2'"),
        ("top_p", {"score": "best"}, "score is 'best'; accepted are 'pooled', 'mass', 'antidiagonal'"),
        ("top_p", {"score": "antidiagonal", "self_similarity": 0.5}, "not for 'antidiagonal'"),
        ("xattention", {"tau": 1.5}, "tau is 1.5"),
        ("xattention", {"stride": 3}, "stride is 3; accepted are 4, 8, 16, 32"),
        ("xattention", {"expected_density": 0}, "expected_density is 0"),
    ],
)
def test_bad_parameters_of_scored_methods(method: str, params: Mapping[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make_method(Budget(method, params))


def test_a_shapes_density_follows_the_length() -> None:
    method = AShape(window=512, sink=128, block=64)
    for length in (256, 1024, 8192):
        for one in (method, replace(method, last=2)):
            assert one.density_at(length) == pytest.approx(share_listed(one, length), abs=0.08)


def share_listed(method: Method, length: int) -> float:
    """Of the visible blocks of 64 tokens, causal, the share listed for random inputs."""
    q = torch.randn(1, 1, length, 16, generator=torch.Generator().manual_seed(0))
    counts = method.select(q, q, scale=1.0, visible=Visible(right=0), counter=None).kv_num_blocks
    blocks = -(-length // 64)
    return int(counts.sum()) / (blocks * (blocks + 1) / 2)


LAST: tuple[Method, ...] = (
    AShape(128, 64, 64, last=2),
    PooledTopK(0.2, 64, last=2),
    PooledTopK(0.2, 64, (0.2,), last=3),
    TopP(0.3, block=64, last=2),
    TopP(0.3, "mass", block=64, last=1),
    XAttention(0.3, block=64, last=2),
    Threshold(0.999, last=2, block=64),
)


@pytest.mark.parametrize("method", LAST, ids=Method.text)
def test_the_last_query_blocks_list_all_that_is_visible(method: Method) -> None:
    """With packing, padding, windows, and few queries behind many keys; the others as without ``last``."""
    plain = replace(method, last=0)  # type: ignore[type-var]
    g = torch.Generator().manual_seed(0)
    segments = torch.full((2, 1000), -1, dtype=torch.int32)
    segments[0, 200:] = 0  # padding on the left
    segments[1] = torch.arange(1000) // 600
    for queries, visible in (
        (1000, Visible(right=0)),
        (1000, Visible(right=0, kv_segments=segments)),
        (1000, Visible(left=299, right=0, q_segments=segments, kv_segments=segments)),
        (1000, Visible()),
        (10, Visible(right=0, offset=990)),
        (300, Visible(right=0, offset=700)),
    ):
        q, k = torch.randn(2, 1, queries, 16, generator=g), torch.randn(2, 1, 1000, 16, generator=g)
        every, tail, rest = (
            one.select(q, k, scale=0.25, visible=visible, counter=None) for one in (PooledTopK(1.0, 64), method, plain)
        )
        all_, named, without = (
            listed_blocks(one.kv_num_blocks, one.kv_indices, 16).expand(2, 1, -1, -1) for one in (every, tail, rest)
        )
        assert tail.kv_indices.shape[-1] == 16
        assert torch.equal(named[:, :, -method.last :], all_[:, :, -method.last :])  # type: ignore[attr-defined]
        assert torch.equal(named[:, :, : -method.last], without[:, :, : -method.last])  # type: ignore[attr-defined]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("length", [1000, 8192])
def test_density_counts_the_last_blocks(density: float, length: int) -> None:
    method = PooledTopK(density, 64, last=2)
    more = share_listed(method, length) - share_listed(PooledTopK(density, 64), length)
    assert method.density_at(length) - density == pytest.approx(more, abs=0.05)
    assert method.cost_at(length) == method.density_at(length) > method.mean_density
    assert PooledTopK(density, 64, (density, density / 2), last=2).density_at(length) < method.density_at(length)
    assert PooledTopK(density, last=1 << 30).density_at(length) == 1.0
    assert TopP(0.5, last=1).density_at(length) > TopP(0.5).density_at(length)
    assert Threshold(last=9).density_at(length) > Threshold().density_at(length) == Threshold(last=0).density_at(length)


def test_unknown_names() -> None:
    with pytest.raises(PolicyError, match=r"'pooled_topk'.*Known: .*'dense'.*'pooled_topk'"):
        make_method(Budget("pooled_top_k"))
    with pytest.raises(PolicyError, match="takes no parameters"):
        make_method(Budget("dense", {"density": 1}))


@pytest.mark.parametrize(
    "text", ["", "pooled_topk(", "pooled_topk(0.1)", "pooled_topk(density=x)", "a.b(c=1)", "1", "\0", "(" * 300]
)
def test_undecodable_text(text: str) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        decode_budget(text)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_decodes_or_is_refused(text: str) -> None:
    try:
        budget = decode_budget(text)
    except PolicyError:
        return
    assert decode_budget(encode_budget(budget)) == budget


def test_heads_merge_and_split() -> None:
    sparse, denser = Budget("pooled_topk", {"density": 0.1}), Budget("pooled_topk", {"density": 0.4})
    assert merge_heads([sparse, sparse]) == sparse
    assert merge_heads([DENSE, DENSE]) == DENSE
    merged = merge_heads([sparse, DENSE, denser])
    assert merged == Budget("pooled_topk", {"density": 1.0, "head_densities": (0.1, 1.0, 0.4)})
    method = make_method(merged)
    assert [method.for_head(head).budget() for head in (0, 2)] == [sparse, denser]
    tails = [Budget("pooled_topk", {"density": share, "last": 2}) for share in (0.1, 0.4)]
    with_last = make_method(merge_heads([*tails, DENSE]))
    assert with_last.text() == "pooled_topk(density=1.0, head_densities=(0.1, 0.4, 1.0), last=2)"
    assert [with_last.for_head(head).budget() for head in (0, 1)] == tails
    assert with_last.uniform().text() == "pooled_topk(density=1.0, last=2)"
    with pytest.raises(PolicyError, match=r"cannot run together: .*last=2"):
        merge_heads([sparse, tails[0]])
    assert method.mean_density == pytest.approx(0.5)
    with pytest.raises(PolicyError, match="for 3 heads is used for head 3"):
        method.for_head(3)
    with pytest.raises(PolicyError, match=r"cannot run together: .*block=64"):
        merge_heads([sparse, Budget("pooled_topk", {"density": 0.1, "block": 64})])
    with pytest.raises(PolicyError, match="at least one head"):
        merge_heads([])


def test_text_is_the_same_in_another_process() -> None:
    code = (
        "from sparsepass.methods import *; from sparsepass.types import Budget;"
        "print(encode_budget(Budget('pooled_topk', {'block': 64, 'density': 1 / 3})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == encode_budget(Budget("pooled_topk", {"density": 1 / 3, "block": 64}))


def test_full_is_exact_and_skips_what_the_mask_hides() -> None:
    query, key, value = torch.randn(2, 4, 700, 16), torch.randn(2, 2, 700, 16), torch.randn(2, 2, 700, 16)
    visible = Visible(left=149, right=0)
    lists = Full().select(query, key, scale=0.25, visible=visible, counter=None)
    out, _ = block_sparse_attention(query, key, value, lists, scale=0.25, visible=visible)
    at = torch.arange(700)
    mask = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 150)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    assert int(lists.kv_num_blocks.max()) == 3
