"""Guards: whatever hints and lengths come in whatever order, the budget that ran is the one the plan says."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import sparsepass
from sparsepass import plan_keys
from sparsepass.graph import torch_private
from sparsepass.planning.options import INDUCTOR
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.request.hints import NODE_KEY
from sparsepass.rewriting import counters
from sparsepass.rewriting.ops import text_for
from sparsepass.types import Budget, TaskClass
from tests.planning.guard_calls import (
    BLOCK,
    DENSITIES,
    EDGES,
    HEADS,
    HINTS,
    LENGTHS,
    SITES,
    attend,
    budgets_of,
    budgets_run,
    expected,
    inputs,
    options,
    policy,
    spying,
)

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


@pytest.fixture(autouse=True)
def _spy() -> Iterator[None]:
    with spying():
        yield


class Layers(torch.nn.Module):
    """Two layers of the attention of ``attend``, compiled one by one."""

    class Layer(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([self.Layer(), self.Layer()])
        for layer in self.layers:
            layer.compile(backend=sparsepass.backend, options=options())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        result: torch.Tensor = second(first(x, x + 1, x), x, x)
        return result


def at_once(calls: Sequence[Callable[[], list[str]]]) -> list[list[str]]:
    """What calls in a thread each run, all begun together."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], list[str]]) -> list[str]:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


TASKS = st.sampled_from(HINTS)
GIVEN = st.sampled_from(HINTS[1:])
SIZES = st.sampled_from(LENGTHS)
REQUESTS = st.lists(st.tuples(GIVEN, SIZES), min_size=2, max_size=4)


