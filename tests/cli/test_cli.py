"""The command line: what it passes on, what it prints, and that errors are one message and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparsepass
from sparsepass.cli.commands import Attention, app
from sparsepass.errors import SparsepassError
from sparsepass.measure.models import ModelError, ModelShape, build_random_model
from sparsepass.policies.policy import Policy, builtin_policy, resolve_policy
from sparsepass.reports.report import GraphReport, Report
from sparsepass.types import Skip, TaskClass
from sparsepass.warmup import random_inputs

runner = CliRunner()
TINY = ["--layers", "1", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--hidden", "32", "--device", "cpu"]
REFUSED = Skip("softmax: its scores are read twice.", ("softmax",))
REPORT = Report((GraphReport(0, "forward", "unknown", "any", "k", (), (), (REFUSED,), 0, 1, 0.1, ()),), device="cpu")


class Stub:
    """Stands for ``sparsepass.explain``: keeps what it was called with."""

    def __init__(self) -> None:
        self.model: Any = None
        self.kwargs: dict[str, Any] = {}

    def __call__(self, model: Any, **kwargs: Any) -> Report:
        self.model, self.kwargs = model, kwargs
        return REPORT


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(sparsepass, "explain", stub)
    return stub


def test_explain_builds_the_model_asked_for_and_passes_everything_on(stub: Stub) -> None:
    arguments = ["explain", "--arch", "qwen2", *TINY, "--length", "24", "--batch", "3", "--padding", "left"]
    result = runner.invoke(
        app, [*arguments, "--task", "single_qa", "--dtype", "bf16", "--attn", "eager", "--always-sparse"]
    )
    assert result.exit_code == 0, result.output
    config = stub.model.config
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("qwen2", 1, 2)
    assert stub.model.dtype is torch.bfloat16
    assert not stub.model.training
    assert stub.kwargs["task"] == "single_qa"
    assert stub.kwargs["policy"] is None
    assert stub.kwargs["options"] == {"sparsepass.always_sparse": True}
    assert stub.kwargs["input_ids"].shape == (3, 24)
    assert stub.kwargs["attention_mask"][:, -1].all()  # left padding: the last token is real in every row
    assert not stub.kwargs["attention_mask"].all()
    assert "its scores are read twice" in result.output


def test_explain_as_json_is_a_report(stub: Stub) -> None:
    result = runner.invoke(app, ["explain", *TINY, "--length", "8", "--json"])
    assert result.exit_code == 0, result.output
    assert Report.from_json(result.stdout) == REPORT


def test_attention_of_a_random_model_is_a_plain_str() -> None:
    # Dynamo cannot trace str methods of an enum: the graph would break in front of every layer.
    model = build_random_model(
        "llama", ModelShape(1, 4, 2, 8, 32), attn=Attention.SDPA, dtype=torch.float32, device="cpu"
    )
    assert type(model.config._attn_implementation) is str


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "lama"], "Did you mean 'llama'"),
        (["--heads", "5"], "multiple of the key/value heads"),
        (["--device", "cdua"], "--device 'cdua' is not there"),
        (["--draw", "graph.gif"], "Known: '.pdf', '.png', '.svg'"),
        (["--model", "no/such/folder"], "Cannot load a model from 'no/such/folder'"),
        (["--arch", "bloom"], "Try --attn eager"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(stub: Stub, arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["explain", *TINY, "--length", "8", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_errors_of_explain_itself_are_in_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Report:
        raise SparsepassError("No such [thing].")

    monkeypatch.setattr(sparsepass, "explain", fail)
    result = runner.invoke(app, ["explain", *TINY, "--length", "8"])
    assert result.exit_code == 2
    assert "Error: No such [thing]." in result.output


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Report:
        raise ZeroDivisionError

    monkeypatch.setattr(sparsepass, "explain", fail)
    assert isinstance(runner.invoke(app, ["explain", *TINY, "--length", "8"]).exception, ZeroDivisionError)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 4])
def test_padding_leaves_real_tokens_in_every_row(padding: Any, batch: int) -> None:
    model = build_random_model("llama", ModelShape(1, 4, 2, 8, 32), attn="sdpa", dtype=torch.float32, device="cpu")
    mask = random_inputs(model, length=32, batch=batch, padding=padding)["attention_mask"]
    assert (mask.sum(1) >= 16).all()
    assert (mask.sum(1) < 32).any()
    assert mask[:, -1 if padding == "left" else 0].all()


def test_unbuildable_sizes_say_why() -> None:
    with pytest.raises(ModelError, match="cannot share 3 key/value heads"):
        build_random_model("llama", ModelShape(1, 4, 3), attn="sdpa", dtype=torch.float32, device="cpu")


def test_policy_show_lists_every_bucket_and_class() -> None:
    result = runner.invoke(app, ["policy", "show"])
    assert result.exit_code == 0, result.output
    for text in ("single_qa", "multi_hop", "unknown (no hint)", "16K < L <= 32K", "0.100", "dense"):
        assert text in result.output
    rows = json.loads(runner.invoke(app, ["policy", "show", "--json"]).stdout)["buckets"]
    assert len(rows) == len(builtin_policy().buckets)


@pytest.mark.parametrize("name", ["prior", "published"])
def test_exported_rules_give_the_budgets_of_the_policy(tmp_path: Path, name: str) -> None:
    file = tmp_path / "policy.json"
    assert runner.invoke(app, ["policy", "export", str(file), "--policy", name]).exit_code == 0
    read, prior = Policy.load(file), resolve_policy(name)
    for bucket in prior.buckets:
        for task in TaskClass:
            assert str(read.budget(task, bucket)) == str(prior.budget(task, bucket))
    assert "is valid" in runner.invoke(app, ["policy", "check", str(file)]).output
    again = runner.invoke(app, ["policy", "export", str(file), "--policy", name])
    assert again.exit_code == 2
    assert "--force" in again.output
    assert runner.invoke(app, ["policy", "export", str(file), "--policy", name, "--force", "--short"]).exit_code == 0
    assert Policy.load(file).fingerprint == prior.fingerprint


def test_policy_show_of_a_built_in_policy_by_name(tmp_path: Path) -> None:
    result = runner.invoke(app, ["policy", "show", "published", "--json"])
    (row,) = (row for row in json.loads(result.stdout)["buckets"] if row["low"] == 16384)
    assert row["single_qa"] == {"method": "vertical_slash", "density": 0.1}
    assert row["multi_hop"]["method"] == "pooled_topk"
    assert "vertical_slash" in runner.invoke(app, ["policy", "show", "published"]).output
    result = runner.invoke(app, ["policy", "export", str(tmp_path / "p.json"), "--policy", "pior"])
    assert result.exit_code == 2
    assert "'prior', 'published'" in result.output


def test_policy_check_of_a_bad_file_exits_with_2(tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text('{"version": 1, "rules": [{"task": "sinlge_qa"}]}')
    result = runner.invoke(app, ["policy", "check", str(file)])
    assert result.exit_code == 2
    assert "bad.json" in result.output
    assert "Traceback" not in result.output


def test_version_and_env() -> None:
    assert runner.invoke(app, ["--version"]).output == runner.invoke(app, ["version"]).output
    assert runner.invoke(app, ["version"]).output.startswith("sparsepass ")
    sections = json.loads(runner.invoke(app, ["env", "--json"]).stdout)
    assert sections["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "cpu" in sections["devices"]
    assert set(sections) == {"versions", "devices", "kernels", "variables"}
    assert "triton" in runner.invoke(app, ["env"]).output


@pytest.mark.parametrize("command", [[], ["explain"], ["policy"], ["policy", "show"], ["env"], ["bench"], ["tune"]])
def test_help(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "Usage" in result.output
