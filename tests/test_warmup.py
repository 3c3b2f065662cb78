"""Warm-up: order, inputs, results, and the error when nothing gets compiled."""

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsepass.errors import HintError
from sparsepass.graph import torch_private
from sparsepass.graph.marked import parts_marked
from sparsepass.host import compile_time
from sparsepass.request import hints
from sparsepass.types import TaskClass
from sparsepass.warmup import WarmupError, WarmupResult, warmup

InForce = TaskClass | tuple[TaskClass, ...]
Call = tuple[InForce, dict[str, Any], bool]


class Fake:
    """A model whose calls are kept, and which "compiles" a graph for each new (hint, length)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, compiles: bool = True, count: int = 0) -> None:
        self.calls: list[Call] = []
        self.count, self.compiles = count, compiles
        self.seen: set[tuple[InForce, int]] = set()
        monkeypatch.setattr(torch_private, "compile_count", lambda: self.count)

    def __call__(self, **inputs: Any) -> None:
        self.calls.append((hints.current_task(), inputs, torch.is_grad_enabled()))
        key = (hints.current_task(), inputs["x"].shape[1])
        if self.compiles and key not in self.seen:
            self.seen.add(key)
            self.count += 1


def inputs_of(length: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(1, length)}


def test_every_hint_and_length_runs_once_longest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake(monkeypatch)
    results = warmup(model, [8, 32, 8], ["single_qa", None], make_inputs=inputs_of)
    assert [(r.hint, r.length, r.graphs) for r in results] == [
        ("single_qa", 32, 1),
        ("single_qa", 8, 1),
        (None, 32, 1),
        (None, 8, 1),
    ]
    assert [task for task, _, _ in model.calls] == [TaskClass.SINGLE_QA] * 2 + [TaskClass.UNKNOWN] * 2
    assert not any(grad for _, _, grad in model.calls)
    assert all(isinstance(r, WarmupResult) and r.seconds >= 0 for r in results)


def test_a_list_among_the_hints_is_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake(monkeypatch)
    rows = ["single_qa", "multi_hop"]
    results = warmup(model, [8], ["single_qa", rows, tuple(rows)], make_inputs=inputs_of)
    assert [r.hint for r in results] == ["single_qa", ("single_qa", "multi_hop")]
    assert model.calls[1][0] == (TaskClass.SINGLE_QA, TaskClass.MULTI_HOP)
    with pytest.raises(HintError, match="Row 1"):
        warmup(model, [8], [["single_qa", "multi_hopp"]], make_inputs=inputs_of)
    with pytest.raises(WarmupError, match="2 task hints for batch=3"):
        warmup(torch.nn.Linear(2, 2), [8], [rows], batch=3)


def test_no_hint_means_none_even_inside_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake(monkeypatch)
    with hints.task("single_qa"):
        warmup(model, [8], make_inputs=inputs_of)
        assert hints.current_task() is TaskClass.SINGLE_QA
    assert model.calls[0][0] is TaskClass.UNKNOWN


def test_nothing_compiled_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WarmupError, match=r'model\.compile\(backend="sparsepass"\)'):
        warmup(Fake(monkeypatch, compiles=False), [8], make_inputs=inputs_of)


def test_a_warm_model_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sparsepass"):
        (result,) = warmup(Fake(monkeypatch, compiles=False, count=3), [8], make_inputs=inputs_of)
    assert result.graphs == 0
    assert "no new graph" in caplog.text


@pytest.mark.parametrize("lengths", [[], [0], [-4], [True], [1.5]])
def test_bad_lengths_are_refused(monkeypatch: pytest.MonkeyPatch, lengths: list[Any]) -> None:
    with pytest.raises(WarmupError, match="length"):
        warmup(Fake(monkeypatch), lengths, make_inputs=inputs_of)


def test_a_misspelled_hint_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake(monkeypatch)
    with pytest.raises(HintError, match="single_qa"):
        warmup(model, [8], ["multi_qa", "single_qua"], make_inputs=inputs_of)
    assert not model.calls


def test_what_is_no_transformers_model_needs_make_inputs() -> None:
    with pytest.raises(WarmupError, match="make_inputs"):
        warmup(torch.nn.Linear(2, 2), [8])


class Tiny(torch.nn.Module):
    """As much of a transformers model as the default inputs need."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(vocab_size=16)
        self.embed = torch.nn.Embedding(16, 4)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True, logits_to_keep: int = 0) -> torch.Tensor:
        assert logits_to_keep == 1
        assert not use_cache
        assert input_ids.shape[0] == 2
        hidden: torch.Tensor = self.embed(input_ids).cumsum(1)
        return hidden[:, -logits_to_keep:]


