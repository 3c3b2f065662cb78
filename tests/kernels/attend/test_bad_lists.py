"""Lists and tensors that do not fit are named before a kernel runs; empty ones give what SDPA gives."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepass.errors import KernelInputError, OptionError
from sparsepass.functional import from_block_mask, sparse_attention
from sparsepass.kernels import arguments
from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.select.api import select_pooled_topk
from sparsepass.kernels.types import BlockLists, Columns, Visible
from sparsepass.rewriting import ops

SHAPE = (1, 2, 256, 16)


def lists_of(num: Any = 2, indices: Any = (0, 2, 9, -7), **fields: Any) -> BlockLists:
    """Four rows of four entries, of which two count."""
    counts = torch.full((1, 1, 4), num, dtype=torch.int32) if isinstance(num, int) else num
    entries = torch.tensor(indices, dtype=torch.int32).expand(1, 1, 4, -1) if isinstance(indices, tuple) else indices
    return BlockLists(counts, entries, **{"q_block": 64, "kv_block": 64, **fields})


def columns_of(num: int, *indices: int) -> Columns:
    return Columns(torch.full((1, 1, 4), num, dtype=torch.int32), torch.tensor(indices).int().expand(1, 1, 4, -1))


GOOD = lists_of()
META = torch.zeros(1, 1, 4, 4, dtype=torch.int32, device="meta")

BAD: dict[str, tuple[BlockLists, str]] = {
    "count over width": (lists_of(5), "counts from 5 to 5"),
    "count negative": (lists_of(-1), "counts from -1"),
    "block too great": (lists_of(3), "block 9"),
    "block negative": (lists_of(2, (0, -7)), "block -7"),
    "greatest number": (lists_of(1, (2**31 - 1,)), "block 2147483647"),
    "twice": (lists_of(3, (1, 2, 1)), "block 1 twice"),
    "width 0": (lists_of(0, torch.zeros(1, 1, 4, 0, dtype=torch.int32)), "kv_indices has shape"),
    "width 0, count 1": (lists_of(1, torch.zeros(1, 1, 4, 0, dtype=torch.int32)), "kv_indices has shape"),
    "rows": (lists_of(torch.ones(1, 1, 3, dtype=torch.int32)), "kv_num_blocks has shape"),
    "rows differ": (lists_of(1, GOOD.kv_indices[:, :, :1]), "kv_indices has shape"),
    "batch": (lists_of(torch.ones(3, 1, 4, dtype=torch.int32)), "kv_num_blocks has shape"),
    "heads": (lists_of(torch.ones(1, 3, 4, dtype=torch.int32)), "kv_num_blocks has shape"),
    "three dimensions": (lists_of(1, torch.zeros(1, 4, 4, dtype=torch.int32)), "kv_indices has shape"),
    "int64": (lists_of(1, torch.full((1, 1, 4, 4), 2**32)), "torch.int64"),
    "uint8": (lists_of(torch.ones(1, 1, 4, dtype=torch.uint8)), "torch.uint8"),
    "float": (lists_of(torch.ones(1, 1, 4)), "torch.float32"),
    "bool": (lists_of(torch.ones(1, 1, 4, dtype=torch.bool)), "torch.bool"),
    "no tensor": (lists_of([[[1, 1, 1, 1]]]), "type list"),
    "none": (lists_of(1, None), "type NoneType"),
    "sparse layout": (lists_of(1, torch.zeros(1, 1, 4, 4, dtype=torch.int32).to_sparse()), "sparse"),
    "meta indices": (lists_of(1, META), "on meta"),
    "meta counts": (lists_of(META[..., 0]), "on meta"),
    **{f"q_block {n}": (lists_of(q_block=n), f"q_block is {n}") for n in (0, -64, 64.0, True, 2**40, None, 2**63)},
    **{
        f"kv_block {n}": (lists_of(kv_block=n), f"kv_block is {re.escape(str(n))}")
        for n in (0, -64, 64.0, False, 2**40, [64])
    },
    **{f"skip {n}": (lists_of(skip=n), f"skip is {n}") for n in (float("nan"), -0.1, 1.0, True)},
    "column too great": (lists_of(columns=columns_of(2, 5, 256)), "column 256"),
    "column negative": (lists_of(columns=columns_of(2, -1, 5)), "column -1"),
    "columns over width": (lists_of(columns=columns_of(3, 5, 6)), "columns.num has counts"),
    "columns out of order": (lists_of(columns=columns_of(2, 6, 5)), "does not ascend"),
    "columns twice": (lists_of(columns=columns_of(2, 5, 5)), "does not ascend"),
    "columns of int64": (lists_of(columns=replace(columns_of(1, 5), num=torch.ones(1, 1, 4).long())), "columns.num is"),
    "columns of 2 rows": (
        lists_of(columns=replace(columns_of(1, 5), num=torch.ones(1, 1, 2).int())),
        "columns.num has",
    ),
}


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=generator) for _ in range(3))  # type: ignore[return-value]


@pytest.mark.parametrize("name", BAD)
def test_lists_that_do_not_fit_are_named(name: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    lists, message = BAD[name]
    with pytest.raises(KernelInputError, match=message):
        sparse_attention(*qkv, lists)


def test_good_lists_of_any_strides_and_order_are_right(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """Entries behind a count may be anything, and nothing has to ascend."""
    expected = sparse_attention(*qkv, GOOD)
    wide = GOOD.kv_indices.repeat_interleave(2, -1)[..., ::2]
    for lists in (lists_of(2, (2, 0, 9, -7)), lists_of(2, wide), lists_of(2, (0, 2))):
        torch.testing.assert_close(sparse_attention(*qkv, lists), expected)


VISIBLE = {
    "segments of another length": (Visible(kv_segments=torch.zeros(1, 5).int()), "kv_segments has shape"),
    "segments of int64": (Visible(kv_segments=torch.zeros(1, 256).long()), "kv_segments is torch.int64"),
    "segments on meta": (Visible(kv_segments=torch.zeros(1, 256, device="meta").int()), "on meta"),
    "segments of queries alone": (Visible(q_segments=torch.zeros(1, 256).int()), "without kv_segments"),
    "left": (Visible(left=-2), "left is -2"),
    "right": (Visible(right=1.5), "right is 1.5"),  # type: ignore[arg-type]
    "offset": (Visible(offset=2**40), "offset is 1099511627776"),
    "blocks": (Visible(blocks=torch.ones(1, 1, 4, 5, dtype=torch.bool)), "blocks is"),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_what_is_visible_must_fit(name: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    visible, message = VISIBLE[name]
    with pytest.raises(KernelInputError, match=message):
        block_sparse_attention(*qkv, GOOD, scale=1.0, visible=visible)
    if name != "blocks":
        with pytest.raises(KernelInputError, match=message):
            select_pooled_topk(*qkv[:2], scale=1.0, visible=visible, density=0.5)


COUNTERS = (
    torch.zeros(3),
    torch.zeros(2).long(),
    torch.zeros(3, device="meta").long(),
    torch.zeros(1).long().expand(3),
)


@pytest.mark.parametrize("counter", [*COUNTERS, torch.zeros(6).long()[::2]], ids=range(5))
def test_counters_must_fit(counter: Tensor, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(KernelInputError, match="counter"):
        block_sparse_attention(*qkv, GOOD, scale=1.0, visible=Visible(), counter=counter)
    with pytest.raises(KernelInputError, match="counter"):
        select_pooled_topk(*qkv[:2], scale=1.0, visible=Visible(), density=0.5, counter=counter)


OTHERS: dict[str, dict[str, Any]] = {
    "window": {"window": 2.5},
    "scale": {"scale": "1"},
    "segments": {"segments": torch.zeros(1, 256)},
    "key_padding": {"key_padding": torch.ones(1, 256, device="meta", dtype=torch.bool)},
    "slopes": {"slopes": [1.0, 2.0]},
    "bias": {"bias": torch.zeros(1, 1, 1, 256).to_sparse()},
    "softcap": {"softcap": "30"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arguments_are_named(name: str, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    with pytest.raises(KernelInputError, match=name):
        sparse_attention(*qkv, GOOD, **OTHERS[name])
    segments = torch.tensor([[0] * 255 + [2**32]])
    with pytest.raises(KernelInputError, match="segments has values"):
        sparse_attention(*qkv, GOOD, segments=segments)


def test_a_block_mask_that_names_blocks_that_do_not_exist() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    num, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    good = BlockMask.from_kv_blocks(num, indices, BLOCK_SIZE=128, seq_lengths=(256, 256))
    assert from_block_mask(good).kv_num_blocks.tolist() == [[[1, 1]]]
    good.kv_indices = torch.full_like(indices, 2)
    with pytest.raises(KernelInputError, match="block 2"):
        from_block_mask(good)


def test_the_environment_asks_for_checks_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("SPARSEPASS_CHECK_LISTS", given)
        arguments.checks_values_on_device.cache_clear()
        assert arguments.checks_values_on_device() is expected
    monkeypatch.setenv("SPARSEPASS_CHECK_LISTS", "yes")
    arguments.checks_values_on_device.cache_clear()
    with pytest.raises(OptionError, match="SPARSEPASS_CHECK_LISTS is 'yes'"):
        arguments.checks_values_on_device()
    arguments.checks_values_on_device.cache_clear()


EMPTY = {
    "no batch": ((0, 2, 64, 8), (0, 1, 64, 8), 8),
    "no heads": ((1, 0, 64, 8), (1, 0, 64, 8), 8),
    "no queries": ((1, 2, 0, 8), (1, 2, 64, 8), 8),
    "no keys": ((1, 2, 64, 8), (1, 1, 0, 8), 8),
    "no head size": ((1, 2, 64, 0), (1, 2, 64, 0), 8),
    "no value size": ((1, 2, 64, 8), (1, 2, 64, 8), 0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors_give_what_sdpa_gives(name: str) -> None:
    of_q, of_k, v_dim = EMPTY[name]
    q, k, v = torch.randn(of_q), torch.randn(of_k), torch.randn(*of_k[:3], v_dim)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    out, lse = sparse_attention(q, k, v, density=1.0, return_lse=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == q.shape[:3]
    if name == "no keys":
        assert bool((lse == -torch.inf).all())
    if name != "no head size":  # which a plan leaves dense
        budget = ops._FULL.text()
        found = ops.SPARSE_ATTENTION(q, k, v, None, None, 1.0, -1, -1, False, budget, 0)
        torch.testing.assert_close(found, expected)
        assert found.transpose(1, 2).is_contiguous()
