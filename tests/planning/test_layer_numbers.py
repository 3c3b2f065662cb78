"""Which layer a site is: the same whether a model is compiled whole, layer by layer, or in pieces; else unknown."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from sparsepass.graph import torch_private
from sparsepass.planning.layer_numbers import layer_of
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.reports.explain import explain
from sparsepass.types import Budget
from tests.tiny import SPARSE_OPTIONS, model, tokens

FULL, SOME = (Budget("pooled_topk", {"density": density, "block": 64}) for density in (1.0, 0.25))


def by_layer(layers: str = "0") -> dict[str, Any]:
    """Every layer's lists are full, but for those of ``layers``."""
    policy = Policy("by layer", (Rule(None, FULL), Rule(None, SOME, layers=Ranges.parse(layers))))
    return {**SPARSE_OPTIONS, "sparsepass.policy": policy}


class Attend(nn.Module):
    def __init__(self, number: int | None) -> None:
        super().__init__()
        if number is not None:
            self.layer_idx = number
        self.project = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.project(x).view(1, -1, 2, 16).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return x + out.transpose(1, 2).reshape(x.shape)


class Stack(nn.Module):
    """``numbered``: modules know their numbers, as transformers' do. ``broken``: a graph break after each layer."""

    def __init__(self, numbered: bool, broken: bool = False, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attend(i if numbered else None) for i in range(layers))
        self.broken = broken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


X = torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(1))


def ran(net: nn.Module, x: torch.Tensor = X) -> tuple[torch.Tensor, list[tuple[float, int]]]:
    """The output, and for each graph with a site the density asked for and its runs."""
    outputs: list[torch.Tensor] = []

    def call() -> None:
        outputs.append(net(x))

    report = explain(call)
    return outputs[0], [(s.density_asked or 0.0, g.runs) for g in report.graphs for s in g.sites]


def whole(net: nn.Module, options: dict[str, Any]) -> nn.Module:
    net.compile(backend="sparsepass", options=options)
    return net


def one_by_one(net: Any, options: dict[str, Any]) -> nn.Module:
    for layer in net.layers:
        layer.compile(backend="sparsepass", options=options)
    return net  # type: ignore[no-any-return]


def wrapped(net: Any, options: dict[str, Any]) -> nn.Module:
    for number, layer in enumerate(net.layers):
        net.layers[number] = torch.compile(layer, backend="sparsepass", options=options)
    return net  # type: ignore[no-any-return]


@pytest.mark.parametrize("compile_it", [one_by_one, wrapped])
def test_layers_that_know_their_number_get_their_own_budgets(fresh_dynamo: None, compile_it: Any) -> None:
    options = by_layer("1")
    want, _ = ran(whole(Stack(numbered=True), options))
    torch._dynamo.reset()
    net = compile_it(Stack(numbered=True), options)
    before = torch_private.compile_count()
    got, densities = ran(net)
    torch.testing.assert_close(got, want)
    assert sorted(density for density, _ in densities) == [0.25, 1.0, 1.0]
    again, _ = ran(net)
    torch.testing.assert_close(again, want)
    assert (
        torch_private.compile_count() - before == 3
    )  # one for each stretch that the policy treats alike: 0, 1, 2 and on


def test_layers_of_one_stretch_share_a_graph(fresh_dynamo: None) -> None:
    net = one_by_one(Stack(numbered=True, layers=4), by_layer("0"))
    before = torch_private.compile_count()
    _, densities = ran(net)
    assert torch_private.compile_count() - before == 2
    assert densities == [(0.25, 1), (1.0, 3)]


def test_no_guard_without_budgets_by_layer(fresh_dynamo: None) -> None:
    policy = Policy("flat", (Rule(None, SOME), Rule(None, FULL, above=4096, layers=Ranges.parse("0"))))
    net = one_by_one(Stack(numbered=True), {**SPARSE_OPTIONS, "sparsepass.policy": policy})
    before = torch_private.compile_count()
    _, densities = ran(net)
    assert torch_private.compile_count() - before == 1
    assert densities == [(0.25, 3)]


def test_an_unknown_layer_gets_the_most_cautious_budget_and_the_report_says_so(fresh_dynamo: None) -> None:
    net = one_by_one(Stack(numbered=False), by_layer("0"))
    report = explain(net, X)
    (graph,) = report.graphs
    assert (graph.runs, graph.sites[0].density_asked) == (3, 1.0)
    assert "The layer of site 0 is unknown" in report.text()


def test_a_whole_model_counts_its_list_and_pieces_of_one_do_not(fresh_dynamo: None) -> None:
    _, densities = ran(whole(Stack(numbered=False), by_layer("1")))
    assert [density for density, _ in densities] == [1.0, 0.25, 1.0]
    torch._dynamo.reset()
    _, densities = ran(whole(Stack(numbered=False, broken=True), by_layer("1")))
    assert {density for density, _ in densities} == {1.0}
    torch._dynamo.reset()
    _, densities = ran(whole(Stack(numbered=True, broken=True), by_layer("1")))
    assert sorted(density for density, runs in densities for _ in range(runs)) == [0.25, 1.0, 1.0]


