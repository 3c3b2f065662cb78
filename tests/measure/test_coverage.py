"""The sweep over architectures: what is counted, what counts as rewritten, a sample of models, and the file."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from sparsepass.cli.commands import app
from sparsepass.errors import OptionError
from sparsepass.measure.coverage import progress
from sparsepass.measure.coverage.architectures import Kind, architectures
from sparsepass.measure.coverage.count import AttentionCounter
from sparsepass.measure.coverage.hidden import HiddenRowsGiveZero
from sparsepass.measure.coverage.inputs import Call, Phase, phases_of
from sparsepass.measure.coverage.measure import measure
from sparsepass.measure.coverage.own import checkpoint_kind, own_model
from sparsepass.measure.coverage.progress import Progress
from sparsepass.measure.coverage.reasons import (
    CAPTURED_LESS,
    CAPTURED_OTHERWISE,
    HIDDEN_ROWS,
    NOT_SEEN,
    NOTHING_LEFT_OUT,
    general,
)
from sparsepass.measure.coverage.run import BEGIN, END, SAMPLE, CoverageOptions, tasks
from sparsepass.measure.coverage.store import Sweep, merged
from sparsepass.measure.coverage.tables import markdown, text
from sparsepass.measure.coverage.totals import reasons, totals
from sparsepass.measure.coverage.worker import Task, Worker, records_of, run_all

LENGTH = 450


class Attend(nn.Module):
    """Self-attention [B, H, S, D], causal, written in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "sdpa":
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)
        scores = x @ x.transpose(-2, -1) * 0.25
        if self.way == "sums":  # no softmax and no SDPA: nothing that is counted
            return torch.sigmoid(scores) @ x
        if self.way == "squared":
            scores = scores.square()
        if self.way == "break":
            torch._dynamo.graph_break()
        return scores.softmax(-1) @ x


def own(way: str, length: int = LENGTH) -> dict[str, Any]:
    x = torch.randn(1, 2, length, 16, generator=torch.Generator().manual_seed(0))
    return measure(Attend(way), Call(lambda: ((x,), {})))


def test_attention_is_counted_by_shape() -> None:
    with AttentionCounter((64,)) as counted:
        x = torch.randn(2, 4, 100, 16)
        F.scaled_dot_product_attention(x, x, x)
        (x @ x.mT).softmax(-1)
        torch.softmax(x @ x.mT, dim=-1)
        F.softmax(x @ x.mT, dim=-1)
        torch.logsumexp(x @ x.mT, dim=-1)
        assert dict(counted.sites) == {"sdpa": 1, "softmax": 4}
        torch.randn(2, 100, 8).softmax(-1)  # a router
        torch.randn(2, 100, 64).softmax(-1)  # features
        torch.randn(200, 500).softmax(-1)  # logits
        torch.randn(2, 3, 128, 16).softmax(2)  # tokens of a window weighted per feature
        F.scaled_dot_product_attention(x[:, :, :4], x[:, :, :4], x[:, :, :4])  # over layers
        assert sum(counted.sites.values()) == 5
    assert counted.shapes["softmax", 100, 100] == 4


def test_multihead_attention_of_torch_is_counted_once() -> None:
    module = nn.MultiheadAttention(32, 2, batch_first=True)
    x = torch.randn(2, 100, 32)
    for weights in (True, False):
        with AttentionCounter() as counted:
            module(x, x, x, need_weights=weights)
        assert sum(counted.sites.values()) == 1, weights


@pytest.mark.parametrize("way", ["sdpa", "softmax"])
def test_what_is_rewritten_computes_fewer_blocks_and_equals_eager(way: str) -> None:
    record = own(way)
    assert (record["sites"], record["matched"], record["rewritten"]) == (1, 1, 1)
    assert record["equal"]
    assert 0.3 < record["density"] < 0.8
    assert record["reasons"] == {}


def test_what_is_not_matched_has_its_near_miss() -> None:
    record = own("squared")
    assert (record["sites"], record["matched"], record["rewritten"]) == (1, 0, 0)
    assert sum(record["reasons"].values()) == 1
    assert "square" in next(iter(record["reasons"]))


def test_few_blocks_are_not_taken_for_rewritten() -> None:
    record = own("sdpa", 64)
    assert record["rewritten"] == 0
    assert record["reasons"] == {NOTHING_LEFT_OUT: 1}


def test_scores_across_a_graph_break_are_not_lost() -> None:
    record = own("break")
    assert (record["sites"], record["rewritten"]) == (1, 0)
    (reason,) = record["reasons"]
    assert "computed in another graph" in reason


def test_no_attention_is_no_site() -> None:
    record = own("sums")
    assert (record["sites"], record["matched"], record["reasons"]) == (0, 0, {})


