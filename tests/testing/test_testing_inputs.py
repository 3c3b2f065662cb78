"""Structured inputs hold the shares they promise and tell good blocks from bad ones; block masses are the true ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.select.api import select_pooled_topk
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing import (
    CONCENTRATED,
    Case,
    StructuredInputs,
    attention_error,
    block_mass,
    cases,
    kept_mass,
    structured_inputs,
    visible_pairs,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 64
CAUSAL = Visible(right=0)


@pytest.fixture(scope="module")
def made() -> StructuredInputs:
    return structured_inputs(
        heads=6, kv_heads=2, length=4096, head_dim=64, dtype=torch.float32, device=DEVICE, diffuse=1 / 3, seed=3
    )


@pytest.fixture(scope="module")
def mass(made: StructuredInputs) -> Tensor:
    return block_mass(made.query, made.key, scale=made.scale, visible=CAUSAL, block=BLOCK)


def lists_of(scores: Tensor, num: Tensor) -> BlockLists:
    """The ``num`` best blocks of every row."""
    return BlockLists(num, scores.argsort(-1, descending=True).int(), BLOCK, BLOCK)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 3, 5, 100, 700])
def test_any_size_is_finite_and_the_same_again(length: int, dtype: torch.dtype) -> None:
    def make(seed: int) -> StructuredInputs:
        return structured_inputs(
            batch=2, heads=4, kv_heads=2, length=length, head_dim=16, dtype=dtype, device=DEVICE, seed=seed
        )

    one, again, other = make(1), make(1), make(2)
    assert one.query.shape == (2, 4, length, 16)
    assert one.key.shape == one.value.shape == (2, 2, length, 16)
    assert one.query.transpose(1, 2).is_contiguous()
    assert one.topics.shape == (2, 2, length)
    for x in ("query", "key", "value"):
        assert getattr(one, x).isfinite().all()
        assert getattr(one, x).dtype == dtype
        assert torch.equal(getattr(one, x), getattr(again, x))
        assert not torch.equal(getattr(one, x), getattr(other, x))


def test_shares_are_those_asked_for(made: StructuredInputs) -> None:
    assert int(made.diffuse.sum()) == 2
    rows = slice(2048, 4096, 61)
    places = torch.arange(4096, device=DEVICE)[rows]
    keys = made.key.repeat_interleave(3, dim=1)
    scores = made.query[0, :, rows].double() @ keys[0].double().mT * made.scale
    token = torch.arange(4096, device=DEVICE)
    weights = scores.masked_fill(token > places[:, None], -torch.inf).softmax(-1)
    sink = weights[..., :4].sum(-1).mean(-1)
    near = weights.masked_fill(token <= places[:, None] - 256, 0.0).sum(-1).mean(-1)
    focused = ~made.diffuse
    assert 0.2 < float(sink[focused].mean()) < 0.4
    assert 0.15 < float(near[focused].mean()) < 0.4
    assert float(sink[~focused].max()) < 0.05
    # Diffuse: the best tenth of the tokens holds little more than a tenth of the mass; else most of it.
    top = weights.topk(400, dim=-1).values.sum(-1).mean(-1)
    assert float(top[~focused].max()) < 0.4
    assert float(top[focused].min()) > 0.7


def test_concentrated_inputs_need_fewer_blocks(mass: Tensor) -> None:
    x = structured_inputs(
        **{**CONCENTRATED, "diffuse": 1 / 3},  # type: ignore[arg-type]
        heads=6, kv_heads=2, length=4096, head_dim=64, dtype=torch.float32, device=DEVICE, seed=3,
    )  # fmt: skip
    held = block_mass(x.query, x.key, scale=x.scale, visible=CAUSAL, block=BLOCK)

    def needed(found: Tensor) -> float:
        """Blocks that hold nine tenths of a row's mass, over the heads that are not diffuse."""
        best = found[0, ~x.diffuse, 32:].sort(-1, descending=True).values
        return float(((best.cumsum(-1) < 0.9 * best.sum(-1, keepdim=True)).sum(-1) + 1).double().mean())

    assert needed(held) < 0.6 * needed(mass)


def test_topics_recur(made: StructuredInputs) -> None:
    text = made.topics[0, 0]
    edges = text.diff().ne(0)
    assert 8 <= int(edges.sum()) < 4096 // 48
    stretches = text[torch.cat((torch.ones(1, dtype=torch.bool, device=DEVICE), edges))]
    assert stretches.unique().numel() < stretches.numel()