class HintsAndLengths(RuleBasedStateMachine):
    """Switches hints, lengths and what else a graph is compiled for in random order, in threads and tasks at once, and
    drops the compiled code now and then."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.fn: Any
        self.choose("automatic")

    @rule(kind=st.sampled_from(["automatic", "dynamic", "static", "layers"]))
    def choose(self, kind: str) -> None:
        dynamic = {"dynamic": True, "static": False}.get(kind)
        self.fn = (
            Layers()
            if kind == "layers"
            else torch.compile(attend, backend=sparsepass.backend, dynamic=dynamic, options=options())
        )

    @rule(task=TASKS, length=SIZES, batch=st.sampled_from([1, 2]))
    def call(self, task: str | None, length: int, batch: int) -> None:
        assert budgets_run(self.fn, length, task, batch) == expected(task, length)

    @rule(outer=GIVEN, inner=GIVEN, length=SIZES)
    def nested(self, outer: str, inner: str, length: int) -> None:
        with sparsepass.task(outer):
            assert budgets_run(self.fn, length, inner) == expected(inner, length)
            assert budgets_run(self.fn, length, None) == expected(outer, length)

    @rule(requests=REQUESTS)
    def in_threads(self, requests: list[tuple[str, int]]) -> None:
        calls = [functools.partial(budgets_run, self.fn, length, task) for task, length in requests]
        with sparsepass.task("dense"):  # not inherited by the threads, which set their own
            assert at_once(calls) == [expected(task, length) for task, length in requests]

    @rule(requests=REQUESTS, threads=st.booleans())
    def in_asyncio(self, requests: list[tuple[str, int]], threads: bool) -> None:
        async def request(hint: str, length: int) -> list[str]:
            with sparsepass.task(hint):
                await asyncio.sleep(0)
                if threads:
                    return await asyncio.to_thread(budgets_run, self.fn, length, None)
                return budgets_run(self.fn, length, None)

        async def serve() -> list[list[str]]:
            return list(await asyncio.gather(*(request(*one) for one in requests)))

        assert asyncio.run(serve()) == [expected(task, length) for task, length in requests]

    @rule(task=GIVEN, length=SIZES, mode=st.sampled_from(["enabled", "inference", "autocast"]))
    def in_mode(self, task: str, length: int, mode: str) -> None:
        modes: dict[str, Any] = {
            "enabled": torch.enable_grad,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }
        x = inputs(length)
        with modes[mode](), sparsepass.task(task):
            assert budgets_of(lambda: self.fn(x)) == expected(task, length)

    @rule(task=GIVEN, length=SIZES)
    def with_gradients(self, task: str, length: int) -> None:
        """Never sparse, and there are gradients."""
        x = inputs(length).requires_grad_()
        with sparsepass.task(task):
            assert budgets_of(lambda: self.fn(x).sum().backward()) == []
        assert x.grad is not None

    @rule(task=GIVEN, length=SIZES, transform=st.sampled_from(["vmap", "grad"]))
    def transformed(self, task: str, length: int, transform: str) -> None:
        """Dense, or by the right budget for each request, and so afterwards: whatever the backend, Dynamo gives a
        function up that it meets inside a transform, until it is reset."""
        x = inputs(length)
        with torch.no_grad(), sparsepass.task(task):
            if transform == "vmap":
                ran = budgets_of(lambda: torch.func.vmap(self.fn)(x[None]))
            else:
                ran = budgets_of(lambda: torch.func.grad(lambda y: self.fn(y).sum())(x))
        assert ran in ([], expected(task, length))
        assert budgets_run(self.fn, length, task) in ([], expected(task, length))
        torch._dynamo.reset()
        assert budgets_run(self.fn, length, task) == expected(task, length)

    @rule(task=GIVEN, length=SIZES, stance=st.sampled_from(["force_eager", "eager_on_recompile", "default"]))
    def under_a_stance(self, task: str, length: int, stance: str) -> None:
        with torch.compiler.set_stance(stance):
            ran = budgets_run(self.fn, length, task)
        assert ran == expected(task, length) or (stance != "default" and len(ran) < SITES)

    @rule()
    def forget(self) -> None:
        torch._dynamo.reset()


HintsAndLengths.TestCase.settings = settings(
    max_examples=int(os.environ.get("GUARD_EXAMPLES", 100 if DEEP else 4)),
    stateful_step_count=int(os.environ.get("GUARD_STEPS", 100 if DEEP else 10)),
    deadline=None,
    derandomize=not DEEP,
    database=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # each step compiles: to shrink would take hours
    suppress_health_check=list(HealthCheck),
)
TestHintsAndLengths = pytest.mark.slow(HintsAndLengths.TestCase)


@pytest.fixture
def compiled(fresh_dynamo: None) -> Any:
    return torch.compile(attend, backend=sparsepass.backend, options=options())


def test_switching_back_reuses(compiled: Any) -> None:
    for task in ("single_qa", "multi_hop"):
        budgets_run(compiled, 200, task)
    before = torch_private.compile_count()
    for task in ("single_qa", "multi_hop", "single_qa"):
        budgets_run(compiled, 200, task)
    assert torch_private.compile_count() == before


def test_hints_with_equal_plans_share_a_graph(fresh_dynamo: None) -> None:
    budget = Budget("pooled_topk", {"density": 0.5, "block": BLOCK})
    own = Policy(name="two plans", rules=(Rule(TaskClass.SINGLE_QA, budget),))
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(**{"sparsepass.policy": own}))
    before = torch_private.compile_count()
    for task in HINTS:
        budgets_run(fn, 200, task)
    assert torch_private.compile_count() - before == 2


def test_graphs_that_are_dense_for_every_hint_carry_no_guard(compiled: Any) -> None:
    with sparsepass.task("single_qa"):
        report = sparsepass.explain(compiled, torch.randn(1, HEADS, 100, 16))
    assert report.graphs[0].guards == ()
    before = torch_private.compile_count()
    budgets_run(compiled, 100, "aggregation")
    assert torch_private.compile_count() == before


def test_twelve_plans_do_not_hit_the_recompile_limit(fresh_dynamo: None) -> None:
    """Ten plans over two buckets and two dense ones, each reached with a static and then a dynamic length."""
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    for length in (200, 500, 250, 400):
        for task in HINTS:
            before = counters.total()
            assert budgets_run(fn, length, task) == expected(task, length)
            assert (counters.total() - before).computed == expected_blocks(task, length)


def test_the_order_of_graphs_is_kept_once_a_second_thread_compiles(
    fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else threads miss graphs that another one moves, and compile them again up to the recompile limit."""
    moved: list[bool] = []
    monkeypatch.setattr(torch._C._dynamo.eval_frame, "_set_lru_cache", moved.append)
    monkeypatch.setattr(torch_private, "_threads", set())
    monkeypatch.setattr(
        torch_private, "_keep_order_of_graphs", functools.cache(torch_private._keep_order_of_graphs.__wrapped__)
    )
    fn = torch.compile(attend, backend=sparsepass.backend, options=options())
    budgets_run(fn, 200, "multi_hop")
    assert moved == []
    with ThreadPoolExecutor(1) as pool:
        for task in ("single_qa", "multi_qa"):
            pool.submit(budgets_run, fn, 200, task).result()
    assert moved == [False]


