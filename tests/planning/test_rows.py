"""Mixed batches: one hint per row. Every row is computed as under its own hint, and mixes share their graphs."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

import sparsepass
from sparsepass.errors import HintError, KernelInputError
from sparsepass.graph import torch_private
from sparsepass.methods import METHODS, make_method
from sparsepass.methods.heads import float32_at_most
from sparsepass.methods.rows import decode_rows, dial_table, share_batch
from sparsepass.planning.mix import BucketClasses, MixTable, SiteClasses
from sparsepass.planning.options import INDUCTOR
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.rewriting import counters
from sparsepass.rewriting.row_inputs import class_numbers
from sparsepass.types import DENSE, TASKS, Budget, TaskClass
from tests.planning.guard_calls import BLOCK, HEADS, SITES, attend
from tests.tiny import SPARSE_OPTIONS, model, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Row = str | None
DENSITIES = {"single_qa": 0.1, "multi_qa": 0.6, "multi_hop": 0.75, "aggregation": 0.85, "unknown": 0.95}
HINTS: list[Row] = [None, "dense", *DENSITIES]
LOW, HIGH = 128, 1024
"""Sparse above and up to."""
LENGTHS = [60, 640, 650, 1000, 1100]
ALL_SPARSE = 640
"""A length at which no two classes keep equally many blocks."""


def options(**changes: Any) -> dict[str, Any]:
    rules = tuple(
        Rule(TaskClass(task), Budget("pooled_topk", {"density": density, "block": BLOCK}), above=LOW, up_to=HIGH)
        for task, density in DENSITIES.items()
    )
    return {**SPARSE_OPTIONS, "sparsepass.policy": Policy(name="rows", rules=rules), **changes}


def batch_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, HEADS, length, 16, generator=torch.Generator().manual_seed(seed + length)).to(DEVICE)


def row_blocks(task: Row, length: int) -> int:
    """Blocks of one row, from the definition: of i + 1 visible ones at most k, three always; of a dense row all."""
    visible = [i + 1 for i in range(-(-length // BLOCK))]
    density = 1.0 if task == "dense" else DENSITIES[task or "unknown"]
    k = next(k for k in range(1, len(visible) + 1) if sum(min(k, a) for a in visible) >= density * sum(visible))
    return sum(min(a, max(k, min(a, 3))) for a in visible) * HEADS * SITES


def blocks_of(rows: Sequence[Row], length: int) -> int:
    sparse = LOW < length <= HIGH and any(row != "dense" for row in rows)
    return sum(row_blocks(row, length) for row in rows) if sparse else 0


def run(fn: Any, x: torch.Tensor, hint: Any) -> tuple[torch.Tensor, int]:
    """The output, and the blocks that ran."""
    before = counters.total()
    with torch.no_grad(), sparsepass.task(hint):
        out = fn(x)
    return out, (counters.total() - before).computed


@pytest.fixture
def compiled(fresh_dynamo: None) -> Any:
    return torch.compile(attend, backend=sparsepass.backend, options=options())


def caps(rows: list[Row]) -> object:
    """What tells the graph of a batch from others at one length and batch size: the cap, if rows differ."""
    kinds = set(rows)
    if len(kinds) == 1:
        return rows[0]
    return "cap", "dense" if "dense" in kinds else max(kinds, key=lambda row: DENSITIES[row or "unknown"])


class RowsAndLengths(RuleBasedStateMachine):
    """Random hints per row, batches and lengths in random order: the blocks that ran, each row's output, compiles."""

    def __init__(self) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.fn = torch.compile(attend, backend=sparsepass.backend, dynamic=True, options=options())
        self.alone = torch.compile(attend, backend=sparsepass.backend, dynamic=True, options=options())
        self.before = torch_private.compile_count()
        self.graphs: set[object] = set()

    @rule(rows=st.lists(st.sampled_from(HINTS), min_size=3, max_size=5), length=st.sampled_from(LENGTHS))
    def call(self, rows: list[Row], length: int) -> None:
        x = batch_of(len(rows), length)
        out, blocks = run(self.fn, x, rows)
        assert blocks == blocks_of(rows, length)
        within = LOW < length <= HIGH
        self.graphs.add(("within", caps(rows)) if within else ("outside", length > HIGH))
        assert torch_private.compile_count() - self.before <= len(self.graphs)
        for index, row in enumerate(rows):
            reference = attend if row == "dense" else self.alone
            count = torch_private.compile_count()
            single, _ = run(reference, x[index : index + 1], row)
            self.before += torch_private.compile_count() - count
            torch.testing.assert_close(out[index : index + 1], single)

    @rule(rows=st.lists(st.sampled_from(HINTS), min_size=3, max_size=5), others=st.sampled_from(HINTS))
    def nested_in_threads(self, rows: list[Row], others: Row) -> None:
        seen: list[int] = []
        x = batch_of(len(rows), ALL_SPARSE)
        thread = threading.Thread(target=lambda: seen.append(run(self.fn, x, rows)[1]))
        with sparsepass.task(others):
            thread.start()
            thread.join()
            seen.append(run(self.fn, x, rows[::-1])[1])
        assert seen == [blocks_of(rows, ALL_SPARSE)] * 2
        self.graphs.add(("within", caps(rows)))


