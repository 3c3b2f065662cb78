"""Hints: their names, and where a hint holds: nested, on threads, in asyncio, in generators, in compiled regions."""

import asyncio
import inspect
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.errors import HintError
from sparsepass.request.hints import (
    NODE_KEY,
    TaskHint,
    alike,
    current_task,
    hint_text,
    hint_words,
    parse_hint_text,
    resolve_hint,
    resolve_hints,
    task,
)
from sparsepass.types import TaskClass

InForce = TaskClass | tuple[TaskClass, ...]
NAMES = [str(member) for member in TaskClass]


@pytest.mark.parametrize("member", list(TaskClass))
def test_every_class_resolves_by_name_and_by_member(member: TaskClass) -> None:
    assert resolve_hint(str(member)) is member
    assert resolve_hint(member) is member
    with task(member.value):
        assert current_task() is member


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (TaskHint("low", "low"), TaskClass.SINGLE_QA),
        (TaskHint("low", "low", queries=4), TaskClass.MULTI_QA),
        (TaskHint("low", "high"), TaskClass.MULTI_HOP),
        (TaskHint("low", "high", queries=9), TaskClass.MULTI_HOP),
        (TaskHint("high", "low"), TaskClass.AGGREGATION),
        (TaskHint("high", "high"), TaskClass.UNKNOWN),
        (None, TaskClass.UNKNOWN),
    ],
)
def test_axes_map_to_classes(hint: TaskHint | None, expected: TaskClass) -> None:
    assert resolve_hint(hint) is expected


def test_misspelled_hint_names_the_close_ones() -> None:
    with pytest.raises(HintError, match=r"'single_qs'.*Did you mean 'single_qa'.*'multi_hop'"):
        task("single_qs")  # eagerly: not only when entered
    with pytest.raises(HintError, match="int"):
        task(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"scope": "lo", "dispersion": "low"},
        {"scope": "low", "dispersion": None},
        {"scope": "low", "dispersion": "low", "queries": 0},
        {"scope": "low", "dispersion": "low", "queries": True},
        {"scope": "low", "dispersion": "low", "queries": 1.5},
    ],
)
def test_bad_axes_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(HintError, match="accepted"):
        TaskHint(**fields)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_is_a_hint_per_row(kind: Any) -> None:
    given = kind(["single_qa", TaskHint("high", "low"), TaskClass.DENSE, None])
    expected = (TaskClass.SINGLE_QA, TaskClass.AGGREGATION, TaskClass.DENSE, TaskClass.UNKNOWN)
    with task(given) as held, task(given[:1]):
        assert held == expected
        assert current_task() == (TaskClass.SINGLE_QA,)
        with task("multi_qa"):
            assert current_task() is TaskClass.MULTI_QA
    assert current_task() is TaskClass.UNKNOWN
    assert repr(task(given)) == "sparsepass.task(['single_qa', 'aggregation', 'dense', 'unknown'])"


def test_bad_rows_are_named() -> None:
    with pytest.raises(HintError, match=r"Row 1 of the task hints: Unknown task hint 'multi_hopp'.*'multi_hop'"):
        task(["single_qa", "multi_hopp"])
    with pytest.raises(HintError, match="empty"):
        task([])
    with pytest.raises(HintError, match=r"Row 0.*list"):
        task([["single_qa"]])  # type: ignore[list-item]


@given(st.one_of(st.sampled_from(TaskClass), st.lists(st.sampled_from(TaskClass), min_size=1).map(tuple)))
def test_texts_of_resolved_hints_read_back(resolved: Any) -> None:
    assert parse_hint_text(hint_text(resolved)) == resolved
    assert resolve_hints(resolved) == resolved
    if isinstance(resolved, tuple):
        assert alike(resolved) == (resolved[0] if len(set(resolved)) == 1 else None)
        assert all(str(member) in hint_words(resolved) for member in resolved)