def expected_blocks(task: str | None, length: int) -> int:
    """Blocks that the plan stands for: rows of i + 1 visible blocks, at most k kept, three always."""
    if not expected(task, length):
        return 0
    density = DENSITIES[task or "unknown"] * (1.0 if length <= EDGES[1] else 0.5)
    visible = [i + 1 for i in range(-(-length // BLOCK))]
    k = next(k for k in range(1, len(visible) + 1) if sum(min(k, a) for a in visible) >= density * sum(visible))
    return sum(min(a, max(k, min(a, 3))) for a in visible) * HEADS * SITES


def test_dense_lengths_share_one_dynamic_graph(fresh_dynamo: None) -> None:
    """Adjacent buckets with equal plans are merged: growing dense lengths do not recompile at each power of two."""
    own = Policy(name="dense")
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=True, options=options(**{"sparsepass.policy": own}))
    before = torch_private.compile_count()
    for length in (100, 1500, 3000, 600):
        budgets_run(fn, length, None)
    assert torch_private.compile_count() - before == 1


FILTERS = [
    "keep_tensor_guards_unsafe",
    "skip_guard_on_globals_unsafe",
    "skip_guard_on_all_nn_modules_unsafe",
    "skip_guard_on_inbuilt_nn_modules_unsafe",
    "skip_all_guards_unsafe",
]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("filtered", FILTERS)
def test_a_dropped_guard_is_answered_with_the_dense_result(fresh_dynamo: None, filtered: str, dynamic: bool) -> None:
    """The hint's, the one on a range of lengths, or those on sizes that are numbers in the graph."""
    chosen = {**options(), "guard_filter_fn": getattr(torch.compiler, filtered)}
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=dynamic, options=chosen)
    assert budgets_run(fn, 200, "single_qa") == expected("single_qa", 200)
    for task, length in (("multi_hop", 200), ("single_qa", 640), ("single_qa", 321), ("single_qa", 128)):
        x = inputs(length)
        seen: list[torch.Tensor] = []

        def call(task: str = task, x: torch.Tensor = x, seen: list[torch.Tensor] = seen) -> None:
            with torch.no_grad(), sparsepass.task(task):
                seen.append(fn(x))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ran = budgets_of(call)
        if ran:  # the filter kept the guard
            assert ran == expected(task, length)
        else:
            torch.testing.assert_close(seen[0], attend(x))


@pytest.mark.parametrize("what", ["hint", "length", "size"])
def test_a_dropped_guard_is_named(fresh_dynamo: None, what: str) -> None:
    chosen = {**options(), "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=what != "size", options=chosen)
    budgets_run(fn, 200, "single_qa")
    words = {"hint": "the hint in force wants", "length": r"640 is outside \(128, 320\]", "size": "640, not 200"}[what]
    with pytest.warns(RuntimeWarning, match=rf"{words}.*guard was dropped"):
        assert budgets_run(fn, 200 if what == "hint" else 640, "multi_hop" if what == "hint" else "single_qa") == []


def test_hint_inside_the_compiled_region_overrules(fresh_dynamo: None) -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        with sparsepass.task("single_qa"):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    fn = torch.compile(inner, backend=sparsepass.backend, options=options(), fullgraph=True)
    assert budgets_run(fn, 200, "multi_hop") == expected("single_qa", 200, sites=1)


@pytest.mark.parametrize("marking", ["range", "wide range"])
def test_lengths_that_cannot_be_guarded_are_decided_by_the_op(fresh_dynamo: None, marking: str) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    for length in (200, 500, 60, *EDGES):
        x = torch.randn(1, HEADS, length, 16)
        torch._dynamo.mark_dynamic(x, 2, min=2, max=640 if marking == "range" else 8192)
        before = counters.total()

        def call(x: torch.Tensor = x) -> None:
            with torch.no_grad(), sparsepass.task("multi_hop"):
                assert fn(x).shape == x.shape

        chosen = [text_for(table, length) for table in budgets_of(call)]
        assert [text for text in chosen if text != "dense"] == expected("multi_hop", length)
        assert (counters.total() - before).computed == expected_blocks("multi_hop", length)


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
    texts = []
    for own in (policy(), policy(0.5), policy()):
        torch._dynamo.reset()
        chosen = options(**{"sparsepass.policy": own, INDUCTOR: True})
        fn = torch.compile(attend, backend=sparsepass.backend, options=chosen)
        texts.append(budgets_run(fn, 320, "unknown"))
    assert texts[0] == texts[2] == expected("unknown", 320)
    assert texts[1] == ["pooled_topk(density=0.45, block=64)"] * SITES


def test_turned_off_by_the_environment(fresh_dynamo: None, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPARSEPASS_DISABLE", "1")
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    assert budgets_run(fn, 200, "single_qa") == []


@pytest.mark.filterwarnings("ignore:sparsepass.task")
def test_threads_keep_their_hints_while_another_compiles(fresh_dynamo: None) -> None:
    """``torch.compiler.is_compiling()`` is true in every thread meanwhile: the backend below waits for the others."""
    served = torch.compile(attend, backend=sparsepass.backend, options=options())
    requests = [(task, length) for task in DENSITIES for length in (200, 640)]
    for task, length in requests:
        budgets_run(served, length, task)
    compiling, done = threading.Event(), threading.Event()
    hints: list[Any] = []

    def slow(gm: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Any:
        compiling.set()
        assert done.wait(300)
        hints.extend(node.meta.get("custom") for node in gm.graph.nodes if node.op == "call_function")
        return sparsepass.backend(gm, examples, options=options())

    def other(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) + 1

    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(budgets_run, torch.compile(other, backend=slow), 200, "aggregation")
        try:
            assert compiling.wait(300)
            calls = [functools.partial(budgets_run, served, length, task) for task, length in requests]
            assert at_once(calls) == [expected(task, length) for task, length in requests]
            with sparsepass.task("dense"):
                assert sparsepass.current_task() is TaskClass.DENSE
            with sparsepass.task("auto", at_most="multi_hop"):
                assert budgets_run(served, 200, None) == expected("multi_hop", 200)
        finally:
            done.set()
        assert compiled.result() == expected("aggregation", 200, sites=1)
    assert not any(hints)


@pytest.mark.parametrize("strict", [True, False])
def test_a_hint_in_exported_code_stays_with_it(fresh_dynamo: None, strict: bool) -> None:
    class Hinted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with sparsepass.task("single_qa"):
                x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    with sparsepass.task("dense"):
        program = torch.export.export(Hinted(), (inputs(200),), strict=strict)
        assert sparsepass.current_task() is TaskClass.DENSE
    found = [node.meta.get("custom", {}).get(NODE_KEY) for node in program.graph.nodes if node.op == "call_function"]
    assert found == ["single_qa", None]
    assert "custom" not in torch.fx.traceback.get_current_meta()


def test_reports_count_each_graph_alone(fresh_dynamo: None) -> None:
    """Graphs of one code and one plan: of other dtypes, batches and lengths, and a model that stays dense."""
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=False, options=options())
    calls = [inputs(320), inputs(320, 4).bfloat16(), inputs(320).bfloat16(), inputs(300), inputs(100)]

    class Each(torch.nn.Module):
        def run(self, *calls: torch.Tensor) -> None:
            for x in calls:
                fn(x)

    alone = [sparsepass.explain(fn, x).graphs[0].sites for x in calls]
    together = [graph.sites for graph in sparsepass.explain(Each().run, *calls).graphs]
    assert together == alone
    assert [site.blocks_computed for site in together[4]] == [0, 0]


def test_slots_and_plan_keys_go_with_their_graph(fresh_dynamo: None) -> None:
    def compile_one() -> Any:
        torch._dynamo.reset()
        gc.collect()
        with sparsepass.rewriting.record.recording() as recorded:
            budgets_run(torch.compile(attend, backend=sparsepass.backend, options=options()), 200, "multi_hop")
        slots = recorded.compiled[0].slots
        assert slots is not None
        return slots.first, set(plan_keys)

    first = compile_one()
    for _ in range(3):
        assert compile_one() == first  # so that caches on disk serve it again
    torch._dynamo.reset()
    gc.collect()
    assert not set(plan_keys) & first[1]


def test_a_full_table_of_counters_says_so(fresh_dynamo: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(counters, "_place", lambda key, sites: None)
    fn = torch.compile(attend, backend=sparsepass.backend, options=options())
    with pytest.warns(RuntimeWarning, match="table of counters is full"):
        report = sparsepass.explain(fn, inputs(200))
    assert [site.blocks_computed for site in report.graphs[0].sites] == [0, 0]
    assert any("table of counters is full" in note for note in report.graphs[0].notes)


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=40))
def test_slots_of_living_graphs_never_overlap(requests: list[tuple[int, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, empty in (("_live", {}), ("_homes", OrderedDict()), ("_freed", deque()), ("_next", 0)):
            patch.setattr(counters, name, empty)
        patch.setattr(counters, "CAPACITY", 24)
        living: list[tuple[counters.Slots, int]] = []
        for sites, drop in requests:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                slots = counters.reserve(f"graph {len(living) % 3}", sites)
            taken = [slot for held, count in living for slot in range(held.first, held.first + count)]
            if slots.counted:
                assert not set(taken) & set(range(slots.first, slots.first + sites))
                assert slots.first + sites < counters.CAPACITY
                living.append((slots, sites))
            else:
                assert len(taken) + sites * (len(living) + 1) >= counters.CAPACITY - 1  # no gap was wide enough
            del slots
            if drop and living:
                living.pop(0)
