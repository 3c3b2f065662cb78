"""Calibration of a real, if random, model: budgets are switched without another capture, and counted by what ran."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparsepass
from sparsepass.cli.commands import app
from sparsepass.errors import OptionError
from sparsepass.graph import torch_private
from sparsepass.measure import testbed
from sparsepass.measure.calibrate import command
from sparsepass.measure.calibrate.ladder import ladder
from sparsepass.measure.calibrate.log import Log
from sparsepass.measure.calibrate.measure import MeasureError, ModelMeter
from sparsepass.measure.calibrate.result import CLASSES
from sparsepass.measure.calibrate.switch import BudgetSwitch
from sparsepass.measure.tasks.base import Question, Sample
from sparsepass.measure.tasks.score import questions_at_once, score
from sparsepass.measure.tasks.tokens import TOKEN_TASKS
from sparsepass.methods import decode_budget
from sparsepass.policies.fingerprint import differences, fingerprint
from sparsepass.policies.policy import Policy
from sparsepass.types import DENSE, Budget, TaskClass
from tests.measure.test_calibrate import Named
from tests.tiny import SPARSE_OPTIONS, model, tokens

STEPS = ladder("pooled_topk(density=0.1, block=64)")[-3:]


class Echo(Named):
    """Random tokens; the answer is what the dense model says, which a ``Teacher`` knows."""

    def draw(self, length: int, seed: int, questions: int = 1) -> Sample:
        ids = tuple(tokens(1, length, seed)[0].tolist())
        return Sample(ids, tuple(Question((), (place,)) for place in range(questions)), self.name, length, seed)


TASK = Echo("echo", TaskClass.SINGLE_QA)


class Teacher:
    """Scores each of the last tokens by whether the model's next one is what it is without sparse attention."""

    def __init__(self) -> None:
        self.right: dict[tuple[int, int], torch.Tensor] = {}
        self.calls = 0

    def __call__(self, judged: Any, sample: Sample, *, task_hint: Any) -> Sequence[float]:
        self.calls += 1
        count = len(sample.questions)
        with sparsepass.task(task_hint):
            ids = torch.tensor([sample.context])
            said = judged(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0].argmax(-1)
        key = (sample.length, sample.seed)
        return [float(same) for same in said == self.right.setdefault(key, said)]


@pytest.fixture
def llama(fresh_dynamo: None) -> Any:
    built = model("llama", hidden_size=128, num_hidden_layers=2)
    yield built
    built._compiled_call_impl = None


def meter_of(llama: Any, path: Path | None = None) -> tuple[ModelMeter, Teacher]:
    teacher = Teacher()
    return ModelMeter(llama, [TASK], BudgetSwitch(), Log(path, {}), teacher, 8), teacher


def test_budgets_are_switched_within_one_graph(llama: Any) -> None:
    meter, teacher = meter_of(llama)
    before = torch_private.compile_count()
    dense = meter.run("echo", 1024, 0, None)
    assert (dense.scores, dense.density) == ((1.0,) * 8, 1.0)
    compiled = torch_private.compile_count() - before
    assert compiled == 2  # densely, and for all budgets
    densities = [meter.run("echo", 1024, 0, step).density for step in STEPS]
    assert torch_private.compile_count() - before == compiled  # nothing was captured again
    assert densities == sorted(densities)
    assert densities[-1] == pytest.approx(0.7, abs=0.05)
    assert teacher.calls == meter.runs == 1 + len(STEPS)
    meter.run("echo", 1024, 0, STEPS[1])
    assert teacher.calls == meter.runs


def test_the_trained_testbed_is_asked_by_the_real_score(fresh_dynamo: None) -> None:
    """Right densely, and with every block through the sparse kernel; wrong with hardly any."""
    few, all_blocks = ladder("pooled_topk=0.03,1.0")
    switch = BudgetSwitch()
    trained = testbed.load(dtype=torch.float32)
    meter = ModelMeter(trained, TOKEN_TASKS[:1], switch, Log(None, {}), score, questions_at_once)
    right = meter.run("token_needle", 2048, 0, None)
    assert len(right.scores) > 3  # as many questions as share a prefill of 2048 tokens and a quarter
    assert set(right.scores) == {1.0}
    assert meter.run("token_needle", 2048, 0, all_blocks) == right
    sparse = meter.run("token_needle", 2048, 0, few)
    assert sum(sparse.scores) < len(right.scores)
    assert sparse.density < 0.5


def test_the_tasks_of_a_model_that_reads_text(tmp_path: Path) -> None:
    names = [task.name for task in command.tasks_of(command.CalibrateOptions(model=tmp_path))]
    assert names == list(command.TEXT_MIX)
    assert {task.task_class for task in command.tasks_of(command.CalibrateOptions())} == set(CLASSES)
    with pytest.raises(OptionError, match="token_needle"):
        command.tasks_of(command.CalibrateOptions(tasks=("token_nedle",)))