RowsAndLengths.TestCase.settings = settings(max_examples=4, stateful_step_count=6, deadline=None, derandomize=True)
TestRowsAndLengths = pytest.mark.slow(RowsAndLengths.TestCase)


def test_rows_are_computed_as_under_their_own_hint(compiled: Any) -> None:
    x = batch_of(len(HINTS), ALL_SPARSE)
    out, blocks = run(compiled, x, HINTS)
    assert blocks == blocks_of(HINTS, ALL_SPARSE)
    assert len({row_blocks(row, ALL_SPARSE) for row in HINTS}) == 6
    for index, row in enumerate(HINTS):
        single, _ = run(compiled, x[index : index + 1], row)
        torch.testing.assert_close(out[index : index + 1], single)


def test_other_arrangements_and_mixes_under_the_same_cap_share_a_graph(compiled: Any) -> None:
    x = batch_of(3, ALL_SPARSE)
    run(compiled, x, ["single_qa", "multi_hop", "multi_qa"])
    count = torch_private.compile_count()
    for rows in (["multi_hop", "single_qa", "single_qa"], ["multi_qa", "multi_hop", "multi_hop"]):
        assert run(compiled, x, rows)[1] == blocks_of(rows, ALL_SPARSE)
    assert torch_private.compile_count() == count
    run(compiled, x, ["single_qa", "dense", "multi_qa"])
    run(compiled, x, ["aggregation", "unknown", "dense"])
    assert torch_private.compile_count() == count + 1  # all mixes with a dense row are one


def test_rows_of_one_class_are_the_single_hint(compiled: Any) -> None:
    x = batch_of(2, ALL_SPARSE)
    run(compiled, x, "multi_qa")
    count = torch_private.compile_count()
    assert run(compiled, x, ["multi_qa", "multi_qa"])[1] == blocks_of(["multi_qa"] * 2, ALL_SPARSE)
    assert torch_private.compile_count() == count


def test_classes_with_equal_budgets_are_one_hint(fresh_dynamo: None) -> None:
    own = Policy(name="one", rules=(Rule(None, Budget("pooled_topk", {"density": 0.5, "block": BLOCK})),))
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(**{"sparsepass.policy": own}))
    x = batch_of(2, ALL_SPARSE)
    run(fn, x, "multi_hop")
    count = torch_private.compile_count()
    run(fn, x, ["multi_hop", None])
    assert torch_private.compile_count() == count


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("rows", [["single_qa", "multi_hop"], ["single_qa", "single_qa"], ["multi_qa"], ["dense"] * 4])
def test_a_list_of_another_length_is_refused_at_the_call(fresh_dynamo: None, dynamic: Any, rows: list[str]) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=dynamic, options=options())
    x = batch_of(3, ALL_SPARSE)
    said = rf"{len(rows)} task hints for a batch of 3 rows: \['.*'\]. Accepted is one hint per row of the batch, here 3"
    for _ in range(2):  # when it is compiled, and when it is there already
        if rows[0] == "dense":  # nothing is sparse: no hint matters
            run(fn, x, rows)
        else:
            with pytest.raises(HintError, match=said):
                run(fn, x, rows)
    assert run(fn, x, ["single_qa", "multi_hop", "single_qa"])[1] == blocks_of(
        ["single_qa", "multi_hop", "single_qa"], ALL_SPARSE
    )


