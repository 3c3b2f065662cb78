"""What the tests of changed scores share: the blocks that are visible in truth, and columns as lists of single keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.attend.api import visible_blocks
from sparsepass.kernels.attend.columns.reference import listed_pairs
from sparsepass.kernels.attend.reference import listed_blocks, select_blocks_reference, shown_by_scores, visible_pairs
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.select.rule import Rule
from sparsepass.testing import Case, Inputs, assert_as_accurate_as_dense, assert_lse, lists_from_mask
from tests.kernels.attend.column_cases import ColumnCase

EVERYTHING = Rule("window", float(1 << 29), sink=0)


def block_truth(case: Case, inputs: Inputs) -> Tensor:
    """Bool [B, H, nq, nkv]: blocks with a pair that band, segments, mask and bias all show."""
    band = {name: inputs.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
    seen = visible_pairs(case.q_len, case.kv_len, batch=case.batch, device=inputs.q.device, **band)
    pairs = seen[:, None] & shown_by_scores(inputs.scores).to(seen.device)
    padded = torch.nn.functional.pad(pairs, (0, -case.kv_len % case.kv_block, 0, -case.q_len % case.q_block))
    tiles = padded.unflatten(3, (-1, case.kv_block)).unflatten(2, (-1, case.q_block))
    some: Tensor = tiles.any(-1).any(3)
    return some.expand(case.batch, case.heads, -1, -1)


def check_map(case: Case, inputs: Inputs, make: Callable[..., Tensor]) -> None:
    """``make`` finds the blocks with a visible pair, and those of which mask and bias hide nothing."""
    assert inputs.scores is not None
    found = make(inputs)
    truth = block_truth(case, inputs)
    assert torch.equal((found != 0).expand_as(truth), truth)
    open_band = replace(case, left=-1, right=-1, segments="none")
    shown = Scores(mask=~shown_by_scores(inputs.scores))
    bare = {**inputs.mask, "left": -1, "right": -1, "q_segments": None, "kv_segments": None}
    hides_some = block_truth(open_band, replace(inputs, mask=bare, scores=shown))
    assert torch.equal((found == 2).expand_as(truth), truth & ~hides_some)


def check_count(case: Case, inputs: Inputs, attend: Callable[..., Any]) -> None:
    """Listed blocks of which mask and bias hide everything are neither computed nor counted."""
    counter = torch.tensor([3, 5, 7], device=inputs.q.device)
    attend(inputs, counter=counter)
    truth = block_truth(case, inputs)
    listed = listed_blocks(inputs.kv_num_blocks, inputs.kv_indices, truth.shape[-1])
    assert counter.tolist() == [4, 5 + int((listed & truth).sum()), 7]


def check_selection(
    case: Case,
    inputs: Inputs,
    select: Callable[..., tuple[Tensor, Tensor]],
    scored: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Only visible blocks are ranked and counted, and a density is of each head's visible blocks."""
    assert inputs.scores is not None
    sizes = {"q_block": case.q_block, "kv_block": case.kv_block}
    blocks = visible_blocks(inputs.q, inputs.k, inputs.scores, inputs.band, **sizes)
    truth = block_truth(case, inputs)
    shares = torch.rand(1, case.heads, generator=torch.Generator().manual_seed(case.seed)).to(inputs.q.device)
    for density, last in ((0.3, 1), (1.0, 0), (shares, 2)):
        counter = torch.zeros(3, dtype=torch.int64, device=inputs.q.device)
        num, lists = select(
            inputs.q, inputs.k, **inputs.mask, density=density, last=last, blocks=blocks, counter=counter
        )
        expected, _ = select_blocks_reference(
            inputs.q, inputs.k, **inputs.mask, density=density, last=last, blocks=truth
        )
        assert torch.equal(num, expected)
        assert counter.tolist() == [0, 0, int(truth.sum())]
        assert not (listed_blocks(num, lists, truth.shape[-1]) & ~truth).any()
    counter.zero_()
    num, lists = scored(inputs.q, inputs.k, **inputs.mask, rule=EVERYTHING, blocks=blocks, counter=counter)
    assert torch.equal(listed_blocks(num, lists, truth.shape[-1]).expand_as(truth), truth)
    assert counter.tolist() == [0, 0, int(truth.sum())]


def check_columns(
    column_case: ColumnCase, inputs: Any, attend: Callable[..., Any], columns: Callable[..., None]
) -> None:
    """Blocks and columns together against lists of single keys."""
    whole: Inputs = inputs.inputs
    out, lse = attend(whole, return_lse=True)
    lists = (whole.kv_num_blocks, whole.kv_indices)
    columns(whole.q, whole.k, whole.v, *lists, inputs.num, inputs.indices, out, lse, **whole.mask, scores=whole.scores)
    case = column_case.case
    pairs = listed_pairs(
        case.q_len, case.kv_len, *lists, inputs.num, inputs.indices, batch=case.batch, heads=case.heads,
        q_block=case.q_block, kv_block=case.kv_block,
    )  # fmt: skip
    num, indices = lists_from_mask(pairs[:, :, :: case.q_block])
    single = replace(whole, kv_num_blocks=num, kv_indices=indices, mask={**whole.mask, "kv_block": 1})
    assert_as_accurate_as_dense(out, single)
    assert_lse(lse, single)