def test_good_blocks_differ_from_bad_ones(made: StructuredInputs, mass: Tensor) -> None:
    """At one budget: the true best keep most, pooling less, random blocks least; diffuse heads have no best blocks."""
    lists = select_pooled_topk(made.query, made.key, scale=made.scale, visible=CAUSAL, density=0.25, block=BLOCK)
    num = lists.kv_num_blocks
    blocks = mass.shape[-1]
    draw = torch.rand(mass.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    draw = draw.masked_fill(torch.ones(blocks, blocks, dtype=torch.bool, device=DEVICE).triu(1), -1)
    draw[..., 0] = 2
    for back in (0, -1):
        draw.diagonal(back, dim1=-2, dim2=-1).fill_(2)
    best, pooled, random = (kept_mass(mass, x)[0] for x in (lists_of(mass, num), lists, lists_of(draw, num)))
    focused = ~made.diffuse
    oracle, mean, luck = (float(x[focused].mean()) for x in (best, pooled, random))
    assert luck + 0.05 < mean < oracle - 0.01
    assert oracle > 0.8
    assert (best >= pooled - 1e-5).all()
    assert float(best[~focused].max()) < 0.6


@given(case=cases(dtypes=(torch.float32, torch.float64), blocks=(8, 16), square_blocks=True, max_len=60))
def test_mass_is_the_softmax_summed(case: Case) -> None:
    inputs = case.tensors(DEVICE)
    block = case.q_block
    mass = block_mass(inputs.q, inputs.k, scale=case.scale, visible=inputs.band, block=block)
    band = {name: inputs.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
    seen = visible_pairs(case.q_len, case.kv_len, batch=case.batch, device=DEVICE, **band)[:, None]
    keys = inputs.k.double().repeat_interleave(case.group, dim=1)
    scores = (inputs.q.double() @ keys.mT * case.scale).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num()
    expected = torch.zeros(mass.shape, dtype=torch.float64, device=DEVICE)
    for row in range(mass.shape[2]):
        rows = slice(row * block, (row + 1) * block)
        count = seen[:, :, rows].any(-1).sum(-1).clamp(min=1)
        for column in range(mass.shape[3]):
            part = weights[:, :, rows, column * block : (column + 1) * block]
            expected[:, :, row, column] = part.sum((-1, -2)) / count
    torch.testing.assert_close(mass.double(), expected, atol=2e-5, rtol=0)


def test_mass_in_parts_is_the_same(made: StructuredInputs, mass: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsepass.testing.mass._CHUNK_BYTES", {"cuda": 1 << 20})
    monkeypatch.setattr("sparsepass.testing.mass._CHUNK_BYTES_CPU", 1 << 20)
    parts = block_mass(made.query[:, :2], made.key[:, :1], scale=made.scale, visible=CAUSAL, block=BLOCK)
    torch.testing.assert_close(parts, mass[:, :2], atol=1e-5, rtol=1e-4)


def test_kept_mass_counts_listed_blocks_once_and_skips_blind_rows() -> None:
    mass = torch.tensor([[[[1.0, 0, 0], [0.25, 0.75, 0], [0, 0, 0]]]])
    num = torch.tensor([[[1, 1, 0]]], dtype=torch.int32)
    junk = 2**31 - 1
    indices = torch.tensor([[[[0, junk, junk], [1, -junk, junk], [junk, 0, 0]]]], dtype=torch.int32)
    assert kept_mass(mass, BlockLists(num, indices, 64, 64)).tolist() == [[0.875]]
    with pytest.raises(KernelInputError, match="use the same block size"):
        kept_mass(mass, BlockLists(num[..., :2], indices[:, :, :2], 64, 64))


def test_attention_error() -> None:
    reference = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert attention_error(reference.half(), reference) == 0
    assert attention_error(reference + torch.tensor([0.0, 0.5]).view(1, 2, 1, 1), reference) == pytest.approx(0.1)
    assert attention_error(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)) == 0
    assert attention_error(reference * torch.nan, reference) != 0
    with pytest.raises(KernelInputError, match="must be the same"):
        attention_error(reference, reference[:, :1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"length": 0}, "at least 1, 16 and 1"),
        ({"head_dim": 8}, "at least 1, 16 and 1"),
        ({"sink": 0.5, "local": 0.5}, "sum to less than 1"),
        ({"diffuse": 2.0}, "accepted are shares"),
        ({"elsewhere": -0.1}, "accepted are shares"),
    ],
)
def test_refusals(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        structured_inputs(**{"length": 64, "heads": 2, "kv_heads": 1, "head_dim": 16, **wrong})  # type: ignore[arg-type]
    with pytest.raises(KernelInputError, match="multiple of Hkv"):
        block_mass(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4), scale=1.0, visible=CAUSAL, block=2)