def test_one_row(compiled: Any) -> None:
    x = batch_of(1, ALL_SPARSE)
    assert run(compiled, x, ["multi_qa"])[1] == blocks_of(["multi_qa"], ALL_SPARSE)
    with pytest.raises(HintError, match="a batch of 1 row:"):
        run(compiled, x, ["multi_qa", "single_qa"])


def test_a_batch_size_that_varies(fresh_dynamo: None) -> None:
    """One graph for all batch sizes but one."""
    fn = torch.compile(attend, backend=sparsepass.backend, dynamic=True, options=options(), fullgraph=True)
    count = torch_private.compile_count()
    for size in (3, 5, 4, 7):  # not the number of heads, which would be taken for the same size
        rows: list[Row] = [list(DENSITIES)[2 - i % 3] for i in range(size)]
        assert run(fn, batch_of(size, ALL_SPARSE), rows)[1] == blocks_of(rows, ALL_SPARSE)
    assert torch_private.compile_count() - count == 1


def test_a_batch_size_that_is_computed(fresh_dynamo: None) -> None:
    def joined(x: torch.Tensor) -> torch.Tensor:
        return attend(torch.cat((x, x + 1)))

    fn = torch.compile(joined, backend=sparsepass.backend, dynamic=True, options=options(), fullgraph=True)
    for size in (2, 3):
        rows: list[Row] = ["single_qa", "multi_hop"] * size
        assert run(fn, batch_of(size, ALL_SPARSE), rows)[1] == blocks_of(rows, ALL_SPARSE)
        with pytest.raises(HintError, match=f"a batch of {2 * size} rows"):
            run(fn, batch_of(size, ALL_SPARSE), rows[1:])


def test_a_batch_size_known_on_the_device_alone_gets_the_cap(fresh_dynamo: None) -> None:
    def eager(x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(F.softmax(torch.matmul(x, x.transpose(2, 3)) * 0.25, dim=-1), x)

    fn = torch.compile(eager, backend=sparsepass.backend, options=options(), fullgraph=True)
    x = batch_of(3, ALL_SPARSE)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    mixed, _ = run(fn, x, ["single_qa", "multi_hop", "single_qa"])
    other = batch_of(3, ALL_SPARSE)
    torch._dynamo.decorators.mark_unbacked(other, 0)
    torch.testing.assert_close(mixed, run(fn, other, "multi_hop")[0])


def test_lengths_that_cannot_be_guarded(fresh_dynamo: None) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, options=options(), fullgraph=True)
    rows: list[Row] = ["single_qa", "multi_hop"]
    for length in (200, 640, 60):
        x = batch_of(2, length)
        torch._dynamo.mark_dynamic(x, 2, min=2, max=8192)
        assert run(fn, x, rows)[1] == blocks_of(rows, length)


def test_a_hint_per_row_inside_the_compiled_region_overrules(fresh_dynamo: None) -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        with sparsepass.task(["single_qa", "multi_hop"]):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    fn = torch.compile(inner, backend=sparsepass.backend, options=options(), fullgraph=True)
    for outer in ("multi_qa", ["dense", "multi_qa"]):
        _, blocks = run(fn, batch_of(2, ALL_SPARSE), outer)
        assert blocks * SITES == blocks_of(["single_qa", "multi_hop"], ALL_SPARSE)
    with pytest.raises(HintError, match="2 task hints for a batch of 3 rows"):
        run(fn, batch_of(3, ALL_SPARSE), "multi_qa")