def test_a_function_without_modules_has_no_layer(fresh_dynamo: None) -> None:
    def twice(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, q, q), q, q)

    report = explain(twice, torch.randn(1, 2, 512, 16), options=by_layer("0"))
    assert [site.density_asked for site in report.graphs[0].sites] == [1.0, 1.0]


def test_models_that_differ_in_their_numbers_share_no_graph(fresh_dynamo: None) -> None:
    options = by_layer("0")
    first, second = Stack(numbered=True, layers=1), Stack(numbered=True, layers=1)
    second.layers[0].layer_idx = 5  # type: ignore[assignment]  # pruned: its first layers are gone
    for net in (first, second):
        whole(net, options)
    _, densities = ran(nn.Sequential(first, second))
    assert densities == [(0.25, 1), (1.0, 1)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_dropped_guard_runs_dense(fresh_dynamo: None) -> None:
    options = by_layer("0") | {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    net = Stack(numbered=True)
    want = copy.deepcopy(net)(X)
    one_by_one(net, options)
    got, _ = ran(net)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_guards_on_modules_may_be_dropped(fresh_dynamo: None) -> None:
    options = by_layer("0") | {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
    _, densities = ran(one_by_one(Stack(numbered=True), options))
    assert densities == [(0.25, 1), (1.0, 2)]


def test_real_layers_with_a_cache(fresh_dynamo: None) -> None:
    net = copy.deepcopy(model())
    for layer in net.model.layers:
        layer.compile(backend="sparsepass", options=by_layer("1"))
    report = explain(net.generate, tokens(1, 300), max_new_tokens=2, do_sample=False)
    prefill = [site.density_asked for graph in report.graphs for site in graph.sites if site.outcome == "sparse"]
    assert prefill == [1.0, 0.25]


def nested(*parts: nn.Module) -> nn.Module:
    return nn.ModuleList(parts)


def test_of_several_numbers_the_list_of_equal_modules_counts() -> None:
    pairs = nested(*(nested(Attend(None), nn.Linear(2, 2)) for _ in range(2)))
    assert layer_of(pairs, ("1", "0")) == 1
    stages = nested(*(nested(Attend(None), Attend(None)) for _ in range(2)))
    assert layer_of(stages, ("1", "0")) is None
    pipeline = nn.Sequential(Stack(numbered=False), nn.ReLU())
    assert layer_of(pipeline, ("0", "layers", "2")) is None
    assert layer_of(nn.Sequential(Stack(numbered=True), nn.ReLU()), ("0", "layers", "2")) == 2
    assert layer_of(Attend(None), ()) is None
    assert layer_of([Attend(None), Attend(None)], ("1",)) == 1


class Parts(nn.Module):
    """A layer whose attention is in a list, as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList((Attend(None), nn.Linear(32, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attend, feed = self.layer
        out: torch.Tensor = feed(attend(x))
        return out


@pytest.mark.parametrize(("compile_it", "want"), [(whole, [0.25, 1.0, 1.0]), (one_by_one, [1.0] * 3)])
def test_the_place_of_a_layers_own_part_is_not_its_number(fresh_dynamo: None, compile_it: Any, want: Any) -> None:
    net = Stack(numbered=False)
    net.layers = nn.ModuleList(Parts() for _ in range(3))
    _, densities = ran(compile_it(net, by_layer("0")))
    assert [density for density, runs in densities for _ in range(runs)] == want


def t5() -> tuple[Any, list[nn.Module]]:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 2}
    built = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **sizes)).eval()
    return built, [*built.encoder.block, *built.decoder.block]


def gpt2() -> tuple[Any, list[nn.Module]]:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    built = transformers.GPT2LMHeadModel(config).eval()
    return built, list(built.transformer.h)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize(("make", "want"), [(t5, [1.0, 0.25, 1.0, 1.0, 0.25, 0.25]), (gpt2, [1.0, 0.25])])
def test_two_stacks_and_other_names(fresh_dynamo: None, make: Any, want: list[float], parts: bool) -> None:
    """A block of a decoder with cross-attention has two sites; both stacks count from 0."""
    net, layers = make()
    for one in layers if parts else [net]:
        one.compile(backend="sparsepass", options=by_layer("1"))
    ids = tokens(1, 200) % 64
    given: dict[str, Any] = {"decoder_input_ids": ids} if make is t5 else {}
    report = explain(net, input_ids=ids, use_cache=False, **given)
    assert [site.density_asked for graph in report.graphs for site in graph.sites for _ in range(graph.runs)] == want
