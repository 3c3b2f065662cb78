"""The report: what it says, that it folds equal layers, and that its JSON round-trips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.reports.draw_graph import DrawNode, without_number
from sparsepass.reports.report import GraphReport, Outcome, Report, ReportError, SiteReport
from sparsepass.reports.table import fold_sites, index_ranges
from sparsepass.types import CAUSAL, DENSE, AttentionSite, Band, Budget, MaskSummary, Phase, PlanEntry, Skip

TEXT = st.text(alphabet='ab[]{}"\\\n\t é\u2028', max_size=8)


def site(index: int, **changes: object) -> AttentionSite:
    base = AttentionSite(
        index=index,
        name=f"scaled_dot_product_attention_{index}",
        spelling="sdpa",
        phase=Phase.PREFILL,
        q_len=32768,
        kv_len=32768,
        heads=32,
        kv_heads=8,
        head_dim=128,
        v_head_dim=128,
        dtype="torch.bfloat16",
        device="cuda:0",
        mask=MaskSummary(CAUSAL),
        module=f"model.layers.{index}.self_attn",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def sparse(index: int, computed: int = 700, density: float = 0.07) -> SiteReport:
    entry = PlanEntry(site(index), Budget("pooled_topk", {"density": density}), rewritten=True)
    return SiteReport(entry, density, computed / 10_000, computed, 10_000)


def dense(index: int, reason: str, *, rewritten: bool = False) -> SiteReport:
    mask = MaskSummary(Band(1023, 0)) if rewritten else None
    miss = Skip("sdpa: the node is a softmax [sic].", ("softmax",))
    return SiteReport(PlanEntry(site(index, mask=mask), DENSE, reason, rewritten), None, None, 0, 0, (miss,))


def graph(*sites: SiteReport, **changes: object) -> GraphReport:
    base = GraphReport(
        index=0,
        name="forward",
        task="single_qa",
        bucket="(16384, 32768]",
        plan_key="3f2a",
        guards=("L['input_ids'].size()[1] <= 32768",),
        sites=sites,
        refused=(),
        decode_sites=0,
        runs=2,
        compile_seconds=21.34,
        notes=(),
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def full_report() -> Report:
    mixed = graph(
        sparse(0),
        dense(1, "Sparse would not be faster.", rewritten=True),
        dense(2, "The mask of layers.2 is not known."),
        dense(3, "The mask of layers.3 is not known."),
        index=1,
        guards=(),
        refused=tuple(Skip(f"softmax_{i}: its scores are read twice.", (f"softmax_{i}", "cat")) for i in (7, 8)),
        decode_sites=4,
        notes=("No hint guard: every task class gets the same plan.",),
        nodes=(DrawNode("x"), DrawNode("attn", ("x",), "sparse", "pooled_topk")),
    )  # fmt: skip
    identical = graph(*(sparse(i, 700 + i) for i in range(32)))
    return Report((identical, mixed), ("Run without Inductor.",), 3 * 2**30, "NVIDIA H200", {"torch": "2.13.0"})


def test_json_round_trips_every_field() -> None:
    report = full_report()
    assert Report.from_json(report.to_json()) == report


@settings(max_examples=25)
@given(
    density=st.none() | st.floats(0, 1),
    length=st.integers(1, 2**20) | st.sampled_from(["s0", "s0 + 1"]),
    mask=st.none() | st.builds(MaskSummary, st.builds(Band, st.integers(-1, 9), st.integers(-1, 9))),
    reason=TEXT,
    peak=st.none() | st.integers(0),
    params=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(0, 1) | TEXT, max_size=3),
)
def test_json_round_trips_any_values(
    density: float | None,
    length: int | str,
    mask: MaskSummary | None,
    reason: str,
    peak: int | None,
    params: dict[str, object],
) -> None:
    entry = PlanEntry(site(3, q_len=length, mask=mask), Budget("any", params), reason, True)
    report = Report((graph(SiteReport(entry, density, density, 1, 2)),), peak_memory_bytes=peak)
    assert Report.from_json(report.to_json()) == report


def test_json_without_nodes_reads_back_and_cannot_be_drawn(tmp_path: Path) -> None:
    read = Report.from_json(full_report().to_json(nodes=False))
    assert not any(g.nodes for g in read.graphs)
    with pytest.raises(ReportError, match="holds no captured graph"):
        read.draw(tmp_path / "graph.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format"), "no \"format\""),
        (lambda d: d.update(version=99), "version 99"),
        (lambda d: d["graphs"][0].update(runs="two"), r"\$\.graphs\[0\]\.runs: got 'two'"),
        (lambda d: d["graphs"][0].pop("task"), "'task' of GraphReport is missing"),
        (lambda d: d["graphs"][0].update(extra=1), "unknown field 'extra'"),
        (lambda d: d["graphs"][0]["sites"][0]["entry"]["site"].update(phase="both"), "one of 'prefill', 'decode'"),
    ],
)  # fmt: skip
def test_json_of_another_shape_is_refused_with_the_place(change: object, message: str) -> None:
    data = json.loads(full_report().to_json())
    change(data)  # type: ignore[operator]
    with pytest.raises(ReportError, match=message):
        Report.from_json(json.dumps(data))


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(ReportError, match="not JSON"):
        Report.from_json("{")


def test_nothing_compiled_says_so_and_names_the_cause_and_the_repair() -> None:
    text = " ".join(str(Report(())).split())
    assert "Nothing was compiled" in text
    assert "torch.compile(model).generate()" in text
    assert 'model.compile(backend="sparsepass")' in text
    assert 'model.forward = torch.compile(model.forward, backend="sparsepass")' in text
    assert "0 graphs" in Report(()).summary()


def test_identical_layers_share_one_row_with_the_range_of_densities() -> None:
    text = Report((graph(*(sparse(i, 700 + i) for i in range(32))),)).text(width=100)
    assert "0-31" in text
    assert "x32" in text
    assert "0.070-0.073" in text
    assert text.count("pooled_topk") == 1


def test_verbose_has_a_row_per_site_with_module_and_near_misses() -> None:
    text = full_report().text(width=120, verbose=True)
    assert text.count("pooled_topk") == 33
    assert "model.layers.31.self_attn" in text
    assert "site 2: sdpa: the node is a softmax [sic]." in text


def test_layers_with_another_budget_or_reason_do_not_fold() -> None:
    groups = fold_sites([sparse(0), sparse(1, density=0.2), sparse(2), dense(3, "a."), dense(4, "b.")])
    assert [[s.entry.site.index for s in group] for group in groups] == [[0, 2], [1], [3], [4]]


def test_reasons_and_refusals_are_sentences_under_the_table_folded_over_layers() -> None:
    text = " ".join(full_report().text().split())
    assert "sites 2-3 (x2): The mask of layers.2 is not known." in text
    assert "x2, for instance: softmax_7: its scores are read twice. [softmax_7, cat]" in text
    assert "4 decode sites (one query per step): dense for now." in text
    assert "No hint guard: every task class gets the same plan." in text


@pytest.mark.parametrize("width", [100, 120, 200])
@pytest.mark.parametrize("verbose", [False, True])
def test_plain_text_fits_the_width_uncut_and_is_ascii(width: int, verbose: bool) -> None:
    wide = dense(5, "x." * 90, rewritten=True)
    mask = MaskSummary(Band(131071, 0), padding=True, packed=True)
    entry = dataclasses.replace(
        wide.entry, site=site(5, q_len=131072, kv_len=131072, spelling="eager_softcap", mask=mask)
    )
    report = dataclasses.replace(full_report(), graphs=(graph(dataclasses.replace(wide, entry=entry), sparse(6)),))
    lines = report.text(width=width, verbose=verbose).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line.isascii() for line in lines)  # no ellipsis: nothing was cut
    assert "131072 x 131072" in "\n".join(lines)


def test_summary_counts_every_outcome_once() -> None:
    report = full_report()
    assert report.counts() == {
        Outcome.SPARSE: 33, Outcome.DENSE_MASKED: 1, Outcome.DENSE: 2, Outcome.DECODE: 4, Outcome.REFUSED: 2
    }  # fmt: skip
    summary = report.summary()
    assert "\n" not in summary
    assert "2 graphs, 42 attention sites: 33 sparse (density 0.072 achieved)" in summary
    assert "peak memory 3.00 GiB" in summary


def test_decode_sites_listed_among_the_sites_are_counted_once() -> None:
    step = SiteReport(PlanEntry(site(0, phase=Phase.DECODE, q_len=1), DENSE, "decode"), None, None, 0, 0)
    assert graph(step, decode_sites=1).counts() == {Outcome.DECODE: 1}


def test_a_site_that_never_ran_has_no_achieved_density() -> None:
    never = dataclasses.replace(sparse(0), density_achieved=None, blocks_computed=0, blocks_visible=0)
    report = Report((graph(never),))
    assert report.density_achieved is None
    assert "achieved)" not in report.summary()


@pytest.mark.parametrize(
    ("indices", "text"),
    [([0], "0"), (range(32), "0-31"), (range(0, 32, 2), "0,2,..,30"), ([0, 1, 2, 7], "0-2,7"), ([3, 1], "1,3")],
)
def test_index_ranges(indices: list[int], text: str) -> None:
    assert index_ranges(list(indices)) == text


def test_layer_numbers_are_taken_out_but_densities_and_sizes_stay() -> None:
    assert without_number("mask of layers.12 (add_3)") == without_number("mask of layers.7 (add_9)")
    assert without_number("density 0.1 at 4096 keys") != without_number("density 0.2 at 4096 keys")
    assert without_number("density 0.1 at 4096 keys") != without_number("density 0.1 at 8192 keys")
    assert without_number("model.layers[3].attn") == without_number("model.layers[12].attn")
    assert without_number("head size 72 is not supported") != without_number("head size 48 is not supported")


def test_a_picture_is_drawn_of_the_graphs_that_were_kept(tmp_path: Path) -> None:
    assert full_report().draw(tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")


def test_the_title_of_a_graph_says_its_number_once() -> None:
    assert graph(name="graph 0").title == "Graph 0"
    assert graph(name="forward").title == "Graph 0: forward"


def test_drawing_an_unknown_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="No graph has index 9"):
        full_report().draw(tmp_path / "graph.png", graphs=[9])
    with pytest.raises(ReportError, match="Nothing was compiled"):
        Report(()).draw(tmp_path / "graph.png")


def test_many_graphs_without_attention_share_a_line() -> None:
    refused = Skip("softmax_9: no product with values.", ("softmax_9",))
    empty = [graph(index=i, guards=(), decode_sites=0, refused=(), runs=2, compile_seconds=0.5) for i in range(1, 5)]
    kept = (graph(sparse(0), decode_sites=0), graph(index=5, decode_sites=0, refused=(refused,)))
    report = Report(graphs=(*kept, *empty))
    assert "Graphs 1-4 (x4): no attention in them; 8 runs, compiled in 2.0 s" in report.text()
    assert "Graph 2" not in report.text()
    assert "Graph 5" in report.text()
    assert report.text(verbose=True).count("no attention in this graph") == 4
    assert Report(graphs=(*kept, *empty[:2])).text().count("no attention in this graph") == 2