def test_graph_breaks_asyncio_and_decorators(fresh_dynamo: None) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        first = F.scaled_dot_product_attention(x, x + 1, x, is_causal=True)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(first, x, x, is_causal=True)

    fn = torch.compile(broken, backend=sparsepass.backend, options=options())
    x = batch_of(2, ALL_SPARSE)
    mixes: list[list[Row]] = [["single_qa", "multi_hop"], ["multi_hop", "single_qa"], [None, "multi_qa"]]

    async def request(rows: list[Row]) -> int:
        @sparsepass.task(rows)
        async def served() -> int:
            await asyncio.sleep(0)
            before = counters.total()
            with torch.no_grad():
                fn(x)
            return (counters.total() - before).computed

        return await served()

    async def serve() -> list[int]:
        return list(await asyncio.gather(*(request(rows) for rows in mixes)))

    assert asyncio.run(serve()) == [blocks_of(rows, ALL_SPARSE) for rows in mixes]


def test_the_default_of_a_region_may_be_a_list(fresh_dynamo: None) -> None:
    fn = sparsepass.sparse(attend, task=["single_qa", "multi_hop"], options=options())
    before = counters.total()
    with torch.no_grad():
        fn(batch_of(2, ALL_SPARSE))
    assert (counters.total() - before).computed == blocks_of(["single_qa", "multi_hop"], ALL_SPARSE)


