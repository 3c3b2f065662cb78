"""Guards: whatever hints and lengths come in whatever order, the budget that ran is the one the plan says."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import sparsepass
from sparsepass import counters, dynamo
from sparsepass.options import INDUCTOR
from sparsepass.policy import Policy
from sparsepass.policy_rules import Rule
from sparsepass.types import Budget, TaskClass
from tests.tiny import SPARSE_OPTIONS

BLOCK = 64
HEADS, SITES = 2, 2
DENSITIES = {"single_qa": 0.1, "multi_qa": 0.3, "multi_hop": 0.5, "aggregation": 0.7, "unknown": 0.9}
EDGES = (128, 320, 640)
"""Buckets up to 640 tokens; the first is dense for every hint, the last has half the density."""


def policy(share: float = 1.0) -> Policy:
    rules = []
    for task, density in DENSITIES.items():
        for low, high, part in ((EDGES[0], EDGES[1], share), (EDGES[1], EDGES[2], share / 2)):
            budget = Budget("pooled_topk", {"density": density * part, "block": BLOCK})
            rules.append(Rule(TaskClass(task), budget, above=low, up_to=high))
    return Policy(name="guards", rules=tuple(rules))


def expected_blocks(task: str | None, length: int) -> int:
    """Blocks the plan stands for, from the definition: rows of i + 1 visible blocks, at most k kept, three always."""
    if task == "dense" or length <= EDGES[0] or length > EDGES[2]:
        return 0
    density = DENSITIES[task or "unknown"] * (1.0 if length <= EDGES[1] else 0.5)
    visible = [i + 1 for i in range(-(-length // BLOCK))]
    k = next(k for k in range(1, len(visible) + 1) if sum(min(k, a) for a in visible) >= density * sum(visible))
    return sum(min(a, max(k, min(a, 3))) for a in visible) * HEADS * SITES


def attend(x: torch.Tensor) -> torch.Tensor:
    first = F.scaled_dot_product_attention(x, x + 1, x, is_causal=True)
    return F.scaled_dot_product_attention(first, x, x, is_causal=True)


def options(**changes: Any) -> dict[str, Any]:
    return {**SPARSE_OPTIONS, "sparsepass.policy": policy(), **changes}


def blocks_run(fn: Any, length: int, task: str | None) -> int:
    before = counters.total()
    x = torch.randn(1, HEADS, length, 16, generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        if task is None:
            fn(x)
        else:
            with sparsepass.task(task):
                fn(x)
    return (counters.total() - before).computed


HINTS: list[str | None] = [None, "dense", *DENSITIES]
LENGTHS = [60, 129, 320, 321, 640]


class HintsAndLengths(RuleBasedStateMachine):
    """Switches hints and lengths in random order, in threads and tasks, and drops the compiled code now and then."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.fn = torch.compile(attend, backend=sparsepass.backend, options=options())

    @rule(task=st.sampled_from(HINTS), length=st.sampled_from(LENGTHS))
    def call(self, task: str | None, length: int) -> None:
        assert blocks_run(self.fn, length, task) == expected_blocks(task, length)

    @rule(outer=st.sampled_from(HINTS[1:]), inner=st.sampled_from(HINTS[1:]), length=st.sampled_from(LENGTHS))
    def nested(self, outer: str, inner: str, length: int) -> None:
        with sparsepass.task(outer):
            assert blocks_run(self.fn, length, inner) == expected_blocks(inner, length)
            assert blocks_run(self.fn, length, None) == expected_blocks(outer, length)

    @rule(task=st.sampled_from(HINTS[1:]), length=st.sampled_from(LENGTHS))
    def in_a_thread(self, task: str, length: int) -> None:
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(blocks_run(self.fn, length, task)))
        with sparsepass.task("dense"):  # not inherited by the thread, which sets its own
            thread.start()
            thread.join()
        assert seen == [expected_blocks(task, length)]

    @rule(task=st.sampled_from(HINTS[1:]), other=st.sampled_from(HINTS[1:]), length=st.sampled_from(LENGTHS))
    def in_asyncio(self, task: str, other: str, length: int) -> None:
        async def request(hint: str) -> int:
            with sparsepass.task(hint):
                await asyncio.sleep(0)
                return blocks_run(self.fn, length, None)

        async def serve() -> list[int]:
            return list(await asyncio.gather(request(task), request(other)))

        assert asyncio.run(serve()) == [expected_blocks(task, length), expected_blocks(other, length)]

    @rule()
    def forget(self) -> None:
        torch._dynamo.reset()


HintsAndLengths.TestCase.settings = settings(max_examples=5, stateful_step_count=8, deadline=None, derandomize=True)
TestHintsAndLengths = pytest.mark.slow(HintsAndLengths.TestCase)


@pytest.fixture
def compiled(fresh_dynamo: None) -> Any:
    return torch.compile(attend, backend=sparsepass.backend, options=options())


def test_switching_back_reuses(compiled: Any) -> None:
    for task in ("single_qa", "multi_hop"):
        blocks_run(compiled, 200, task)
    before = dynamo.compile_count()
    for task in ("single_qa", "multi_hop", "single_qa"):
        blocks_run(compiled, 200, task)
    assert dynamo.compile_count() == before


