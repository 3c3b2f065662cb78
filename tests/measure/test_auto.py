"""``task("auto")``: its hint, the probe against dense attention, the router, and what an attached model does."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sparsepass
from sparsepass.errors import HintError
from sparsepass.measure.auto import AutoError, Probe, Router, attach, detach
from sparsepass.measure.auto.attention import Attention, weights
from sparsepass.measure.auto.probe import SIGNALS, _rerun, probe, shift
from sparsepass.measure.auto.router import Term
from sparsepass.measure.models import branch
from sparsepass.policies.fingerprint import fingerprint
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.request.hints import current_auto, current_task
from sparsepass.rewriting.compiled import _warn_of_auto
from sparsepass.types import Budget, TaskClass
from tests.tiny import SIZES, SPARSE_OPTIONS, model, tokens

LENGTH = 200


def own_model(**changes: Any) -> Any:
    """A model that no other test shares, since it is changed in place."""
    import copy

    return copy.deepcopy(model(**changes))


def compiled_model() -> Any:
    cheap = Budget("a_shape", {"window": 64, "sink": 64, "block": 64})
    policy = Policy("cheap", (Rule(TaskClass.SINGLE_QA, cheap), Rule(TaskClass.MULTI_QA, cheap)))
    made = own_model()
    made.compile(backend=sparsepass.backend, options={**SPARSE_OPTIONS, "sparsepass.policy": policy}, dynamic=True)
    return made


def stand_in() -> Any:
    """As ``compiled_model`` to a user, without a compilation: the easy classes see near keys alone."""
    made = own_model()

    def call(*args: Any, **given: Any) -> Any:
        length = given["input_ids"].shape[1]
        if length > 1 and current_task() in (TaskClass.SINGLE_QA, TaskClass.MULTI_QA):
            near = torch.ones(length, length, dtype=torch.bool).tril().triu(-20)
            given["attention_mask"] = near.expand(len(given["input_ids"]), 1, -1, -1)
        return made._call_impl(*args, **given)

    made._compiled_call_impl = call
    return made


def router(threshold: float = 0.0, signal: str = "entropy", **changes: Any) -> Router:
    """Scores by one signal alone."""
    fields: dict[str, Any] = {"probe": Probe(8), "above": 0, "up_to": 4096, **changes}
    return Router({signal: Term(0.0, 1.0, 1.0)}, 0.0, threshold, **fields)


# The hint


def test_auto_is_bounded_by_the_hint_around_it_or_beside_it() -> None:
    assert current_auto() is None
    with sparsepass.task("auto"):
        held = current_auto()
        assert held is not None
        assert held.at_most is None
        assert current_task() is TaskClass.UNKNOWN
        with sparsepass.task("multi_hop"):
            assert current_auto() is None
        assert current_auto() == held
    with sparsepass.task("multi_hop"), sparsepass.task("auto"):
        held = current_auto()
        assert held is not None
        assert held.at_most is TaskClass.MULTI_HOP
        assert current_task() is TaskClass.MULTI_HOP
        with sparsepass.task("auto", at_most=["single_qa", "dense"]):
            held = current_auto()
            assert held is not None
            assert held.at_most == (TaskClass.SINGLE_QA, TaskClass.DENSE)
    assert current_auto() is None


def test_auto_decorates_functions_and_coroutines_but_no_generators() -> None:
    @sparsepass.task("auto", at_most="multi_qa")
    def plain() -> object:
        return current_auto()

    @sparsepass.task("auto")
    async def waiting() -> object:
        await asyncio.sleep(0)
        return current_auto()

    assert plain().at_most is TaskClass.MULTI_QA  # type: ignore[attr-defined]
    assert asyncio.run(waiting()).at_most is None  # type: ignore[attr-defined]
    assert current_auto() is None
    with pytest.raises(HintError, match="enter it inside"):

        @sparsepass.task("auto")
        def steps() -> Any:
            yield 1


def test_auto_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(HintError, match="for the whole batch"):
        sparsepass.task(["auto", "multi_hop"])
    with pytest.raises(HintError, match="at_most"):
        sparsepass.task("multi_hop", at_most="single_qa")
    with pytest.raises(HintError, match="Unknown task hint"):
        sparsepass.task("auto", at_most="singleqa")
    with pytest.raises(HintError, match="for the whole batch"):
        sparsepass.sparse(lambda x: x, task="auto")


# The probe


@pytest.mark.parametrize("masked", ["none", "bool", "float", "causal"])
def test_weights_are_those_of_sdpa(masked: str) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 5, 16, generator=generator)
    key, value = (torch.randn(2, 2, 7, 16, generator=generator) for _ in range(2))
    arguments: dict[str, Any] = {"enable_gqa": True, "scale": 0.3}
    if masked == "bool":
        arguments["attn_mask"] = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
        arguments["attn_mask"][..., 0] = True
    if masked == "float":
        arguments["attn_mask"] = torch.randn(2, 1, 5, 7, generator=generator)
    if masked == "causal":
        arguments["is_causal"] = True
    seen: list[torch.Tensor] = []
    with Attention(seen.append) as watched:
        out = F.scaled_dot_product_attention(query, key, value, **arguments)
    assert watched.calls == 1
    expected = F.scaled_dot_product_attention(query, key, value, **arguments)
    assert torch.equal(out, expected)
    mine = seen[0] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    assert seen[0].shape == weights(query, key, value, **arguments).shape == (2, 4, 5, 7)


def prefilled(length: int = LENGTH, batch: int = 2) -> tuple[Any, torch.Tensor, Any, torch.Tensor]:
    net, ids = model(), tokens(batch, length)
    with torch.no_grad():
        out = net(input_ids=ids, use_cache=True, logits_to_keep=1)
    return net, ids, out.past_key_values, out.logits[:, -1]


def spoil(cache: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Another cache with other keys and values; the one given stays as it is."""
    twin = branch(cache)
    for layer in twin.layers:
        layer.keys, layer.values = change(layer.keys), change(layer.values)
    return twin


