"""Scores and rules in Triton against their eager references: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.testing import Case, cases, poisoned_empty
from tests.kernels.device import DEVICE, EXAMPLES, FEWER, GPU, GROUPED, GROUPS, pytestmark  # noqa: F401
from tests.kernels.select.select_cases import assert_rule_holds, rules, score_error, tolerance

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.errors import KernelInputError
from sparsepass.kernels.attend.reference import listed_blocks
from sparsepass.kernels.runtime import prepared
from sparsepass.kernels.runtime.launch import run_all
from sparsepass.kernels.select.reference import (
    always_listed_reference,
    block_logits_reference,
    self_similarity_reference,
)
from sparsepass.kernels.select.rule import Rule
from sparsepass.kernels.select.triton import antidiagonal as select_antidiagonal_triton
from sparsepass.kernels.select.triton import lists as rules_triton
from sparsepass.kernels.select.triton.lists import rule_launch
from sparsepass.kernels.select.triton.scored import scored_launches, select_scored_cuda
from sparsepass.kernels.select.triton.topk import select_blocks_cuda

DRAWN: dict[str, Any] = {"lists": ("full",), "equal_v_dim": True, "max_len": 56, "groups": GROUPS}
if GPU:
    DRAWN |= {
        "dtypes": (torch.bfloat16, torch.float16, torch.float32),
        "blocks": (64, 128),
        "head_dims": (64, 80),
        "max_len": 900,
        "layouts": ("bshd", "strided_dim"),
    }


def selected(
    case: Case, rule: Rule, dial: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, dict[str, Any], list[int]]:
    """Listed blocks, the kernel's scores, q, k, the mask, and the counter."""
    inputs = case.tensors(DEVICE)
    counter = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with poisoned_empty():
        launches, count, lists = scored_launches(
            inputs.q, inputs.k, **inputs.mask, rule=rule, dial=dial, counter=counter
        )
        run_all(launches, inputs.q.device)
    scores = launches[-1].arguments["scores_ptr"] if rule.score is not None else None
    named = listed_blocks(count, lists, -(-case.kv_len // case.kv_block))
    unused = torch.arange(lists.shape[-1], device=lists.device) >= count[..., None]
    assert not lists[unused].any()
    named = named.expand(case.batch, case.heads, -1, -1)
    return named, scores, inputs.q, inputs.k, inputs.mask, counter.tolist()


@settings(max_examples=EXAMPLES if GPU else 6)
@example(GROUPED, Rule("coverage", 0.5, "mass"), (1, 1))
@example(GROUPED, Rule("threshold", 0.5, "antidiagonal", stride=8), (0, 1))
@given(cases(**DRAWN), rules(), st.sampled_from([None, (0, 0), (0, 1), (1, 0), (1, 1)]))
def test_lists_what_the_rule_takes(case: Case, rule: Rule, dial_shape: tuple[int, int] | None) -> None:
    dial = None
    if dial_shape is not None:
        shape = (case.batch if dial_shape[0] else 1, case.heads if dial_shape[1] else 1)
        dial = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed))
        dial = (dial * 64 if rule.keep == "window" else dial).to(DEVICE)
    named, scores, q, k, mask, counted = selected(case, rule, dial)
    assert_rule_holds(named, scores, q, k, rule, dial, mask)
    if scores is not None:
        assert score_error(scores, q, k, rule, mask) <= tolerance(case, q, k)
    _, allowed = always_listed_reference(q, k, rule=replace(rule, self_similarity=None), **mask)
    assert counted == [0, 0, int(allowed.sum())]


@settings(max_examples=FEWER)
@given(cases(**DRAWN, bad=True), rules())
def test_nonfinite_inputs_keep_lists_valid(case: Case, rule: Rule) -> None:
    named, _, q, k, mask, _ = selected(case, rule)
    listed, allowed = always_listed_reference(q, k, rule=replace(rule, self_similarity=None), **mask)
    assert not (named & ~allowed).any()
    assert not (listed & ~named).any()


@pytest.mark.parametrize(("scale", "left", "right"), [(0.3, -1, 0), (-0.3, 100, 0), (0.2, -1, -1)])
def test_mass_of_either_sign_of_the_scale(scale: float, left: int, right: int) -> None:
    block = 64 if GPU else 16
    q, k = torch.randn(2, 1, 1, 5 * block - 5, 64 if GPU else 16, device=DEVICE).half()
    mask: dict[str, Any] = {"left": left, "right": right, "offset": 0, "q_segments": None, "kv_segments": None}
    mask |= {"scale": scale, "q_block": block, "kv_block": block}
    with poisoned_empty():
        launches, _, _ = scored_launches(q, k, **mask, rule=Rule("threshold", 0.3, "mass"), dial=None, counter=None)
    run_all(launches, q.device)
    wanted = block_logits_reference(q, k, score="mass", stride=16, **mask)
    there = wanted.isfinite()
    assert (launches[1].arguments["scores_ptr"].double() - wanted)[there].abs().max() < 0.01