def test_nested_reentrant_and_exception_safe() -> None:
    outer, inner = task("multi_hop"), task("single_qa")
    with outer:
        with inner, outer, outer:
            assert current_task() is TaskClass.MULTI_HOP
        assert current_task() is TaskClass.MULTI_HOP
        with pytest.raises(RuntimeError), inner:
            raise RuntimeError
        assert current_task() is TaskClass.MULTI_HOP
        with task(None):
            assert current_task() is TaskClass.UNKNOWN
    assert current_task() is TaskClass.UNKNOWN


@settings(deadline=None)
@given(st.recursive(st.just(()), lambda sub: st.lists(st.tuples(st.sampled_from(NAMES), sub), max_size=3)))
def test_any_nesting_restores(tree: Any) -> None:
    scopes = {name: task(name) for name in NAMES}

    def walk(node: Any, expected: TaskClass) -> None:
        assert current_task() is expected
        for name, sub in node:
            with scopes[name]:
                walk(sub, TaskClass(name))
            assert current_task() is expected

    walk(tree, TaskClass.UNKNOWN)


def test_one_scope_object_on_many_threads() -> None:
    scope, barrier = task("single_qa"), threading.Barrier(4)

    def serve(index: int) -> list[InForce]:
        seen = [current_task()]
        with task(NAMES[index]):
            barrier.wait()
            with scope:
                barrier.wait()
                seen.append(current_task())
            barrier.wait()
            seen.append(current_task())
        return [*seen, current_task()]

    with task("dense"), ThreadPoolExecutor(4) as pool:
        for index, seen in enumerate(pool.map(serve, range(4))):
            assert seen == ["unknown", "single_qa", NAMES[index], "unknown"]  # threads start with no hint
        assert current_task() is TaskClass.DENSE


def test_asyncio_tasks_do_not_see_each_other() -> None:
    scope = task("aggregation")

    @task("multi_qa")
    async def decorated() -> InForce:
        await asyncio.sleep(0)
        return current_task()

    async def block(name: str) -> InForce:
        with task(name), scope:
            await asyncio.sleep(0)
        with task(name):
            await asyncio.sleep(0)
            return current_task()

    async def main() -> list[InForce]:
        return list(await asyncio.gather(block("dense"), decorated(), block("single_qa"), block("multi_hop")))

    assert inspect.iscoroutinefunction(decorated)
    assert asyncio.run(main()) == ["dense", "multi_qa", "single_qa", "multi_hop"]


def test_decorated_functions_keep_name_and_hint() -> None:
    @task("single_qa")
    def forward(x: int, *, y: int = 1) -> tuple[int, InForce]:
        """Doc."""
        return x + y, current_task()

    assert forward(1, y=2) == (3, TaskClass.SINGLE_QA)
    assert (forward.__name__, forward.__doc__) == ("forward", "Doc.")
    assert list(inspect.signature(forward).parameters) == ["x", "y"]
    assert current_task() is TaskClass.UNKNOWN


def test_decorated_callable_object_with_async_call() -> None:
    class Served:
        async def __call__(self) -> InForce:
            await asyncio.sleep(0)
            return current_task()

    assert asyncio.run(task("multi_hop")(Served())()) is TaskClass.MULTI_HOP


def test_decorated_generator_hints_its_body_and_not_its_consumer() -> None:
    closed: list[InForce] = []

    @task("single_qa")
    def stream() -> Generator[Any, Any, str]:
        try:
            with task("multi_hop"):
                sent = yield current_task()
                yield (sent, current_task())
            try:
                yield current_task()
            except KeyError:
                yield "caught", current_task()
        finally:
            closed.append(current_task())
        return "done"

    with task("dense"):
        source: Any = stream()
        assert next(source) == "multi_hop"
        assert current_task() is TaskClass.DENSE
        assert source.send(7) == (7, "multi_hop")
        assert next(source) == "single_qa"
        assert source.throw(KeyError()) == ("caught", "single_qa")
        with pytest.raises(StopIteration, match="done"):
            next(source)
        assert current_task() is TaskClass.DENSE
    early = stream()
    next(early)
    early.close()
    assert closed == ["single_qa", "single_qa"]
    assert current_task() is TaskClass.UNKNOWN