def test_a_recheck_of_a_dense_prefill_moves_nothing() -> None:
    net, ids, cache, logits = prefilled()
    before = [layer.keys.clone() for layer in cache.layers]
    with torch.no_grad():
        found = probe(net, ids, cache, logits, Probe(16))
    assert set(found) == set(SIGNALS)
    assert all(column.shape == (2,) and column.isfinite().all() for column in found.values())
    assert (found["shift"] < -14).all()
    assert all(torch.equal(layer.keys, was) for layer, was in zip(cache.layers, before, strict=True))


def test_rows_that_run_again_see_each_other_as_they_are_now() -> None:
    """All rows run again are a dense prefill, whatever the cache held: so no old key of theirs is seen."""
    net, ids, cache, logits = prefilled(64)
    spoiled = spoil(cache, torch.randn_like)
    rows = torch.arange(64).expand(2, -1)
    real = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        logs, _ = _rerun(net, ids, spoiled, rows, real, torch.zeros(2, 1, dtype=torch.long), None)
    torch.testing.assert_close(logs, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_a_recheck_follows_attention_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the second choice are what those of the first attend to, not what the last token does."""
    net, ids, cache, logits = prefilled(128, batch=1)
    ran: list[list[int]] = []

    def rerun(
        model: Any, ids: Any, cache: Any, rows: torch.Tensor, real: Any, first: Any, seen: Any, **also: Any
    ) -> Any:
        ran.append(rows[0].tolist())
        weights = torch.full((1, 2, rows.shape[1], 128), 1e-4)
        for place, row in enumerate(ran[-1]):
            weights[0, 1, place, max(1, row - 20)] = 0.9  # each attends to the one 20 before it
        if seen is not None:
            seen(weights)
        return torch.zeros(1, 9).log_softmax(-1), torch.ones(1, rows.shape[1], 4)

    monkeypatch.setattr("sparsepass.measure.auto.probe._rerun", rerun)
    probe(net, ids, cache, logits[:, :9], Probe(5))
    assert ran[0] == [127]
    assert ran[1] == [107, 127]
    assert len(ran[2]) == 6
    assert {87, 107, 127} <= set(ran[2])


def test_a_recheck_finds_what_a_sparse_prefill_left_out() -> None:
    net, ids, cache, logits = prefilled()
    spoiled = spoil(cache, lambda held: held + torch.randn_like(held))
    with torch.no_grad():
        found = probe(net, ids, spoiled, logits, Probe(64))
        same = probe(net, ids, cache, logits, Probe(64))
    assert (found["shift"] > same["shift"] + 3).all()


def test_padding_on_the_left_changes_no_signal() -> None:
    net, ids, cache, logits = prefilled(80)
    with torch.no_grad():
        alone = probe(net, ids, cache, logits, Probe(8))
        padded = torch.cat([torch.zeros(2, 48, dtype=torch.long), ids], -1)
        mask = torch.cat([torch.zeros(2, 48, dtype=torch.long), torch.ones_like(ids)], -1)
        out = net(input_ids=padded, attention_mask=mask, use_cache=True, logits_to_keep=1)
        both = probe(net, padded, out.past_key_values, out.logits[:, -1], Probe(128), mask)  # padded rows among them
    torch.testing.assert_close(both["entropy"], alone["entropy"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(both["activation"], alone["activation"], atol=1e-3, rtol=1e-3)
    assert (both["shift"] < -12).all()


def test_the_shift_is_the_larger_divergence() -> None:
    one, other = torch.randn(3, 9).log_softmax(-1), torch.randn(3, 9).log_softmax(-1)
    forward = F.kl_div(other, one, log_target=True, reduction="none").sum(-1)
    backward = F.kl_div(one, other, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(shift(one, other).exp(), torch.maximum(forward, backward))


def test_attention_that_cannot_be_seen_is_refused() -> None:
    net, ids = model(attn="eager"), tokens(1, 64)
    with torch.no_grad():
        out = net(input_ids=ids, use_cache=True, logits_to_keep=1)
    with torch.no_grad(), pytest.raises(AutoError, match="attn_implementation='sdpa'"):
        probe(net, ids, out.past_key_values, out.logits[:, -1], Probe(8))


@given(st.integers(0, 64), st.integers(200, 10_000))
def test_cost_counts_every_row(rows: int, length: int) -> None:
    again = [count + 1 for count in (-(-rows // 5), rows)] if rows > 1 else [2] * rows
    pairs = length * (1 + sum(again))
    assert Probe(rows).cost(length) == pytest.approx(min(1.0, pairs / (length * (length + 1) / 2)))


# The router


def test_a_router_reads_back_as_it_was(tmp_path: Path) -> None:
    made = router(1.5, "shift", name="mine", budgets=("a_shape",), calibrated=fingerprint(model()))
    made.save(tmp_path / "router.json")
    assert Router.load(tmp_path / "router.json") == made
    edited = json.loads((tmp_path / "router.json").read_text())
    edited["threshold"] = 2.0
    with pytest.raises(AutoError, match="edited"):
        Router.from_json(edited)
    del edited["fingerprint"]
    assert Router.from_json(edited).threshold == 2.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"signal": "mood"}, "reads the signals mood"),
        ({"signal": "shift", "probe": Probe(0)}, "rows=0"),
        ({"above": 10, "up_to": 10}, "above < up_to"),
        ({"threshold": float("nan")}, "accepted are numbers"),
    ],
)
def test_routers_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AutoError, match=said):
        router(**changes)


def test_files_that_are_no_router_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AutoError, match="cannot be read"):
        Router.load(tmp_path / "none.json")
    for wrong, said in (
        ({"version": 9}, "format version is 9"),
        ({**router().to_json(), "extra": 1}, "unknown field 'extra'"),
        ({**router().to_json(), "terms": {"entropy": {"mean": 0.0}}}, "scale"),
    ):
        with pytest.raises(AutoError, match=said):
            Router.from_json(wrong)


def test_what_is_not_a_number_is_not_trusted() -> None:
    assert router().score({"entropy": torch.tensor([float("nan"), -1.0])}).tolist() == [float("inf"), -1.0]


# On a model


def run(net: Any, ids: torch.Tensor, **given: Any) -> Any:
    with torch.no_grad():
        return net(input_ids=ids, logits_to_keep=1, **given)


def logits_under(net: Any, hint: str, ids: torch.Tensor) -> torch.Tensor:
    with sparsepass.task(hint):
        return run(net, ids).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> Any:
    return stand_in()


@pytest.fixture
def ids() -> torch.Tensor:
    return tokens(3, LENGTH, seed=3)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("threshold", [float("-inf"), float("inf")])
def test_all_or_no_requests_run_again(net: Any, ids: torch.Tensor, threshold: float, use_cache: bool) -> None:
    expected = logits_under(net, "single_qa" if threshold > 0 else "dense", ids)
    assert not torch.equal(logits_under(net, "single_qa", ids), logits_under(net, "dense", ids))
    attached = attach(net, router(threshold, "shift"))
    try:
        with sparsepass.task("auto"):
            out = run(net, ids, use_cache=use_cache)
    finally:
        detach(net)
    torch.testing.assert_close(out.logits, expected)
    assert (out.past_key_values is None) is not use_cache
    decision = attached.decisions[-1]
    assert decision.tried is TaskClass.SINGLE_QA
    assert decision.length == LENGTH
    assert len(decision.scores) == 3
    assert decision.again == (() if threshold > 0 else (0, 1, 2))


def test_only_the_rows_that_fell_short_run_again(net: Any, ids: torch.Tensor) -> None:
    from transformers import DynamicCache

    cheap, dense = logits_under(net, "single_qa", ids), logits_under(net, "dense", ids)
    attached = attach(net, router(float("inf")))
    try:
        with sparsepass.task("auto"):
            run(net, ids)
            scores = attached.decisions[-1].scores
            middle = sorted(scores)[1]
            attached.router = router((middle + max(scores)) / 2)
            cache = DynamicCache()
            out = run(net, ids, past_key_values=cache, use_cache=True)
    finally:
        detach(net)
    (row,) = attached.decisions[-1].again
    assert row == scores.index(max(scores))
    for one in range(3):
        torch.testing.assert_close(out.logits[one], (dense if one == row else cheap)[one])
    assert out.past_key_values is cache
    assert cache.get_seq_length() == LENGTH
    with sparsepass.task("dense"):
        exact = run(net, ids, use_cache=True).past_key_values
    torch.testing.assert_close(cache.layers[1].keys[row], exact.layers[1].keys[row])
    assert not torch.allclose(cache.layers[1].keys[row - 1], exact.layers[1].keys[row - 1])


def test_a_hint_bounds_auto(net: Any, ids: torch.Tensor) -> None:
    """It begins with the hint's budgets, and becomes denser than they are, never sparser."""
    attached = attach(net, router(float("inf"), "shift"))
    try:
        with sparsepass.task("multi_hop"), sparsepass.task("auto"):
            out = run(net, ids)
        assert attached.decisions[-1].tried is TaskClass.MULTI_HOP
        with sparsepass.task("auto", at_most="dense"):
            run(net, ids)
        assert "as dense as" in attached.decisions[-1].reason
    finally:
        detach(net)
    torch.testing.assert_close(out.logits, logits_under(net, "multi_hop", ids))


def test_what_cannot_be_read_runs_as_without_auto(net: Any, ids: torch.Tensor) -> None:
    plain = run(net, ids).logits
    attached = attach(net, router(float("inf"), "shift", up_to=100))
    try:
        with sparsepass.task("auto"):
            torch.testing.assert_close(run(net, ids).logits, plain)
            assert "up to 100" in attached.decisions[-1].reason
            cache = run(net, ids[:, :90]).past_key_values
            run(net, ids[:, 90:100], past_key_values=cache)
            assert "continues" in attached.decisions[-1].reason
            attached.router = router(float("inf"))
            mask = torch.ones_like(ids)
            mask[1, -5:] = 0
            run(net, ids, attention_mask=mask)
            assert attached.decisions[-1].again == (1,), "padded on the right: its last logits say nothing"
    finally:
        detach(net)


def test_other_caches_are_refused(net: Any, ids: torch.Tensor) -> None:
    from transformers import StaticCache

    attach(net, router(float("inf")))
    try:
        cache = StaticCache(config=net.config, max_cache_len=LENGTH + 8)
        with sparsepass.task("auto"), pytest.raises(AutoError, match="given a StaticCache"):
            run(net, ids, past_key_values=cache)
    finally:
        detach(net)


def test_models_that_cannot_be_read_are_refused(net: Any) -> None:
    attach(net, router())
    with pytest.raises(AutoError, match="reads requests already"):
        attach(net, router())
    detach(net)
    with pytest.raises(AutoError, match="nothing to undo"):
        detach(net)
    with pytest.raises(AutoError, match="no input_ids"):
        attach(torch.nn.Linear(2, 2), router())
    with pytest.raises(AutoError, match="sliding_attention"):
        attach(model("gemma2", attn="eager"), router())


def test_a_router_of_another_model_warns(net: Any) -> None:
    with pytest.warns(RuntimeWarning, match="another setting"):
        attach(net, router(calibrated={**fingerprint(net), "weights": "other"}))
    detach(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(net, router(calibrated=fingerprint(net)))
    detach(net)


def test_a_model_compiled_by_its_forward_reads_too(ids: torch.Tensor) -> None:
    made = own_model(hidden_size=SIZES["hidden_size"])
    attached = attach(made, router(float("-inf")))
    with sparsepass.task("auto"):
        run(made, ids)
    assert attached.decisions[-1].again == (0, 1, 2)
    detach(made)
    with sparsepass.task("auto"):
        run(made, ids)
    assert len(attached.decisions) == 1


@pytest.fixture(scope="module")
def compiled() -> Any:
    return compiled_model()


@pytest.mark.parametrize("threshold", [float("-inf"), float("inf")])
def test_generation_is_that_of_what_was_decided(compiled: Any, ids: torch.Tensor, threshold: float) -> None:
    mask = torch.ones_like(ids)
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with sparsepass.task("single_qa" if threshold > 0 else "dense"):
        expected = compiled.generate(ids, **settings)
    attached = attach(compiled, router(threshold, "shift"))
    try:
        with sparsepass.task("auto"):
            found = compiled.generate(ids, **settings)
        assert torch.equal(found, expected)
        assert len(attached.decisions) == 1, "decode decides nothing"
        compiled.generate(ids, **settings)
        assert len(attached.decisions) == 1, "without auto nothing is read"
    finally:
        detach(compiled)


def test_without_attach_a_sparse_graph_warns_once(compiled: Any, ids: torch.Tensor) -> None:
    _warn_of_auto.cache_clear()
    plain = run(compiled, ids).logits
    with sparsepass.task("auto"), pytest.warns(RuntimeWarning, match="attach"):
        torch.testing.assert_close(run(compiled, ids).logits, plain)
    with warnings.catch_warnings(), sparsepass.task("auto"):
        warnings.simplefilter("error")
        run(compiled, ids)