def test_hints_with_equal_plans_share_a_graph(fresh_dynamo: None) -> None:
    budget = Budget("pooled_topk", {"density": 0.5, "block": BLOCK})
    own = Policy(name="two plans", rules=(Rule(TaskClass.SINGLE_QA, budget),))
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(**{"sparsepass.policy": own}))
    before = dynamo.compile_count()
    for task in HINTS:
        blocks_run(fn, 200, task)
    assert dynamo.compile_count() - before == 2


def test_graphs_that_are_dense_for_every_hint_carry_no_guard(compiled: Any) -> None:
    with sparsepass.task("single_qa"):
        report = sparsepass.explain(compiled, torch.randn(1, HEADS, 100, 16))
    assert report.graphs[0].guards == ()
    before = dynamo.compile_count()
    blocks_run(compiled, 100, "aggregation")
    assert dynamo.compile_count() == before


def test_twelve_plans_do_not_hit_the_recompile_limit(fresh_dynamo: None) -> None:
    """Ten plans over two buckets and two dense ones, each reached with a static and then a dynamic length."""
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    for length in (200, 500, 250, 400):
        for task in HINTS:
            assert blocks_run(fn, length, task) == expected_blocks(task, length)


def test_dense_lengths_share_one_dynamic_graph(fresh_dynamo: None) -> None:
    """Adjacent buckets with equal plans are merged: growing dense lengths do not recompile at each power of two."""
    own = Policy(name="dense")
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=True, options=options(**{"sparsepass.policy": own}))
    before = dynamo.compile_count()
    for length in (100, 1500, 3000, 600):
        blocks_run(fn, length, None)
    assert dynamo.compile_count() - before == 1


@pytest.mark.parametrize("filtered", ["keep_tensor_guards_unsafe", "skip_guard_on_globals_unsafe"])
def test_a_dropped_guard_is_answered_with_the_dense_result(fresh_dynamo: None, filtered: str) -> None:
    guard_filter = getattr(torch.compiler, filtered)
    chosen = {**options(), "guard_filter_fn": guard_filter}
    try:
        fn = torch.compile(attend, backend=sparsepass.backend, options=chosen)
    except Exception as error:  # a torch that takes the filter elsewhere
        pytest.skip(f"this torch takes no guard_filter_fn in options: {error}")
    x = torch.randn(1, HEADS, 200, 16)
    with torch.no_grad():
        with sparsepass.task("single_qa"):
            fn(x)
        before = counters.total()
        with sparsepass.task("multi_hop"), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = fn(x)
        ran = (counters.total() - before).computed
    if ran == 0:
        assert any("guard was dropped" in str(warning.message) for warning in seen)
        torch.testing.assert_close(out, attend(x))
    else:  # the filter kept our guard: then the right budget ran
        assert ran == expected_blocks("multi_hop", 200)


def test_hint_inside_the_compiled_region_overrules(fresh_dynamo: None) -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        with sparsepass.task("single_qa"):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    fn = torch.compile(inner, backend=sparsepass.backend, options=options(), fullgraph=True)
    assert blocks_run(fn, 200, "multi_hop") * SITES == expected_blocks("single_qa", 200)


@pytest.mark.parametrize("marking", ["range", "wide range"])
def test_lengths_that_cannot_be_guarded_are_decided_by_the_op(fresh_dynamo: None, marking: str) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    for length in (200, 500, 60):
        x = torch.randn(1, HEADS, length, 16)
        torch._dynamo.mark_dynamic(x, 2, min=2, max=640 if marking == "range" else 8192)
        before = counters.total()
        with torch.no_grad(), sparsepass.task("multi_hop"):
            out = fn(x)
        assert (counters.total() - before).computed == expected_blocks("multi_hop", length)
        assert out.shape == x.shape


def test_unbacked_lengths_are_decided_by_the_op(fresh_dynamo: None) -> None:
    """Written out, since torch itself cannot trace SDPA at an unbacked length."""

    def eager(x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(F.softmax(torch.matmul(x, x.transpose(2, 3)) * 0.25, dim=-1), x)

    fn = torch.compile(eager, backend=sparsepass.backend, options=options(), fullgraph=True)
    for length in (200, 500, 60):
        x = torch.randn(1, HEADS, length, 16)
        torch._dynamo.decorators.mark_unbacked(x, 2)
        before = counters.total()
        with torch.no_grad(), sparsepass.task("single_qa"):
            out = fn(x)
        ran = (counters.total() - before).computed
        assert (ran > 0) == (EDGES[0] < length <= EDGES[2])
        if not ran:
            torch.testing.assert_close(out, eager(x))


def test_a_changed_policy_is_not_answered_from_a_cache(fresh_dynamo: None, monkeypatch: Any, tmp_path: Any) -> None:
    """With warm FX-graph and AOTAutograd caches on disk, another policy still runs its own budgets."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counts = []
    for own in (policy(), policy(0.5), policy()):
        torch._dynamo.reset()
        chosen = options(**{"sparsepass.policy": own, INDUCTOR: True})
        fn = torch.compile(attend, backend=sparsepass.backend, options=chosen)
        counts.append(blocks_run(fn, 320, "unknown"))
    assert counts[0] == counts[2] == expected_blocks("unknown", 320)
    assert counts[1] < counts[0]


def test_turned_off_by_the_environment(fresh_dynamo: None, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPARSEPASS_DISABLE", "1")
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    assert blocks_run(fn, 200, "single_qa") == 0