@pytest.mark.parametrize("left", [1 << 30, 300])
def test_long_rows_are_listed_in_several_steps(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    monkeypatch.setattr(rules_triton, "LEVEL_ROWS", 8)
    band = {"q_len": 600, "kv_len": 600, "left": left, "right": 0, "offset": 0}
    scores = torch.randn(1, 1, 38, 38, device=DEVICE)
    given: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1, "q_block": 16, "kv_block": 16, "scores": scores}
    given |= {"allowed": None, "dial": None, "q_unlike": None, "k_unlike": None, "counter": None, "like": scores}
    found = []
    for columns in (64, 16):
        monkeypatch.setattr(rules_triton, "LEVEL_COLUMNS", columns)
        with poisoned_empty():
            launch, *lists = rule_launch(Rule("threshold", 0.3, "mass", sink=2, last=1), band, **given)
        run_all([launch], scores.device)
        found.append(lists)
    assert all(torch.equal(whole, parts) for whole, parts in zip(*found, strict=True))
    assert int(found[0][0][0, 0, -1]) > 16


@pytest.mark.parametrize("keep", ["threshold", "coverage"])
def test_ties_go_to_the_lower_index(keep: Any) -> None:
    block = 64 if GPU else 16
    q = torch.zeros(1, 2, 10 * block, 16, device=DEVICE)
    mask: dict[str, Any] = {"scale": 1.0, "left": -1, "right": 0, "offset": 0, "q_block": block, "kv_block": block}
    count, lists = select_scored_cuda(q, q[:, :1], **mask, rule=Rule(keep, 0.55, "pooled", sink=1, window=1))
    last = lists[0, 0, -1, : count[0, 0, -1]].tolist()
    assert last == (list(range(10)) if keep == "threshold" else [0, 1, 2, 3, 4, 9])


def test_a_dial_never_computes_more_than_the_cap() -> None:
    block = 64 if GPU else 16
    blocks = 6
    apart = 2.0 * torch.randn(1, 1, blocks, 16, device=DEVICE)  # or means over a block are all alike, and all are kept
    q = torch.randn(1, 1, blocks * block, 16, device=DEVICE) + apart.repeat_interleave(block, 2)
    mask: dict[str, Any] = {"scale": 1.0, "left": -1, "right": 0, "offset": 0, "q_block": block, "kv_block": block}
    for rule, more in (
        (Rule("threshold", 0.5, "mass"), 0.0),
        (Rule("coverage", 0.5, "pooled"), 1.0),
        (Rule("window", 2.0 * block), 2.0**30),
    ):
        capped = select_scored_cuda(q, q, **mask, rule=rule)[0]
        assert capped.sum() < blocks * (blocks + 1) // 2
        for value in (more, float("nan")):
            dial = torch.tensor([[value]], device=DEVICE)
            assert torch.equal(select_scored_cuda(q, q, **mask, rule=rule, dial=dial)[0], capped)


def test_heads_share_one_buffer_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    block = 64 if GPU else 16
    q, k = torch.randn(2, 2, 5 * block, 16, device=DEVICE), torch.randn(2, 1, 5 * block, 16, device=DEVICE)
    mask: dict[str, Any] = {"scale": 1.0, "left": -1, "right": 0, "offset": 0, "q_block": block, "kv_block": block}
    rule = Rule("coverage", 0.6, "antidiagonal", stride=8)
    whole = select_scored_cuda(q, k, **mask, rule=rule)
    monkeypatch.setattr(select_antidiagonal_triton, "PARTS_BYTES", 3 * 4 * (5 * block // 8) * 5)  # of three heads
    monkeypatch.setattr(prepared, "_prepared", {})
    parts = select_scored_cuda(q, k, **mask, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@settings(max_examples=FEWER)
@given(cases(**DRAWN), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0, 1]))
def test_pooled_topk_keeps_blocks_that_are_not_self_similar(
    case: Case, least: float, density: float, last: int
) -> None:
    inputs = case.tensors(DEVICE)
    q, k, mask = inputs.q, inputs.k, inputs.mask
    columns = -(-case.kv_len // case.kv_block)
    with poisoned_empty():
        plain = listed_blocks(*select_blocks_cuda(q, k, **mask, density=density), columns)
        options: dict[str, Any] = {"density": density, "self_similarity": least, "last": last}
        named = listed_blocks(*select_blocks_cuda(q, k, **mask, **options), columns)
        allowed = listed_blocks(*select_blocks_cuda(q, k, **mask, density=1.0), columns)
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
    assert torch.equal(named[similar], plain[similar])


def test_refusals() -> None:
    q = torch.randn(1, 2, 64, 16, device=DEVICE)
    mask: dict[str, Any] = {"scale": 1.0, "left": -1, "right": 0, "offset": 0, "q_block": 16, "kv_block": 16}
    with pytest.raises(KernelInputError, match=r"dial has shape \(3, 2\); accepted is \[1 or 1, 2 or 1\]"):
        select_scored_cuda(q, q, **mask, rule=Rule("coverage", 0.5, "pooled"), dial=torch.rand(3, 2, device=DEVICE))
    with pytest.raises(KernelInputError, match="stride is 32 with blocks of 16 by 16"):
        select_scored_cuda(q, q, **mask, rule=Rule("coverage", 0.5, "antidiagonal", stride=32))
    with pytest.raises(KernelInputError, match="score is None for 'coverage'"):
        select_scored_cuda(q, q, **mask, rule=Rule("coverage", 0.5))
