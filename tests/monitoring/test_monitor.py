"""The monitor: what it reports is the mass kept, wrong hints are raised, and without one nothing is different."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparsepass
from sparsepass.errors import OptionError, PolicyError
from sparsepass.graph import torch_private
from sparsepass.kernels.attend.api import visible_blocks
from sparsepass.kernels.attend.reference import listed_blocks
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.types import Visible
from sparsepass.methods import PooledTopK
from sparsepass.planning.options import INDUCTOR
from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.types import Budget, TaskClass
from tests.kernels.mass.sampled_cases import kept_reference, rows_of
from tests.tiny import SPARSE_OPTIONS, model, tokens

BLOCK, LENGTH = 64, 1024
DENSITIES = {"single_qa": 0.1, "multi_qa": 0.45, "multi_hop": 0.7, "aggregation": 0.7, "unknown": 0.7}


def policy(**floors: float) -> Policy:
    rules = [
        Rule(TaskClass(task), Budget("pooled_topk", {"density": density, "block": BLOCK}), floor=floors.get(task))
        for task, density in DENSITIES.items()
    ]
    return Policy("monitored", tuple(rules))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def compiled(fn: Any = attend, **changes: Any) -> Any:
    options = {**SPARSE_OPTIONS, "sparsepass.policy": policy(), **changes}
    return torch.compile(fn, backend=sparsepass.backend, options=options)


def diffuse(batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Attention spread over everything, as an aggregation reads: no few blocks hold the mass."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ((4, 0.1), (2, 0.1), (2, 1))
    return tuple(torch.randn(batch, heads, LENGTH, 16, generator=generator) * size for heads, size in kinds)


def sharp() -> tuple[torch.Tensor, ...]:
    """Attention of each row on its own block: few blocks hold nearly all of the mass."""
    token = torch.arange(LENGTH)
    keys = F.one_hot(token // BLOCK, 16).float()[None, None] * 8
    value = torch.randn(1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    return keys.expand(1, 4, -1, -1).clone(), keys.expand(1, 2, -1, -1).clone(), value


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo: None) -> None:
    pass


@torch.no_grad()
def test_figures_are_those_of_the_definition() -> None:
    q, k, v = diffuse(batch=2)
    fn = compiled()
    with sparsepass.monitor(rows=32) as m, sparsepass.task("multi_qa"):
        fn(q, k, v)
    lists = PooledTopK(0.45, BLOCK).select(q, k, scale=0.25, visible=Visible(right=0), counter=None)
    band = {"left": -1, "right": 0, "offset": 0, "q_segments": None, "kv_segments": None}
    mask = {**band, "scale": 0.25, "q_block": BLOCK, "kv_block": BLOCK}
    named = listed_blocks(lists.kv_num_blocks, lists.kv_indices, LENGTH // BLOCK)
    wanted = kept_reference(q, k, named, mask, rows_of(LENGTH, 32))
    (layer,) = m.report().layers
    assert layer.rows == wanted.numel()
    assert layer.mean == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert layer.lowest == pytest.approx(float(wanted.mean(2).min()), abs=1e-4)
    assert layer.heads == pytest.approx(wanted.mean((0, 2)).tolist(), abs=1e-4)
    assert 0.3 < layer.mean < 0.9  # neither nothing nor everything, so that the comparison says something


@torch.no_grad()
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_wrong_hint_is_raised_until_enough_is_kept(inductor: bool) -> None:
    """An aggregation under ``single_qa``: the calls that follow are denser, and the error of the output falls."""
    inputs = diffuse()
    fn, wanted = compiled(**{INDUCTOR: inductor}), attend(*inputs)
    errors = []
    with sparsepass.monitor(floor=0.75) as m, sparsepass.task("single_qa"):
        for _ in range(5):
            errors.append(float((fn(*inputs) - wanted).norm() / wanted.norm()))
    assert [(event.call, event.before, event.to) for event in m.report().raised] == [
        (1, "single_qa", "multi_qa"),
        (2, "multi_qa", "multi_hop"),
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] == errors[3] == errors[4]
    assert m.raised == {TaskClass.SINGLE_QA: TaskClass.MULTI_HOP}
    assert m.report().mean(used="multi_hop") >= 0.75
    text = str(m.report())
    assert "After call 1: single_qa runs under the budgets of multi_qa" in text
    assert "under the floor of 0.750" in text


@torch.no_grad()
def test_a_floor_that_no_budget_reaches_ends_dense() -> None:
    inputs = diffuse()
    fn = compiled()
    with sparsepass.monitor(floor=1.0) as m, sparsepass.task("single_qa"):
        for _ in range(4):
            out = fn(*inputs)
        assert m.raised == {TaskClass.SINGLE_QA: TaskClass.DENSE}
        torch.testing.assert_close(out, attend(*inputs))
        m.lower()
        assert m.raised == {}
        fn(*inputs)
    assert m.report().raised[-1].before == "single_qa"
    assert m.report().calls == 4  # dense calls keep everything and are not watched


@torch.no_grad()
def test_a_right_hint_stays_and_others_are_left_alone() -> None:
    fn = compiled()
    with sparsepass.monitor(floor=0.75) as m:
        for _ in range(2):
            with sparsepass.task("single_qa"):
                fn(*sharp())
        with sparsepass.task("multi_qa"):
            fn(*diffuse())
        assert m.raised == {TaskClass.MULTI_QA: TaskClass.MULTI_HOP}
    assert m.report().mean("single_qa") > 0.95


@torch.no_grad()
def test_rows_of_a_batch_are_raised_apart() -> None:
    """One row of two is diffuse under the wrong hint: only its class is raised, and the batch runs the mix."""
    both = tuple(torch.cat(pair) for pair in zip(sharp(), diffuse(), strict=True))
    fn = compiled()
    with sparsepass.monitor(floor=0.75) as m, sparsepass.task(["single_qa", "multi_qa"]):
        for _ in range(3):
            out = fn(*both)
        assert m.raised == {TaskClass.MULTI_QA: TaskClass.MULTI_HOP}
    with sparsepass.task(["single_qa", "multi_hop"]):
        torch.testing.assert_close(fn(*both), out)


@torch.no_grad()
def test_floors_of_a_policy() -> None:
    fn = compiled(**{"sparsepass.policy": policy(single_qa=0.2, multi_qa=0.99)})
    with sparsepass.monitor() as m, sparsepass.task("multi_qa"):
        fn(*sharp())
        fn(*diffuse())
    (event,) = m.report().raised
    assert (event.call, event.floor) == (2, 0.99)
    with sparsepass.monitor() as m, sparsepass.task("single_qa"):
        fn(*diffuse())
    assert m.report().layers[0].floor == 0.2


@torch.no_grad()
def test_without_a_monitor_the_graph_is_the_one_before() -> None:
    inputs = diffuse()
    fn = compiled()
    with sparsepass.task("single_qa"):
        alone = fn(*inputs)
        before = torch_private.compile_count()
        with sparsepass.monitor() as m:
            watched = fn(*inputs)
            fn(*inputs)
        assert torch_private.compile_count() == before + 1
        assert torch.equal(fn(*inputs), alone)
        assert torch.equal(watched, alone)
        with sparsepass.monitor():
            fn(*inputs)
        assert torch_private.compile_count() == before + 1
    assert m.report().calls == 2
    assert m.report().raised == ()


@torch.no_grad()
def test_a_policy_without_classes_is_watched_too() -> None:
    """All hints mean one plan but for the dense one; a hint inside the region leaves no difference at all."""

    def inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sparsepass.task("single_qa"):
            return attend(q, k, v)

    fn = compiled(inside)
    fn(*diffuse())
    with sparsepass.monitor(floor=0.9) as m:
        fn(*diffuse())
        fn(*diffuse())
    assert m.report().calls == 2
    assert m.report().raised == ()  # its own hint, which a monitor cannot raise


@torch.no_grad()
def test_dense_is_not_watched() -> None:
    fn = compiled()
    with sparsepass.task("dense"):
        fn(*diffuse())
        before = torch_private.compile_count()
        with sparsepass.monitor() as m:
            fn(*diffuse())
    assert torch_private.compile_count() == before
    assert m.report().calls == 0
    assert "Nothing was watched" in str(m.report())


@torch.no_grad()
def test_a_transformers_model_padded_and_generating() -> None:
    llama = model("llama")
    ids = tokens(2, 300)
    mask = torch.ones_like(ids)
    mask[0, :90] = 0
    llama.compile(backend=sparsepass.backend, options={**SPARSE_OPTIONS, "sparsepass.policy": policy()})
    try:
        with sparsepass.monitor() as m, sparsepass.task("single_qa"):
            llama.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    finally:
        llama._compiled_call_impl = None
    report = m.report()
    assert report.calls == 1  # the prefill; decode sites are dense
    assert [layer.layer for layer in report.layers] == [0, 1]
    assert all("layers" in layer.site for layer in report.layers)
    padded = sum(row < 90 for row in rows_of(300, 32))
    assert {layer.rows for layer in report.layers} == {4 * (64 - padded)}
    assert json.loads(report.to_json())["calls"] == 1


@torch.no_grad()
def test_monitors_follow_tasks_and_not_threads() -> None:
    fn, inputs = compiled(), diffuse()

    async def request(hint: str) -> int:
        with sparsepass.monitor() as m, sparsepass.task(hint):
            await asyncio.sleep(0)
            await asyncio.to_thread(torch.no_grad()(fn), *inputs)
        return m.report().calls

    async def serve() -> list[int]:
        return list(await asyncio.gather(request("single_qa"), request("multi_qa")))

    assert asyncio.run(serve()) == [1, 1]
    with sparsepass.monitor() as m:
        thread = threading.Thread(target=torch.no_grad()(fn), args=inputs)
        thread.start()
        thread.join()
    assert m.report().calls == 0


def test_what_is_not_accepted() -> None:
    for bad in (-0.1, 1.5, True, "0.5"):
        with pytest.raises(OptionError, match="floor"):
            sparsepass.monitor(floor=bad)  # type: ignore[arg-type]
    for rows in (0, 2000, 1.5, True):
        with pytest.raises(OptionError, match="rows"):
            sparsepass.monitor(rows=rows)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="in force already"), sparsepass.monitor() as m, m:
        pass
    with pytest.raises(PolicyError, match="floor"):
        Rule(None, Budget("dense"), floor=2.0)
    with pytest.raises(PolicyError, match="without heads"):
        Rule(None, Budget("dense"), floor=0.5, heads=Ranges.parse("0-1"))


def test_floors_are_kept_in_the_file(tmp_path: Path) -> None:
    given = policy(single_qa=0.7)
    given.save(tmp_path / "p.json", seal=True)
    read = Policy.load(tmp_path / "p.json")
    assert read == given
    assert read.fingerprint != policy().fingerprint
    assert read.floor(TaskClass.SINGLE_QA, read.bucket(4096), 3) == 0.7
    assert read.floor(TaskClass.MULTI_QA, read.bucket(4096), 3) is None
    content = {**given.to_json(), "rules": [{"task": "*", "budget": {"method": "dense"}, "floor": 1.5}]}
    with pytest.raises(PolicyError, match="/rules/0/floor"):
        Policy.from_json(content)


@pytest.mark.gpu
@torch.no_grad()
def test_under_cuda_graphs() -> None:
    """Replayed graphs are watched too, and figures follow the inputs."""
    tenth = Policy("tenth", (Rule(None, Budget("pooled_topk", {"density": 0.1})),))
    options: dict[str, Any] = {"triton.cudagraphs": True, "sparsepass.always_sparse": True, "sparsepass.policy": tenth}
    fn = torch.compile(attend, backend=sparsepass.backend, options=options)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = {"size": (1, 8, 8192, 64), "device": "cuda", "dtype": torch.bfloat16, "generator": generator}
    even = [torch.randn(**shape) * size for size in (0.1, 0.1, 1)]  # type: ignore[call-overload]
    token = torch.arange(8192, device="cuda")
    keys = (F.one_hot(token // 128, 64).bfloat16()[None, None] * 8).expand(1, 8, -1, -1).contiguous()
    for _ in range(3):
        with sparsepass.monitor() as m:
            fn(*even)
        low = m.report().mean()
        with sparsepass.monitor() as m:
            fn(keys, keys, even[2])
        assert low < 0.5 < 0.9 < m.report().mean()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mask", "bias", "softcap", "sinks", "slopes"])
def test_figures_with_score_terms(kind: str) -> None:
    """What is asked of the scores before the softmax is asked of the exact rows too."""
    q, k, v = diffuse(batch=2)
    terms: dict[str, Any] = {}
    if kind == "mask":
        terms["mask"] = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    elif kind == "bias":
        bias = torch.randn(1, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
        terms["bias"] = torch.where(bias < -1, torch.finfo(torch.float32).min, bias)
    elif kind == "softcap":
        q, terms["softcap"] = q * 300, 2.0
    elif kind == "sinks":
        terms["sinks"] = torch.tensor([0.0, 3.0, 6.0, -2.0])
    else:
        terms["slopes"] = torch.tensor([0.001, 0.01, 0.1, 1.0])
    names = ("softcap", "slopes", "bias", "mask", "sinks")
    given = [terms.get(name) for name in names]
    text = PooledTopK(0.45, BLOCK).text()
    _, kept = torch.ops.sparsepass.watched_attention(
        q, k, v, None, None, 0.25, -1, 0, False, text, 0, None, *given, sampled=32
    )
    scores = Scores(**terms)
    visible = Visible(right=0)
    if scores.hides:
        blocks = visible_blocks(q, k, scores, visible, q_block=BLOCK, kv_block=BLOCK)
        visible = Visible(right=0, blocks=blocks)
    lists = PooledTopK(0.45, BLOCK).select(q, k, scale=0.25, visible=visible, counter=None)
    named = listed_blocks(lists.kv_num_blocks, lists.kv_indices, LENGTH // BLOCK)
    pairs = named.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    place = torch.arange(LENGTH)
    found = q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3) * 0.25
    if kind == "softcap":
        found = 2.0 * (found / 2.0).tanh()
    if kind == "slopes":
        found = found + terms["slopes"].double()[:, None, None] * (place[None] - place[:, None])
    if kind == "bias":
        found = (found + terms["bias"]).masked_fill(terms["bias"] < -1e30, -torch.inf)
    found = found.masked_fill(place[None] > place[:, None], -torch.inf)
    if kind == "mask":
        found = found.masked_fill(~terms["mask"], -torch.inf)
    sink = terms.get("sinks", torch.full((4,), -torch.inf)).double()[None, :, None, None].expand(2, -1, LENGTH, 1)
    weights = torch.cat([found, sink], 3).softmax(3)
    share = torch.where(pairs, weights[..., :-1], 0.0).sum(3) + weights[..., -1]
    wanted = share[:, :, rows_of(LENGTH, 32)]
    torch.testing.assert_close(kept.double(), wanted, atol=1e-4, rtol=0.0, equal_nan=True)
    assert 0.05 < wanted.nanmean() < 0.99
    assert wanted.isnan().sum() <= 8  # rows whose one visible key is hidden
