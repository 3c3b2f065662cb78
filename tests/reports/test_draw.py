"""The picture: what is condensed and folded, that nothing overlaps, and that files come out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.reports.draw import MAX_PANELS, DrawError, DrawNode, Panel, draw_graph, draw_panels
from sparsepass.reports.draw_graph import NODE_KINDS, condense, without_number
from sparsepass.reports.draw_layout import Box, Scene, layout, line_height


def decoder(
    layers: int,
    kind: Callable[[int], str] = lambda _: "sparse",
    label: Callable[[int], str] = lambda _: "pooled_topk(density=0.1)",
) -> list[DrawNode]:
    """As a decoder's graph: embedding, a mask and cos that every layer reads, residual stream, head, output."""
    nodes = [DrawNode("ids"), DrawNode("embed", ("ids",)), DrawNode("arange"), DrawNode("mask", ("arange",))]
    nodes.append(DrawNode("cos", ("arange",)))
    stream = "embed"
    for i in range(layers):
        nodes.append(DrawNode(f"weight_{i}"))
        nodes.append(DrawNode(f"norm_{i}", (stream, f"weight_{i}")))
        nodes.append(DrawNode(f"q_{i}", (f"norm_{i}", "cos")))
        nodes.append(DrawNode(f"attn_{i}", (f"q_{i}", "mask"), kind(i), label(i)))
        nodes.append(DrawNode(f"o_{i}", (f"attn_{i}",)))
        nodes.append(DrawNode(f"add_{i}", (f"o_{i}", stream)))
        stream = f"add_{i}"
    nodes.append(DrawNode("output", (stream, *(f"q_{i}" for i in range(layers)))))
    return nodes


def measure(text: str, size: float, bold: bool) -> float:
    return len(text) * size * (0.65 if bold else 0.6)


def overlaps(scene: Scene) -> list[tuple[Box, Box]]:
    solid = [b for b in scene.boxes if b.kind != "frame"]
    return [
        (a, b)
        for a, b in itertools.combinations(solid, 2)
        if a.x < b.x + b.w and b.x < a.x + a.w and a.y < b.y + b.h and b.y < a.y + a.h
    ]


def check(scene: Scene) -> None:
    assert not overlaps(scene)
    for box in scene.boxes:
        assert box.x >= 0
        assert box.y >= 0
        for line in box.lines:
            assert measure(line.text, line.size, line.bold) <= box.w
        assert sum(line_height(line) for line in box.lines) <= box.h


def test_repeated_layers_fold() -> None:
    graph = condense(decoder(32))
    assert [fold.times for fold in graph.folds] == [1, 31, 1]
    (shared,) = graph.shared
    assert shared.names == ("mask", "cos")
    assert shared.ops == 3  # arange too: nobody else reads it
    assert graph.folds[1].stages[0].skips_sites
    assert graph.folds[1].stages[0].ops_read == (0,)
    assert graph.folds[1].stages[0].sites_read == (0,)


def test_alternating_layers_fold_in_pairs() -> None:
    graph = condense(decoder(33, kind=lambda i: "sparse" if i % 2 else "dense_masked"))
    assert [(len(fold.stages), fold.times) for fold in graph.folds] == [(1, 1), (2, 16), (1, 1)]


def test_layers_with_other_labels_do_not_fold() -> None:
    graph = condense(decoder(6, label=lambda i: f"density {i / 10}"))
    assert all(fold.times == 1 for fold in graph.folds)


def test_layer_numbers_in_labels_do_not_prevent_folding() -> None:
    assert without_number("layers.3 density 0.1") == without_number("layers.17 density 0.1")
    assert without_number("density 0.1") != without_number("density 0.2")
    assert [f.times for f in condense(decoder(9, label=lambda i: f"layer {i}: 0.1")).folds] == [1, 8, 1]


def test_every_op_is_counted_once() -> None:
    nodes = decoder(12)
    graph = condense(nodes)
    counted = sum(stage.ops * fold.times for fold in graph.folds for stage in fold.stages)
    assert counted + sum(s.ops for s in graph.shared) == sum(n.kind == "op" for n in nodes)


def test_a_graph_without_sites_is_one_box() -> None:
    (fold,) = condense([DrawNode("a"), DrawNode("b", ("a", "not in the graph"))]).folds
    assert fold.stages[0].ops == 2
    assert not fold.stages[0].sites


@pytest.mark.parametrize("layers", [1, 2, 3, 32])
def test_layout_has_no_overlap_folded(layers: int) -> None:
    check(layout(condense(decoder(layers)), measure))


def test_layout_has_no_overlap_over_several_columns() -> None:
    scene = layout(
        condense(decoder(32, label=lambda i: f"density {i / 100} " + "with a long text " * (i % 4))), measure
    )
    check(scene)
    assert scene.width > scene.height / 2  # not one endless column


@settings(max_examples=25)
@given(st.data())
def test_any_graph_is_condensed_without_loss_and_laid_out_without_overlap(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    nodes = []
    for i in range(count):
        inputs = data.draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else []
        kind = data.draw(st.sampled_from(("op", "op", *NODE_KINDS)))
        nodes.append(
            DrawNode(f"n{i}", tuple(f"n{j}" for j in inputs), kind, data.draw(st.sampled_from(("", "a b", "c\nd"))))
        )
    graph = condense(nodes)
    shown = sum((stage.ops + len(stage.sites)) * fold.times for fold in graph.folds for stage in fold.stages)
    assert shown + sum(s.ops for s in graph.shared) == count
    check(layout(graph, measure))


def test_long_fractions_are_shortened_in_the_picture_alone() -> None:
    node = DrawNode("attn", (), "sparse", "pooled_topk(density=0.28284271247461906)")
    (box,) = layout(condense([node]), measure).boxes
    assert "pooled_topk(density=0.283)" in [line.text for line in box.lines]


def test_png_and_svg_are_written(tmp_path: Path) -> None:
    nodes = decoder(4, kind=lambda i: ("sparse", "dense_masked", "refused", "decode")[i], label=lambda i: "$x_1$ <b>")
    png = draw_graph(nodes, tmp_path / "graph.png", title="Graph 0", subtitle="task single_qa")
    assert png.read_bytes().startswith(b"\x89PNG")
    panels = [Panel(f"Graph {i}", "", nodes) for i in range(2)]
    svg = draw_panels(panels, str(tmp_path / "graph.svg"), footer="1 more").read_text()
    assert "<svg" in svg
    assert MAX_PANELS >= 2


@pytest.mark.parametrize(
    ("name", "nodes", "message"),
    [
        ("graph.gif", [DrawNode("a")], "Known: '.pdf', '.png', '.svg'"),
        ("missing/graph.png", [DrawNode("a")], "does not exist"),
        ("graph.png", [], "no nodes"),
        ("graph.png", [DrawNode("a", (), "spares")], "Did you mean 'sparse'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, name: str, nodes: list[DrawNode], message: str) -> None:
    with pytest.raises(DrawError, match=message):
        draw_graph(nodes, tmp_path / name)