def _whole(model: Any, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def _in_place(model: Any, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def _forward(model: Any, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


@pytest.mark.parametrize("compile_it", [_whole, _in_place, _forward])
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, [1, 0, 0]), (False, [1, 1, 0])])
def test_default_inputs_of_a_compiled_model(
    monkeypatch: pytest.MonkeyPatch, compile_it: Callable[[Any, Any], Any], dynamic: bool, graphs: list[int]
) -> None:
    count = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    monkeypatch.setattr(torch_private, "compile_count", lambda: count)
    torch._dynamo.reset()
    results = warmup(compile_it(Tiny(), backend), [24, 40, 32], batch=2, dynamic=dynamic, progress=False)
    assert [r.length for r in results] == [40, 32, 24]
    assert [r.graphs for r in results] == graphs  # marked as varying, the first graph serves the other lengths too
    torch._dynamo.reset()
    warmup(compile_it(Tiny(), backend), [24], [["single_qa", "multi_hop"]], progress=False)  # as many rows as hints
    torch._dynamo.reset()


class Stacked(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True, logits_to_keep: int = 0) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask=(hidden[..., 0], None))
        return hidden


class Layer(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, mask: Any) -> torch.Tensor:
        return hidden.cumsum(1) + mask[0][..., None]  # type: ignore[no-any-return]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (False, 2)])
def test_lengths_vary_in_layers_that_are_compiled_one_by_one(
    fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, wrapped: bool, dynamic: bool, graphs: int
) -> None:
    count = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    monkeypatch.setattr(torch_private, "compile_count", lambda: count)
    model = Stacked()
    for number, layer in enumerate(model.layers):
        if wrapped:
            model.layers[number] = torch.compile(layer, backend=backend)  # type: ignore[assignment]
        else:
            layer.compile(backend=backend)
    entries = [layer.__dict__.copy() for layer in model.layers]
    warmup(model, [24], dynamic=dynamic, progress=False)
    assert [layer.__dict__ for layer in model.layers] == entries
    with torch.no_grad():
        model(torch.ones(1, 40, dtype=torch.long))
    assert count == graphs


def test_the_parts_of_a_model_that_is_compiled_whole_are_left_alone() -> None:
    model = Stacked()
    model.layers[0].compile(backend="eager")
    model.compile(backend="eager")
    before = model.layers[0]._compiled_call_impl
    with parts_marked(model, 24):
        assert model.layers[0]._compiled_call_impl is before


def test_long_compilation_is_said_once_and_not_in_a_warmup(
    fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = itertools.count(0.0, 4.0)  # each compilation reads it twice
    monkeypatch.setattr(compile_time, "clock", lambda: next(now))
    monkeypatch.setattr(compile_time, "_spent", 0.0)
    monkeypatch.setattr(compile_time, "_graphs", 0)

    def compile_another(length: int) -> None:
        fn = torch.compile(torch.sin, backend="sparsepass", dynamic=False, options={"sparsepass.inductor": False})
        fn(torch.zeros(length))

    model = torch.compile(Stacked(), backend="sparsepass", dynamic=False, options={"sparsepass.inductor": False})
    warmup(model, [8, 9, 10, 11], dynamic=False, progress=False)
    assert "sparsepass.warmup" not in caplog.text
    seen = []
    for length in range(2, 7):
        compile_another(length)
        seen.append(caplog.text.count("sparsepass.warmup(model, lengths, hints)"))
    assert seen == [0, 0, 1, 1, 1]
    assert "waited 12 s for the compilation of 3 graphs" in caplog.text
