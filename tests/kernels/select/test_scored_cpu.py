"""Scores and rules on the CPU against their eager references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.kernels.attend.reference import listed_blocks
from sparsepass.kernels.select.cpu import scored as cpu_scored
from sparsepass.kernels.select.cpu.scored import select_scored_cpu
from sparsepass.kernels.select.cpu.topk import select_blocks_cpu
from sparsepass.kernels.select.reference import always_listed_reference, self_similarity_reference
from sparsepass.kernels.select.rule import Rule
from sparsepass.testing import Case, cases
from tests.kernels.select.select_cases import assert_rule_holds, rules, score_error, tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def selected(case: Case, rule: Rule, dial: Tensor | None = None) -> tuple[Tensor, Tensor | None, Any, list[int]]:
    """Listed blocks, the scores they came from, the inputs, and the counter."""
    inputs = case.tensors()
    seen: list[Tensor] = []
    by_scores = cpu_scored._by_scores
    counter = torch.zeros(3, dtype=torch.int64)

    def remembering(rule: Rule, dials: Tensor, scores: Tensor, allowed: Tensor, listed: Tensor) -> Tensor:
        seen.append(scores)
        return by_scores(rule, dials, scores, allowed, listed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_scored, "_by_scores", remembering)
        count, lists = select_scored_cpu(inputs.q, inputs.k, **inputs.mask, rule=rule, dial=dial, counter=counter)
    assert count.dtype == lists.dtype == torch.int32
    unused = torch.arange(lists.shape[-1]) >= count[..., None]
    assert not lists[unused].any()
    named = listed_blocks(count, lists, -(-case.kv_len // case.kv_block)).expand(case.batch, case.heads, -1, -1)
    return named, seen[0] if seen else None, inputs, counter.tolist()


@given(cases(dtypes=DTYPES), rules(), st.sampled_from([None, (0, 0), (0, 1), (1, 0), (1, 1)]))
def test_lists_what_the_rule_takes(case: Case, rule: Rule, dial_shape: tuple[int, int] | None) -> None:
    dial = None
    if dial_shape is not None:
        shape = (case.batch if dial_shape[0] else 1, case.heads if dial_shape[1] else 1)
        dial = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed))
        dial = dial * 64 if rule.keep == "window" else dial
    named, scores, inputs, counted = selected(case, rule, dial)
    assert_rule_holds(named, scores, inputs.q, inputs.k, rule, dial, inputs.mask)
    if scores is not None:
        error = score_error(scores, inputs.q, inputs.k, rule, inputs.mask)
        assert error <= tolerance(case, inputs.q, inputs.k)
    assert counted == [0, 0, int(selected(case, Rule("window", 2.0**30))[0].sum())]


@given(cases(dtypes=(torch.float32,)), rules())
def test_rows_in_small_chunks(case: Case, rule: Rule) -> None:
    whole, _, _, _ = selected(case, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_scored, "_SCORES", 1)
        named, scores, inputs, _ = selected(case, rule)
    if scores is None:
        assert torch.equal(named, whole)
    assert_rule_holds(named, scores, inputs.q, inputs.k, rule, None, inputs.mask)


@given(cases(bad=True), rules())
def test_nonfinite_inputs_keep_lists_valid(case: Case, rule: Rule) -> None:
    named, _, inputs, _ = selected(case, rule)
    plain = replace(rule, self_similarity=None)
    listed, allowed = always_listed_reference(inputs.q, inputs.k, rule=plain, **inputs.mask)
    assert not (named & ~allowed).any()
    assert not (listed & ~named).any()


@given(
    cases(dtypes=DTYPES), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0, 1])
)
def test_pooled_topk_keeps_blocks_that_are_not_self_similar(
    case: Case, least: float, density: float, last: int
) -> None:
    inputs = case.tensors()
    q, k, mask = inputs.q, inputs.k, inputs.mask
    columns = -(-case.kv_len // case.kv_block)
    plain = listed_blocks(*select_blocks_cpu(q, k, **mask, density=density), columns)
    options: dict[str, Any] = {"density": density, "self_similarity": least, "last": last}
    named = listed_blocks(*select_blocks_cpu(q, k, **mask, **options), columns)
    allowed = listed_blocks(*select_blocks_cpu(q, k, **mask, density=1.0), columns)
    segments = mask["kv_segments"]
    of_keys = self_similarity_reference(k, segments, case.kv_block).repeat_interleave(case.group, 1)[:, :, None]
    of_rows = self_similarity_reference(q, None if segments is None else mask["q_segments"], case.q_block)[..., None]
    assert not (allowed & ((of_keys < least - 1e-4) | (of_rows < least - 1e-4)) & ~named).any()
    assert not (named & ~allowed).any()
    if last:
        assert torch.equal(named[:, :, -1], allowed[:, :, -1])
        named, plain = named[:, :, :-1], plain[:, :, :-1]
        of_rows = of_rows[:, :, :-1]
    similar = (of_keys > least + 1e-4).all(-1).all(-1) & (of_rows > least + 1e-4).all(-2).all(-1)
    assert int(named[similar].sum()) == int(plain[similar].sum())