def test_a_dropped_guard_is_answered_with_the_dense_result(fresh_dynamo: None) -> None:
    chosen = {**options(), "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    try:
        fn = torch.compile(attend, backend=sparsepass.backend, options=chosen)
    except Exception as error:  # a torch that takes the filter elsewhere
        pytest.skip(f"this torch takes no guard_filter_fn in options: {error}")
    x = batch_of(2, ALL_SPARSE)
    run(fn, x, ["single_qa", "multi_hop"])
    # Under the same cap the graph is right, whatever the rows: they are read at the call.
    assert run(fn, x, ["multi_hop", "single_qa"])[1] == blocks_of(["multi_hop", "single_qa"], ALL_SPARSE)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        out, blocks = run(fn, x, ["single_qa", "dense"])
    if blocks == 0:
        torch.testing.assert_close(out, attend(x))
    else:
        assert blocks == blocks_of(["single_qa", "dense"], ALL_SPARSE)


@pytest.fixture
def pays_up_to_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A crossover under which sparse pays up to density 0.5, at every length."""
    base = {"device": "cpu", "dtype": "float32", "head_dim": 64, "dense_ms": 1.0}
    records = [
        {**base, "length": length, "density": density, "sparse_ms": 1.9 * density}
        for length in (64, 1024)
        for density in (0.1, 0.5, 1.0)
    ]
    table = tmp_path / "crossover.json"
    table.write_text(json.dumps({"records": records}))
    monkeypatch.setenv("SPARSEPASS_TUNING", str(table))


@pytest.mark.skipif(DEVICE != "cpu", reason="the crossover of this test is for a CPU")
@pytest.mark.usefixtures("fresh_dynamo", "pays_up_to_half")
def test_sparse_only_where_the_mean_over_the_rows_pays() -> None:
    rules = tuple(
        Rule(TaskClass(task), Budget("pooled_topk", {"density": density, "block": BLOCK}))
        for task, density in {"single_qa": 0.1, "multi_hop": 0.6}.items()
    )
    chosen = options(**{"sparsepass.policy": Policy(name="two", rules=rules), "sparsepass.always_sparse": False})
    fn = torch.compile(attend, backend=sparsepass.backend, options=chosen)
    x = batch_of(4, ALL_SPARSE)
    assert run(fn, x, "multi_hop")[1] == 0  # alone it is over what pays
    mostly = ["single_qa", "multi_hop", "single_qa", "single_qa"]
    _, blocks = run(fn, x, mostly)  # mean 0.225
    assert blocks > 0
    count = torch_private.compile_count()
    assert run(fn, x, ["multi_hop", "multi_hop", "multi_hop", "single_qa"])[1] > 0  # mean 0.475
    assert torch_private.compile_count() == count
    assert run(fn, x, ["dense", "multi_hop", "multi_hop", "single_qa"])[1] == 0  # mean 0.575: the dense graph
    assert run(fn, x, ["dense", "dense", "dense", "single_qa"])[1] == 0
    assert torch_private.compile_count() == count
    assert run(fn, x, ["dense", "single_qa", "single_qa", "single_qa"])[1] > 0  # mean 0.325


def test_generate_decodes_densely_without_a_guard(fresh_dynamo: None) -> None:
    net = model()
    compiled = torch.compile(net.forward, backend=sparsepass.backend, options=options())
    ids = tokens(2, 400)
    whole, net.forward = net.forward, compiled
    try:
        with torch.no_grad():
            with sparsepass.task(["single_qa", "multi_hop"]):
                report = sparsepass.explain(net.generate, ids, max_new_tokens=3, do_sample=False)
            prefill = [graph for graph in report.graphs if graph.rows]
            decode = [graph for graph in report.graphs if graph.decode_sites]
            assert len(prefill) == 1
            assert decode
            assert all(not graph.guards for graph in decode)
            count = torch_private.compile_count()
            with sparsepass.task(["multi_hop", "single_qa"]):
                net.generate(ids, max_new_tokens=3, do_sample=False)
            assert torch_private.compile_count() == count
    finally:
        net.forward = whole


def test_explain_says_what_each_row_computes(fresh_dynamo: None) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, options=options())
    rows = ["single_qa", "multi_hop", "single_qa", "dense"]
    report = sparsepass.explain(fn, batch_of(4, ALL_SPARSE), task=rows)
    (graph,) = report.graphs
    assert graph.rows == tuple(rows)
    assert graph.task == "dense, multi_hop, 2x single_qa"
    site = graph.sites[0]
    assert [row.density for row in site.rows] == [0.1, 0.75, 0.1, 1.0]
    assert site.density_asked == pytest.approx(1.95 / 4)
    assert site.density_achieved is not None
    text = " ".join(str(report).split())
    for said in ("by row", "rows 0,2 single_qa: pooled_topk(density=0.1", "every visible block", "cap"):
        assert said in text
    assert sparsepass.Report.from_json(report.to_json()) == report


@pytest.mark.slow
def test_with_inductor_and_warm_caches(fresh_dynamo: None, monkeypatch: Any, tmp_path: Any) -> None:
    """What a graph from the caches on disk computes follows the rows of the call too."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    mixes: list[list[Row]] = [["single_qa", "multi_hop"], ["multi_hop", "single_qa"], ["dense", "multi_qa"]]
    for dynamic in (False, True):
        for _ in range(2):
            torch._dynamo.reset()
            chosen = options(**{INDUCTOR: True})
            fn = torch.compile(attend, backend=sparsepass.backend, dynamic=dynamic, options=chosen)
            for rows in mixes:
                x = batch_of(2, 640)
                out, blocks = run(fn, x, rows)
                assert blocks == blocks_of(rows, 640)
                reference = torch.compile(attend, backend=sparsepass.backend, options=options())
                torch.testing.assert_close(out, run(reference, x, rows)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_cuda_graphs_take_the_rows_of_the_call(fresh_dynamo: None) -> None:
    chosen = options(**{INDUCTOR: True})
    fn = torch.compile(attend, backend=sparsepass.backend, mode=None, options={**chosen, "triton.cudagraphs": True})
    reference = torch.compile(attend, backend=sparsepass.backend, options=options())
    x = batch_of(3, ALL_SPARSE)
    mixes: list[list[Row]] = [["single_qa", "multi_hop", "multi_qa"], ["multi_hop", "single_qa", "multi_qa"]]
    mixes += [["multi_qa", "multi_qa", "multi_hop"], ["single_qa", "single_qa", "multi_hop"]]
    for rows in mixes * 3:  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        out, blocks = run(fn, x, rows)
        assert blocks == blocks_of(rows, ALL_SPARSE)
        torch.testing.assert_close(out, run(reference, x, rows)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_class_numbers_under_a_capture_of_the_users(fresh_dynamo: None) -> None:
    rows = (TaskClass.MULTI_HOP, TaskClass.DENSE, TaskClass.MULTI_HOP)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = class_numbers(rows, torch.device("cuda", 0))
        out = held + 0
    graph.replay()
    assert out.tolist() == [TASKS.index(task) for task in rows]


def test_class_numbers_are_made_once() -> None:
    rows = (TaskClass.MULTI_HOP, TaskClass.DENSE)
    first = class_numbers(rows, torch.device(DEVICE))
    assert first.tolist() == [TASKS.index(task) for task in rows]
    assert class_numbers(rows, torch.device(DEVICE)) is first
    assert not first.is_inference()


def test_the_op_refuses_rows_of_another_length() -> None:
    x = batch_of(2, 200)
    shared = share_batch({TaskClass.SINGLE_QA: topk(0.1), TaskClass.MULTI_HOP: topk(0.5)})
    assert shared is not None
    rest = (None, None, 0.25, -1, 0, False, shared.text(), 0)
    for rows in (None, class_numbers((TaskClass.SINGLE_QA,), torch.device(DEVICE))):
        with pytest.raises(KernelInputError, match="one per row"):
            torch.ops.sparsepass.attention(x, x, x, *rest, rows)


def topk(density: float, block: int | None = None, heads: tuple[float, ...] | None = None, last: int = 0) -> Budget:
    params = {"density": density, "block": block, "head_densities": heads, "last": last}
    return make_method(Budget("pooled_topk", params)).budget()


BUDGETS = st.one_of(
    st.just(DENSE),
    st.builds(topk, st.floats(0.01, 1.0), st.sampled_from([None, 64, 128]), last=st.sampled_from([0, 0, 2])),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda heads: topk(max(heads), None, heads)),
)


@given(st.dictionaries(st.sampled_from(TASKS), BUDGETS, min_size=1))
def test_classes_share_a_launch(budgets: dict[TaskClass, Budget]) -> None:
    shared = share_batch(budgets)
    if all(budget.dense for budget in budgets.values()):
        assert shared is None
        return
    assert shared is not None
    assert decode_rows(shared.text()) == shared
    dials = shared.dials(2)
    assert dials is not None
    cap = make_method(shared.cap).max_density
    for task, budget in budgets.items():
        row = dials[TASKS.index(task)]
        assert all(0 < dial <= cap for dial in row)
        method = make_method(budget)
        assert budget.dense or make_method(shared.cap).last >= method.last  # type: ignore[attr-defined]
        if budget.dense:
            assert row == (1.0, 1.0)
        elif not any(one.replaced for one in shared.classes if one.task is task):
            assert row == method.dials(2)
        else:  # never less than its own share
            assert shared.row_density(task) >= method.mean_density
    table = dial_table(shared.text(), 2, torch.device("cpu"))
    assert table is not None
    assert (table.double() <= torch.tensor(dials, dtype=torch.float64)).all()


@given(
    st.lists(st.lists(BUDGETS, min_size=len(TASKS) - 1, max_size=len(TASKS) - 1), min_size=1, max_size=3),
    st.lists(st.sampled_from(TASKS), min_size=1, max_size=6),
    st.floats(0.05, 1.2),
)
def test_keys_follow_from_the_caps(sites: list[list[Budget]], rows: list[TaskClass], limit: float) -> None:
    """One key for all arrangements; a key names every class of the batch; few keys for all mixes."""
    held = []
    for own in sites:
        budgets = (DENSE, *own)
        alone = tuple(make_method(b).text() if make_method(b).mean_density <= limit else "dense" for b in budgets)
        held.append(SiteClasses(alone, (BucketClasses(budgets, 4096, (("pooled_topk", limit),)),)))
    table = MixTable(held)
    key = table.key(tuple(rows))
    assert table.key(tuple(reversed(rows))) == key
    if len(set(rows)) == 1:
        assert key == table.key(rows[0])
    for text, site in zip(table.texts(tuple(rows)), held, strict=True):
        if "|" in text:
            shared = decode_rows(text)
            assert set(rows) <= {one.task for one in shared.classes}
            assert all(make_method(shared.cap).max_density >= make_method(shared.budget(r)).max_density for r in rows)
        else:
            assert text == "dense" or text in site.alone
    doubled = table.key(tuple(rows) * 2)  # the shares are the same
    assert doubled == key


def test_rounding_down_keeps_as_many_blocks() -> None:
    for exact, total in ((0.4, 10), (0.7, 10), (0.1, 10)):
        held = float32_at_most(exact)
        assert torch.tensor(held, dtype=torch.float32).item() == held <= exact
        assert exact - held < 1e-7
        assert held * total <= exact * total


@pytest.mark.parametrize("given_hints", [[], ["single_qa", "multi_hopp"], [["single_qa"]], [3], {"single_qa": 1}])
def test_bad_lists_are_refused_at_once(given_hints: Any) -> None:
    with pytest.raises(HintError, match=r"accepted|Accepted|Did you mean"):
        sparsepass.task(given_hints)


PAIRS: dict[str, tuple[Budget, Budget]] = {
    "a_shape": (Budget("a_shape", {"window": 128, "last": 1}), Budget("a_shape", {"window": 400, "last": 1})),
    "pooled_topk": (topk(0.4, last=1), topk(0.8, last=1)),
    "threshold": (
        Budget("threshold", {"alpha": 0.9999, "window": 1}),
        Budget("threshold", {"alpha": 0.98, "window": 1}),
    ),
    "top_p": (Budget("top_p", {"coverage": 0.3}), Budget("top_p", {"coverage": 0.7})),
    "xattention": (Budget("xattention", {"tau": 0.3}), Budget("xattention", {"tau": 0.7})),
    "vertical_slash": (Budget("vertical_slash", {"density": 0.4}), Budget("vertical_slash", {"density": 0.8})),
    "flex_prefill": (
        Budget("flex_prefill", {"gamma": 0.4, "min_budget": 0}),
        Budget("flex_prefill", {"gamma": 0.8, "min_budget": 0}),
    ),
}
"""Of each method a cheap and a costly budget that differ in the dial alone."""


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.dial is not None])
@pytest.mark.parametrize("padded", [False, True])
def test_every_method_takes_its_dial_by_row(name: str, padded: bool) -> None:
    """Rows of one launch under the cap compute what each computes alone under its own budget."""
    cheap, costly = PAIRS[name]
    tasks = (TaskClass.SINGLE_QA, TaskClass.DENSE, TaskClass.MULTI_HOP, TaskClass.SINGLE_QA)
    shared = share_batch({TaskClass.SINGLE_QA: cheap, TaskClass.MULTI_HOP: costly, TaskClass.DENSE: DENSE})
    assert shared is not None
    assert not any(one.replaced for one in shared.classes)
    length = 1024
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(4, heads, length, 32, generator=g).to(DEVICE) for heads in (4, 2, 2))
    segments = None
    if padded:
        real = torch.tensor([1024, 900, 700, 1024], device=DEVICE)
        segments = torch.where(torch.arange(length, device=DEVICE) < real[:, None], 0, -1).to(torch.int32)
    op, rest = torch.ops.sparsepass.attention, (0.25, -1, 0, False)
    rows = class_numbers(tasks, torch.device(DEVICE))
    together = op(q, k, v, None, segments, *rest, shared.text(), 0, rows)
    outputs = []
    for row, task in enumerate(tasks):
        one = slice(row, row + 1)
        own = None if segments is None else segments[one]
        text = make_method({TaskClass.SINGLE_QA: cheap, TaskClass.MULTI_HOP: costly}.get(task, DENSE)).text()
        alone = op(q[one], k[one], v[one], None, own, *rest, text, 0)
        torch.testing.assert_close(together[one], alone)
        outputs.append(op(q[one], k[one], v[one], None, own, *rest, "dense", 0))
    assert not torch.allclose(together[:1], outputs[0], atol=1e-3)  # the cheap row is not dense
