"""What changes the scores, on the CPU: every term and their combinations against float64, in both implementations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels import cpu_native
from sparsepass.kernels.cpu import block_sparse_attention_cpu, select_blocks_cpu, select_scored_cpu
from sparsepass.kernels.dispatch import Scores, block_sparse_attention, visible_blocks
from sparsepass.kernels.reference import select_blocks_reference, shown_by_scores, visible_pairs
from sparsepass.kernels.rules import Rule
from sparsepass.testing import (
    TERMS,
    Case,
    Inputs,
    assert_as_accurate_as_dense,
    assert_lse,
    assert_nonfinite_reach,
    cases,
    poisoned_empty,
)
from tests.kernels.test_cpu_attend import causal_case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["native", "gather"], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and not cpu_native.available(torch.float32):
        pytest.skip("the C++ kernel cannot be built here")
    patch = pytest.MonkeyPatch()
    if request.param == "gather":
        patch.setattr(cpu_native, "available", lambda dtype: False)
    yield request.param
    patch.undo()


def attend(inputs: Inputs, **more: Any) -> tuple[Tensor, Tensor | None]:
    with poisoned_empty():
        return block_sparse_attention_cpu(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.kv_num_blocks,
            inputs.kv_indices,
            **inputs.mask,
            scores=inputs.scores,
            **more,
        )


def check(inputs: Inputs) -> None:
    out, lse = attend(inputs, return_lse=True)
    assert lse is not None
    assert_as_accurate_as_dense(out, inputs)
    assert_lse(lse, inputs)


@given(case=cases(dtypes=DTYPES, head_dims=(8, 16, 24), terms=TERMS))
def test_combinations_match_the_reference(implementation: str, case: Case) -> None:
    check(case.tensors())


@given(case=cases(dtypes=DTYPES, max_len=80, bad=True, terms=TERMS))
def test_non_finite_tokens_reach_only_the_rows_that_see_them(implementation: str, case: Case) -> None:
    inputs = case.tensors()
    assert_nonfinite_reach(attend(inputs)[0], inputs)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_term(implementation: str, dtype: torch.dtype, term: str) -> None:
    check(causal_case(dtype=dtype, terms=(term,), lists="full").tensors())


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (576, 512), (32, 16), (8, 8), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_head_sizes(implementation: str, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> None:
    sizes = {"head_dim": head_dim, "v_head_dim": v_head_dim, "scale": head_dim**-0.5, "kv_heads": 1}
    inputs = causal_case(dtype=dtype, **sizes).tensors()
    check(inputs)
    out, _ = block_sparse_attention(
        inputs.q, inputs.k, inputs.v, inputs.lists, scale=inputs.mask["scale"], visible=inputs.band
    )
    assert out.shape[-1] == v_head_dim


def block_truth(case: Case, inputs: Inputs) -> Tensor:
    """Bool [B, H, nq, nkv]: blocks with a pair that band, segments, mask and bias all show."""
    seen = visible_pairs(
        case.q_len, case.kv_len, batch=case.batch,
        **{name: inputs.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")},
    )  # fmt: skip
    pairs = seen[:, None] & shown_by_scores(inputs.scores)
    padded = torch.nn.functional.pad(pairs, (0, -case.kv_len % case.kv_block, 0, -case.q_len % case.q_block))
    tiles = padded.unflatten(3, (-1, case.kv_block)).unflatten(2, (-1, case.q_block))
    some: Tensor = tiles.any(-1).any(3)
    return some.expand(case.batch, case.heads, -1, -1)


@given(case=cases(dtypes=(torch.float32,), terms=("bias", "mask")))
def test_the_map_has_the_blocks_with_a_visible_pair(case: Case) -> None:
    inputs = case.tensors()
    assert inputs.scores is not None
    sizes = {"q_block": case.q_block, "kv_block": case.kv_block}
    found = visible_blocks(inputs.q, inputs.k, inputs.scores, inputs.band, **sizes)
    assert torch.equal((found != 0).expand(case.batch, case.heads, -1, -1), block_truth(case, inputs))
    unhidden = replace(case, left=-1, right=-1, segments="none")
    every = ~block_truth(unhidden, replace(unhidden.tensors(), scores=Scores(mask=~shown_by_scores(inputs.scores))))
    assert torch.equal((found == 2).expand_as(every), every & block_truth(case, inputs))


@given(case=cases(dtypes=(torch.float32,), terms=("bias", "mask")))
def test_hidden_blocks_are_not_computed_and_not_counted(implementation: str, case: Case) -> None:
    inputs = case.tensors()
    counter = torch.zeros(3, dtype=torch.int64)
    attend(inputs, counter=counter)
    listed = torch.zeros(case.batch, case.heads, *block_truth(case, inputs).shape[2:], dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in listed.shape[:3])).view(-1, 3).tolist():
        shared = tuple(at % size for at, size in zip(place, inputs.kv_num_blocks.shape, strict=True))
        used = inputs.kv_indices[shared][: inputs.kv_num_blocks[shared]]
        listed[tuple(place)][used.long()] = True
    assert counter.tolist() == [1, int((listed & block_truth(case, inputs)).sum()), 0]


@given(case=cases(dtypes=(torch.float32,), square_blocks=True, terms=("bias", "mask")))
def test_selection_ranks_only_visible_blocks(implementation: str, case: Case) -> None:
    inputs = case.tensors()
    assert inputs.scores is not None
    sizes = {"q_block": case.q_block, "kv_block": case.kv_block}
    blocks = visible_blocks(inputs.q, inputs.k, inputs.scores, inputs.band, **sizes)
    truth = block_truth(case, inputs)
    for density in (0.3, 1.0):
        counter = torch.zeros(3, dtype=torch.int64)
        num, lists = select_blocks_cpu(
            inputs.q, inputs.k, **inputs.mask, density=density, blocks=blocks, counter=counter
        )
        expected, _ = select_blocks_reference(inputs.q, inputs.k, **inputs.mask, density=density, blocks=truth)
        assert torch.equal(num, expected)
        assert counter[2] == truth.sum()
        used = torch.arange(lists.shape[-1]) < num[..., None]
        assert truth.gather(-1, lists.long())[used].all()
    num, lists = select_scored_cpu(
        inputs.q, inputs.k, **inputs.mask, rule=Rule("window", float(1 << 29), sink=0), blocks=blocks
    )
    assert torch.equal(num.expand(case.batch, case.heads, -1), truth.sum(-1).int())


def test_refusals_say_what_was_given_and_what_is_accepted() -> None:
    inputs = causal_case().tensors()
    square = torch.zeros(1, 1, 300, 300)
    for scores, message in [
        (Scores(softcap=-1.0), "softcap is -1.0; accepted is a number above 0"),
        (Scores(mask=square), "mask is torch.float32 on cpu; accepted is bool"),
        (Scores(mask=square[0] > 0), r"mask has shape \(1, 300, 300\); accepted is \[2, 4, 300, 300\]"),
        (Scores(bias=square[..., :7]), r"bias has shape \(1, 1, 300, 7\)"),
        (Scores(slopes=torch.ones(3)), r"slopes is torch.float32 \(3,\)"),
        (Scores(sinks=torch.ones(3)), r"accepted is a float type \[4\]"),
    ]:
        with pytest.raises(KernelInputError, match=message):
            attend(replace(inputs, scores=scores))
    with pytest.raises(KernelInputError, match=r"blocks is torch\.bool"):
        attend(inputs, blocks=torch.ones(1, 1, 2, 2, dtype=torch.bool))