def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the op broken, the comparison at density 1 must fail."""
    from sparsepass.kernels.attend.api import block_sparse_attention as right
    from sparsepass.rewriting import ops

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out, lse = right(*args, **kwargs)
        return out * 1.01, lse

    monkeypatch.setattr(ops, "block_sparse_attention", wrong)
    record = own("sdpa")
    assert not record["equal"]
    assert record["difference"] > 1e-3


def test_rows_that_see_nothing_are_excepted() -> None:
    """A model that lets padding reach real rows: equal once eager's hidden rows give zero too, and it says so."""

    class Patches(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = x @ x.mT * 0.25 + mask
            out = (scores.softmax(-1) @ x)[:, 0]
            return out + out[:, :1]

    x = torch.randn(1, 1, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    real = torch.arange(LENGTH)[None] >= 100
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & real[:, None, None]
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = measure(Patches(), Call(lambda: ((x, mask), {}), real))
    if found["rewritten"]:  # a mask of any values, read block by block
        assert found["note"] == HIDDEN_ROWS
    assert found["equal"], found


@pytest.mark.parametrize("wrong", [False, True])
def test_a_model_that_is_another_when_traced_is_compared_with_its_trace(
    monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            causal = torch.compiler.is_compiling()
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=causal)

    if wrong:  # neither the model nor its trace: it must be said
        monkeypatch.setattr("sparsepass.rewriting.rewriter.Rewriter._scale", lambda self, attention: 3.0)
    x = torch.randn(1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    found = measure(Two(), Call(lambda: ((x,), {}), None))
    assert found["equal"] is not wrong
    assert ("note" not in found) is wrong
    assert wrong or found["note"] == CAPTURED_OTHERWISE


def test_hidden_rows_give_zero_however_attention_is_called() -> None:
    x = torch.randn(1, 2, 64, 16)
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    seen[:10] = False
    added = torch.zeros(64, 64).masked_fill(~seen, torch.finfo(torch.float32).min)
    with HiddenRowsGiveZero():
        found = [
            F.scaled_dot_product_attention(x, x, x, attn_mask=seen),
            F.scaled_dot_product_attention(x, x, x, added),
            (x @ x.mT / 4 + added).softmax(-1) @ x,
            torch.softmax((x @ x.mT / 4).masked_fill(~seen, -torch.inf), dim=-1) @ x,
        ]
    for one in found:
        assert not one[:, :, :10].any()
        torch.testing.assert_close(one, found[0])


def test_reasons_are_the_same_for_every_model() -> None:
    assert general("expected add, found sub at 'sub_12'") == "expected add, found sub at 'sub'"
    assert general("expected add, found sub at 'combined_logits_1'") == general(
        "expected add, found sub at 'combined_logits'"
    )


def test_names_are_checked() -> None:
    with pytest.raises(OptionError, match="llama"):
        architectures((), ("lama",))
    assert (Kind.DECODER, "llama") in architectures(())
    assert architectures((), ("t5",)) == [(Kind.ENCODER_DECODER, "t5")]


def test_the_sample_has_each_model_once() -> None:
    chosen = tasks(CoverageOptions(sample=True, phases=("prefill",)))
    assert sorted(task.arch for task in chosen) == sorted(SAMPLE)
    assert {task.kind for task in chosen} == set(Kind)


def record(arch: str, **more: Any) -> dict[str, Any]:
    head = {"kind": "decoder", "arch": arch, "implementation": "sdpa", "phase": "prefill"}
    return head | {"sites": 2, "matched": 2, "rewritten": 2, "reasons": {}, "equal": True, "difference": 1e-7} | more


def test_tables_count_and_list() -> None:
    records = [
        record("a"),
        record("b", matched=1, rewritten=0, reasons={"why | not": 2}),
        record("c", equal=False, difference=0.5),
        record("d", sites=0, matched=0, rewritten=0),
        {**record("e"), "error": "did not build", "stage": "build"},
        {**record("f"), "error": "no sdpa", "stage": "absent"},
    ]
    (total,) = totals(records)
    assert (total.models, total.sites, total.matched, total.rewritten, total.differ) == (3, 6, 5, 4, 1)
    assert total.fused is None
    assert reasons(records) == [("why | not", 2, ["b"])]
    table = markdown(records, Sweep({"torch": "2"}, {"length": LENGTH}))
    assert "| decoder | sdpa | prefill | 3 | 6 | 0 | 5 (83.3%) | 4 (66.7%) | 1 |" in table
    assert "why \\| not" in table
    assert "| c (decoder, sdpa, prefill) | 5.0e-01 |" in table
    assert "did not build" in table
    assert "give zero: a." in markdown([record("a", note=HIDDEN_ROWS)], Sweep({}, {"length": LENGTH}))
    assert "no sdpa" not in table
    assert "1 models DIFFER" in text(records)


def test_tables_go_between_the_marks_of_a_document(tmp_path: Path) -> None:
    sweep = Sweep({"torch": "2"}, {"length": 1})
    sweep.add(record("a"))
    sweep.save(tmp_path / "x.json")
    document = tmp_path / "x.md"
    for held in (f"# Kept\n{BEGIN}\nold\n{END}\nkept\n", "old"):
        document.write_text(held)
        given = ["coverage", "--merge", str(tmp_path / "x.json"), "--markdown", str(document)]
        assert CliRunner().invoke(app, given).exit_code == 0
        assert "old" not in document.read_text()
        assert "| a | decoder | 2/2 |" in document.read_text()
        assert ("kept" in document.read_text()) == ("kept" in held)


def test_the_file_is_read_back(tmp_path: Path) -> None:
    sweep = Sweep({"torch": "2"}, {"length": 1})
    sweep.add(record("a"))
    sweep.add(record("a", matched=1))
    sweep.save(tmp_path / "x.json")
    assert Sweep.load(tmp_path / "x.json") == sweep
    assert len(sweep.records) == 1
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(OptionError, match="no result"):
        Sweep.load(tmp_path / "y.json")


def test_files_of_several_machines_are_merged(tmp_path: Path) -> None:
    one = Sweep({"torch": "2", "transformers": "5"}, {"length": 1})
    one.add(record("a"))
    one.add(record("b"))
    other = Sweep({"torch": "3", "transformers": "5"}, {"length": 1})
    other.add({**record("a"), "error": "out of time", "stage": "run"})
    other.add(record("b", rewritten=1))
    for sweep, name in ((one, "one.json"), (other, "other.json.gz")):
        sweep.save(tmp_path / name)
    found = merged([Sweep.load(tmp_path / "one.json"), Sweep.load(tmp_path / "other.json.gz")])
    assert found.versions == {"torch": "2 and 3", "transformers": "5"}
    assert [held["rewritten"] for held in found.records.values()] == [2, 1], "measured counts more than an error"
    with pytest.raises(OptionError, match="versions of transformers"):
        merged([one, Sweep({"transformers": "4"}, {"length": 1})])
    with pytest.raises(OptionError, match="lengths"):
        merged([one, Sweep({"transformers": "5"}, {"length": 2})])
    given = [str(tmp_path / name) for name in ("one.json", "other.json.gz")]
    result = CliRunner().invoke(app, ["coverage", "--merge", *given, "--out", str(tmp_path / "all.json")])
    assert result.exit_code == 0, result.output
    assert "4 sites of 2 models" in result.stdout
    assert Sweep.load(tmp_path / "all.json").records == found.records


def test_sites_that_are_too_small_have_a_column() -> None:
    (total,) = totals([record("a", small=1, rewritten=1)])
    assert (total.sites, total.small, total.rewritten, total.share) == (2, 1, 1, 1.0)
    assert own("sdpa", 64)["small"] == 1
    assert "small" not in own("sdpa")


def test_what_inductor_replaces_is_beside_it() -> None:
    records = [record("a", fused=1), record("b", fused=0)]
    assert totals(records)[0].fused == 1
    assert "Inductor alone 1" in text(records)
    assert "Inductor's fuse_attention" in markdown(records, Sweep({}, {"length": LENGTH}))
    assert totals([*records, record("c", fused=None)])[0].fused is None


def test_progress_says_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 30.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    Progress(4).done("llama", alarming=False)
    assert capsys.readouterr().err == "[1/4 0:30, left 1:30] llama\n"


def test_options_are_checked() -> None:
    for wrong in (["--jobs", "0"], ["--limit", "0"], ["--minutes", "-1"], ["--merge", "x.json", "--sample"]):
        result = CliRunner().invoke(app, ["coverage", *wrong])
        assert result.exit_code == 2, wrong
        assert wrong[0] in result.stderr


def test_a_sweep_out_of_time_says_so(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    result = CliRunner().invoke(app, ["coverage", "--arch", "llama", "--minutes", "0.0001", "--out", str(file)])
    assert result.exit_code == 0, result.output
    assert "6 are left" in result.stderr
    assert Sweep.load(file).records == {}


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    source = "import torch\nfrom torch import nn\n"
    source += "def made():\n    m = nn.MultiheadAttention(32, 2, batch_first=True).eval()\n"
    source += "    x = torch.randn(1, 300, 32)\n    return m, (x, x, x)\n"
    (tmp_path / "my_attention_model.py").write_text(source)
    result = CliRunner().invoke(app, ["coverage", "--model", f"{tmp_path}/my_attention_model.py:made", "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["records"]
    assert found["sites"] == 1
    for wrong in ("made", "no_such_module_here:made", f"{tmp_path}/my_attention_model.py:other"):
        with pytest.raises(OptionError, match="--model"):
            own_model(wrong)


REMOTE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnConfig(PreTrainedConfig):
    model_type = "own_words"

    def __init__(self, vocab_size=5000, hidden_size=4096, num_attention_heads=32, doubled=False, **rest):
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.doubled = doubled
        super().__init__(**rest)


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        assert config.doubled  # a setting of the checkpoint, not the default
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.embedding(input_ids)
        heads = self.config.num_attention_heads
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return CausalLMOutputWithPast(logits=y.transpose(1, 2).flatten(2) @ self.embedding.weight.T)
"""


def test_a_checkpoint_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "own_checkpoint"
    folder.mkdir()
    (folder / "own_code.py").write_text(REMOTE)
    config = {"model_type": "own_words", "doubled": True, "hidden_size": 8192}
    config["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OptionError, match="--trust-remote-code"):
        checkpoint_kind(str(folder), trust=False)
    assert checkpoint_kind(str(folder), trust=True) is Kind.DECODER
    given = ["--model", str(folder), "--trust-remote-code", "--implementations", "sdpa", "--phases", "prefill"]
    result = CliRunner().invoke(app, ["coverage", *given, "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["records"]
    assert (found.get("error"), found["sites"], found["rewritten"]) == (None, 1, 1)


def test_what_a_checkpoint_is_must_be_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaModel"]}))
    with pytest.raises(OptionError, match="LlamaModel"):
        checkpoint_kind(str(tmp_path), trust=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert checkpoint_kind(str(tmp_path), trust=False) is Kind.DECODER
    with pytest.raises(OptionError, match="--model"):
        checkpoint_kind(str(tmp_path / "nothing"), trust=False)


def test_what_does_not_build_is_a_record() -> None:
    found = list(records_of(Task(Kind.DECODER, "no_such_model", (("sdpa", Phase.PREFILL),), LENGTH)))
    assert [one["stage"] for one in found] == ["build"]
    assert "no tiny configuration" in found[0]["error"]


@pytest.mark.slow
def test_a_process_that_dies_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other cases of its task go on in a new process."""
    cases = (("sdpa", Phase.DECODE), ("sdpa", Phase.PREFILL), ("sdpa", Phase.PADDED))
    begin, begun = Worker.begin, []

    def and_kill(self: Worker, task: Task) -> None:
        begin(self, task)
        begun.append(task)
        if len(begun) == 1:  # before it can have answered
            (process,) = multiprocessing.active_children()
            process.kill()

    monkeypatch.setattr(Worker, "begin", and_kill)
    found = list(run_all([Task(Kind.DECODER, "llama", cases, LENGTH)], jobs=2, limit=3600))
    assert [one["phase"] for one in found] == ["decode", "prefill", "padded"]
    assert [one.get("error") for one in found] == ["the process ended with code -9", None, None]
    assert len(begun) == 2


@pytest.mark.slow
def test_a_task_past_its_limit_is_recorded() -> None:
    found = list(run_all([Task(Kind.DECODER, "llama", (("sdpa", Phase.PREFILL),), LENGTH)], 1, limit=0.5))
    assert [one["error"] for one in found] == ["took longer than 0.5 s"]


SAMPLED = (
    *(("llama", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager"), ("gpt2", "eager"), ("opt", "sdpa")),
    *(("bert", "eager"), ("t5", "eager"), ("vit", "sdpa")),
)
"""All their sites are rewritten, in prefill and padded prefill."""


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "attn"), SAMPLED)
def test_sample(arch: str, attn: str) -> None:
    check(arch, attn)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("COVERAGE_ALL"), reason="75 minutes of one core; COVERAGE_ALL=1 runs it")
@pytest.mark.timeout(6 * 3600)
def test_every_architecture(tmp_path: Path) -> None:
    """No output differs from eager, and every site that is not rewritten has its reason."""
    given = ["coverage", "--jobs", str(len(os.sched_getaffinity(0))), "--out", str(tmp_path / "all.json")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    for found in Sweep.load(tmp_path / "all.json").records.values():
        accounted(found)


def check(arch: str, attn: str) -> None:
    kind = next(task.kind for task in tasks(CoverageOptions(sample=True)) if task.arch == arch)
    phases = [phase for phase in phases_of(kind) if phase is not Phase.DECODE]
    for found in records_of(Task(kind, arch, tuple((attn, phase) for phase in phases), LENGTH)):
        assert "error" not in found, found
        assert found["sites"] > 0, found
        assert found["rewritten"] == found["sites"], found
        assert found["equal"], found
        accounted(found)


def accounted(found: dict[str, Any]) -> None:
    if "error" not in found and found["phase"] != "decode":
        assert found["rewritten"] + sum(found["reasons"].values()) >= found["sites"], found
        assert all(found["reasons"]), found
        assert not {CAPTURED_LESS, NOT_SEEN} & set(found["reasons"]), "a reason that says nothing about the model"