def test_a_model_without_sparse_attention_is_refused(fresh_dynamo: None) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **rest: Any) -> Any:
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids, 256).float()})

    plain = Plain()
    meter = ModelMeter(plain, [TASK], BudgetSwitch(), Log(None, {}), Teacher(), 8)
    meter.run("echo", 256, 0, None)
    with pytest.raises(MeasureError, match="none of its attention was rewritten"):
        meter.run("echo", 256, 0, STEPS[0])


def test_fingerprints_tell_models_apart(llama: Any) -> None:
    mine = fingerprint(llama)
    assert differences(mine, llama) == []
    other = model("llama", hidden_size=128, num_hidden_layers=2, rms_norm_eps=1e-5, num_key_value_heads=4)
    assert [text.split(" (")[0] for text in differences(mine, other)] == ["the model's weights"]
    assert differences({**mine, "methods": -1, "dtype": "bfloat16"}, llama) == [
        "the dtype (bfloat16, here float32)",
        f"the version of the selection methods (-1, here {mine['methods']})",
    ]


def test_a_policy_of_another_dtype_warns_once(llama: Any) -> None:
    about = {**fingerprint(llama), "dtype": "bfloat16"}
    policy = Policy(
        "other", (sparsepass.policies.rule.Rule(None, Budget("pooled_topk", {"density": 0.5})),), calibrated=about
    )  # type: ignore[attr-defined]
    llama.compile(backend=sparsepass.backend, options={**SPARSE_OPTIONS, "sparsepass.policy": policy})
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="the dtype was bfloat16, here it is float32"):
        llama(input_ids=tokens(1, 400))
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        llama(input_ids=tokens(1, 400))


def test_the_command(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meters: list[ModelMeter] = []

    def opened(options: Any, mode: str, budgets: Any, questions: int) -> command.Session:
        about = fingerprint(llama)
        log = Log(next(iter(options.log), None), about)
        meter = ModelMeter(llama, [TASK], BudgetSwitch(), log, Teacher(), questions)
        meters.append(meter)
        return command.Session(llama, [TASK], meter, about, log)

    monkeypatch.setattr(command.Session, "open", staticmethod(opened))
    files = {name: str(tmp_path / name) for name in ("p.json", "r.html", "l.jsonl")}
    arguments = ["calibrate", "--lengths", "512", "--loss", "0.3", "--questions", "8", "--verify", "8", "--search", "2"]
    arguments += ["--methods", "pooled_topk=0.4,1.0", "--out", files["p.json"], "--report", files["r.html"]]
    arguments += ["--floors", "2"]
    result = CliRunner().invoke(app, [*arguments, "--log", files["l.jsonl"], "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["goal"]["loss"] == 0.3
    assert said["cells"][0]["task"] == "echo"
    policy = Policy.load(files["p.json"])
    assert (policy.name, policy.calibrated) == ("calibrated", fingerprint(llama))
    floors = [policy.floor(TaskClass.SINGLE_QA, policy.bucket(512), layer) for layer in (0, 1)]
    assert floors == pytest.approx([0.95, 0.95], abs=0.011)  # the denser step leaves nothing out
    assert meters[0].lookups > meters[0].runs  # the dense answers of a context are used for every budget
    assert "which budgets are safe" in Path(files["r.html"]).read_text()
    again = CliRunner().invoke(app, [*arguments, "--log", files["l.jsonl"]])
    assert again.exit_code == result.exit_code
    assert meters[1].runs == 0

    arguments = ["evaluate", "--lengths", "512", "--policy", files["p.json"], "--fixed", "pooled_topk=0.4,1.0"]
    arguments += ["--contexts", "2", "--questions", "8", "--loss", "0.5", "--plots", str(tmp_path / "plots")]
    judged = CliRunner().invoke(app, [*arguments, "--tasks", "token_needle", "--out", str(tmp_path / "e.json")])
    assert judged.exit_code in (0, 1), judged.output
    assert "computes 1.000 of the attention" in judged.stdout
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["places"][0]["policy"]["budget"] == "pooled_topk(density=1.0)"
    assert content["places"][0]["policy"]["loss"] == 0.0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "tolerance.png",
        "safe_density.png",
        "equal_compute.png",
    }
    assert "Policy: " in again.stdout


def test_budgets_that_leave_the_question_sparse_are_not_asked_behind_a_cache() -> None:
    whole, sparse = decode_budget("a_shape(window=64, last=2)"), decode_budget("pooled_topk(density=0.1)")
    options = command.CalibrateOptions(device="cpu")
    assert command.mode_of(options, [whole, decode_budget("threshold(alpha=0.1)"), DENSE]) == "shared"
    assert command.mode_of(options, [whole, sparse]) == "forced"
    with pytest.raises(OptionError, match=r"pooled_topk\(density=0.1\).*last=2"):
        command.mode_of(replace(options, mode="shared"), [whole, sparse])
