"""Options, mode, the environment and the decorator: what is accepted, and what the error says otherwise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsepass
from sparsepass.planning.options import KNOWN, parse
from sparsepass.rewriting import counters
from tests.tiny import SPARSE_OPTIONS, everything_sparse, model, tokens

OPTIONS = {**SPARSE_OPTIONS, "sparsepass.policy": everything_sparse(0.5, block=64)}


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def launches(fn: Any, *args: Any) -> int:
    before = counters.total()
    with torch.no_grad():
        fn(*args)
    return (counters.total() - before).launches


X = torch.randn(1, 2, 200, 16)


def test_inductors_options_and_mode_pass_through() -> None:
    settings, patches, inductor = parse("max-autotune", {"epilogue_fusion": False})
    assert patches["max_autotune"] is True
    assert patches["epilogue_fusion"] is False
    assert inductor
    assert settings.task is None


def test_an_option_overrules_the_mode() -> None:
    _, patches, _ = parse("max-autotune", {"max_autotune": False})
    assert patches["max_autotune"] is False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsepass.polcy": "x"}, "'sparsepass.policy'"),
        ({"epilog_fusion": True}, "neither Inductor's nor one of sparsepass's"),
        ({"sparsepass.always_sparse": "yes"}, "accepted are True and False"),
    ],
)
def test_unknown_options_list_the_known_ones(options: dict[str, Any], said: str) -> None:
    with pytest.raises(sparsepass.OptionError, match=said) as error:
        parse(None, options)
    if "accepted" not in said:
        assert all(name in str(error.value) for name in KNOWN)


def test_an_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(sparsepass.OptionError, match="reduce-overhead"):
        parse("reduce-overhaed", None)


def test_errors_reach_the_caller_of_the_compiled_function(fresh_dynamo: None) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, options={"sparsepass.task": "singel_qa"})
    with pytest.raises(Exception, match="single_qa"):
        fn(X)


def test_the_region_task_holds_where_no_hint_is_in_force(fresh_dynamo: None) -> None:
    fn = torch.compile(attend, backend=sparsepass.backend, options={**OPTIONS, "sparsepass.task": "dense"})
    assert launches(fn, X) == 0
    with sparsepass.task("single_qa"):
        assert launches(fn, X) == 1
    assert launches(fn, X) == 0


def test_policy_file_from_the_environment(fresh_dynamo: None, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    everything_sparse(0.5, block=64).save(path)
    monkeypatch.setenv("SPARSEPASS_POLICY", str(path))
    fn = torch.compile(attend, backend=sparsepass.backend, options=SPARSE_OPTIONS)
    assert launches(fn, X) == 1


def test_decorated_function(fresh_dynamo: None) -> None:
    @sparsepass.sparse(task="single_qa", options=OPTIONS)
    def forward(x: torch.Tensor) -> torch.Tensor:
        return attend(x)

    assert launches(forward, X) == 1
    with sparsepass.task("dense"):
        assert launches(forward, X) == 0


def test_decorated_method_class_and_module(fresh_dynamo: None) -> None:
    class Method(nn.Module):
        @sparsepass.sparse(options=OPTIONS)
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x)

    @sparsepass.sparse(options=OPTIONS)
    class Class(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x)

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x)

    instance = sparsepass.sparse(Plain(), options=OPTIONS)
    assert isinstance(instance, Plain)
    for module in (Method(), Class(), instance):
        assert launches(module, X) == 1


def test_the_decorator_checks_at_once() -> None:
    with pytest.raises(sparsepass.HintError, match="multi_hop"):
        sparsepass.sparse(task="multihop")(attend)
    with pytest.raises(sparsepass.OptionError):
        sparsepass.sparse(options={"sparsepass.nonsense": 1})(attend)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        sparsepass.sparse(3)  # type: ignore[call-overload]


def test_models_compiled_in_every_documented_way(fresh_dynamo: None) -> None:
    ids = tokens(1, 200)
    wrapped = torch.compile(copy.deepcopy(model()), backend=sparsepass.backend, options=OPTIONS)
    in_place = copy.deepcopy(model())
    in_place.compile(backend=sparsepass.backend, options=OPTIONS)
    forward = copy.deepcopy(model())
    forward.forward = torch.compile(forward.forward, backend=sparsepass.backend, options=OPTIONS)
    for built in (wrapped, in_place, forward):
        assert launches(lambda ids, built=built: built(ids, use_cache=False), ids) == 2