def test_decorated_async_generator() -> None:
    closed: list[InForce] = []

    @task("multi_qa")
    async def stream() -> AsyncIterator[InForce]:
        try:
            for _ in range(3):
                await asyncio.sleep(0)
                yield current_task()
        finally:
            closed.append(current_task())

    async def main() -> list[InForce]:
        seen = []
        async for item in stream():
            seen += [item, current_task()]
        early: Any = stream()
        await anext(early)
        await early.aclose()
        return seen

    assert asyncio.run(main()) == ["multi_qa", "unknown"] * 3
    assert closed == ["multi_qa", "multi_qa"]


def test_what_cannot_be_decorated_is_refused() -> None:
    for thing in (TaskHint, 3):
        with pytest.raises(HintError, match="decorate the method"):
            task("dense")(thing)  # type: ignore[type-var]


def hints_of(fn: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, str | None]:
    """Compile ``fn`` with a backend that only reads the annotations."""
    seen: dict[str, str | None] = {}

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        for node in gm.graph.nodes:
            if node.op == "call_function":
                seen[node.target.__name__] = node.meta.get("custom", {}).get(NODE_KEY)
        return gm.forward

    torch._dynamo.reset()
    x = torch.ones(2)
    torch.testing.assert_close(torch.compile(fn, backend=backend, fullgraph=True)(x), fn(x))
    return seen


@task("multi_qa")
def decorated_sin(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x)


def nested(x: torch.Tensor) -> torch.Tensor:
    x = torch.abs(x)
    with task("single_qa"):
        x = torch.cos(x)
        with task(TaskHint("high", "low")):
            x = torch.tan(x)
        x = torch.exp(decorated_sin(x))
        with task(None):
            x = torch.tanh(x)
        with task(["single_qa", "multi_hop"]):
            x = torch.sigmoid(x)
    return torch.neg(x)


class Hinted(torch.nn.Module):
    @task(TaskClass.DENSE)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def test_hints_inside_a_compiled_region_annotate_its_nodes() -> None:
    with task("dense"):  # the caller's hint is read elsewhere; it must not reach the nodes
        seen = hints_of(nested)
    assert seen == {
        "abs": None,
        "cos": "single_qa",
        "tan": "aggregation",
        "sin": "multi_qa",
        "exp": "single_qa",
        "tanh": "unknown",
        "sigmoid": "single_qa,multi_hop,",
        "neg": None,
    }
    assert hints_of(decorated_sin) == {"sin": "multi_qa"}
    assert hints_of(Hinted()) == {"sin": "dense"}


def test_misspelled_hint_inside_a_compiled_region() -> None:
    def misspelled(x: torch.Tensor) -> torch.Tensor:
        with task("multihop"):
            return torch.sin(x)

    torch._dynamo.reset()
    with pytest.raises(HintError, match="'multi_hop'"):
        torch.compile(misspelled, backend="eager")(torch.ones(2))


def test_graph_break_inside_the_block_runs_it_eagerly_with_the_hint() -> None:
    compiled_under = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled_under.append(current_task())
        return gm.forward

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)

    def broken(x: torch.Tensor) -> torch.Tensor:
        with task("multi_hop"):
            x = leaf(x)
            torch._dynamo.graph_break()
            return leaf(x)

    torch._dynamo.reset()
    x = torch.ones(2)
    torch.testing.assert_close(torch.compile(broken, backend=backend)(x), broken(x))
    assert compiled_under == [TaskClass.MULTI_HOP]  # the leaf, once


def test_module_itself_does_not_import_torch() -> None:
    code = """if True:
        import sys, types, importlib.util
        package = types.ModuleType("sparsepass")  # stands in, so that what the real package imports does not count
        package.__path__ = importlib.util.find_spec("sparsepass").submodule_search_locations
        sys.modules["sparsepass"] = package
        import sparsepass.request.hints
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
