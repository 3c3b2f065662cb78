"""The testbed: its training code equals transformers' Llama, resumes bit for bit, and measures what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from examples.testbed import batches, checkpoint, evaluate, export, train
from examples.testbed.curriculum import Curriculum
from examples.testbed.network import Network, new_weights, transformers_state
from examples.testbed.optimizer import orthogonal
from sparsepass.measure import testbed
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from sparsepass.measure.tasks.tokens.drawing import IGNORED
from tests.measure.test_tasks_tokens import solve

CPU = torch.device("cpu")
SHORT = ["--size", "tiny", "--hidden", "64", "--layers", "2", "--tokens", "512", "--lengths", "128", "256"]
SHORT += ["--every", "3", "--evaluate", "1e9", "--budget", "2048", "--warmup", "5", "--eager", "--patience", "4"]


def test_the_network_is_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers")
    size = testbed.SIZES["tiny"]
    weights = new_weights(size, torch.Generator().manual_seed(0))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size.config_fields())).eval()
    missing, unknown = model.load_state_dict(transformers_state(weights, size), strict=False)
    assert (missing, unknown) == (["lm_head.weight"], [])
    tokens = torch.randint(size.vocabulary, (2, 150), generator=torch.Generator().manual_seed(1))
    network = Network(size)
    with torch.no_grad():
        hidden = network.hidden(weights, tokens, network.positions(2, 150, CPU))
        mine = F.linear(hidden, weights["embedding"]).unflatten(0, (2, 150))
        torch.testing.assert_close(mine, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_export_and_load(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    size = testbed.SIZES["tiny"]
    weights = new_weights(size, torch.Generator().manual_seed(0))
    checkpoint.write(tmp_path, weights, {}, {"size": "tiny", "steps": 7}, full=False)
    export.main([str(tmp_path), "--out", str(tmp_path / "tiny.safetensors")])
    assert all(one.dtype == torch.bfloat16 for one in load_file(tmp_path / "tiny.safetensors").values())
    model = testbed.load("tiny", weights=tmp_path / "tiny.safetensors", dtype=torch.float32)
    embedding = model.get_output_embeddings().weight
    assert embedding is model.get_input_embeddings().weight
    torch.testing.assert_close(embedding.detach(), weights["embedding"].bfloat16().float())
    with pytest.raises(testbed.TestbedError, match="accepted are tiny, small, large"):
        testbed.load("huge")
    with pytest.raises(testbed.TestbedError, match="train them with"):
        testbed.load("tiny", weights=tmp_path / "none")


def test_checkpoints_are_cut_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PART", 1000)
    weights = {"embedding": torch.randn(40, 30), "norm_final": torch.ones(7)}
    state = {"step embedding": torch.tensor(3.0)}
    checkpoint.write(tmp_path, weights, state, {"a": [1]}, full=True)
    parts = sorted(tmp_path.iterdir())
    assert len(parts) > 4
    assert max(part.stat().st_size for part in parts) <= 1000
    mine, own, meta = checkpoint.read(tmp_path)
    assert meta == {"a": [1]}
    assert all(torch.equal(mine[name], weights[name]) for name in weights)
    assert own["step embedding"] == 3.0
    with pytest.raises(SystemExit, match="No checkpoint"):
        checkpoint.read(tmp_path / "none")


@pytest.mark.parametrize("length", [128, 512])
def test_batches_supervise_what_comes_next(length: int) -> None:
    drawn = batches.draw_batches(2, 8, length, torch.Generator().manual_seed(0))
    assert drawn.tokens.shape == (2, 8, length)
    flat = drawn.tokens.flatten(1)
    answers = torch.tensor([part in ("single_qa", "aggregation") or "names" in part for part in batches.PARTS])
    for step in range(2):
        chosen = answers[drawn.parts] & (drawn.targets[step] != IGNORED)
        assert torch.equal(flat[step][drawn.places[step][chosen] + 1], drawn.targets[step][chosen])
        for part, name in enumerate(batches.PARTS):
            mine = drawn.targets[step][drawn.parts == part]
            assert (mine != IGNORED).any(), name
    assert batches.scored_share(drawn) > length / 10  # targets per sequence: dense supervision


def test_a_question_that_was_asked_before_is_not_scored_again() -> None:
    task = TOKEN_TASKS[2]
    drawn = task.draw_many(3, 128, torch.Generator().manual_seed(0), questions=12, easier=True)
    prompts = drawn.prompts.tolist()
    again = [[prompt in row[:place] for place, prompt in enumerate(row)] for row in prompts]
    assert any(map(any, again))
    assert batches.asked_before(drawn.prompts).tolist() == again
    batch = batches.draw_batches(4, 4, 128, torch.Generator().manual_seed(0))
    ends = batch.parts == batches.PARTS.index("multi_hop end")
    scored = (batch.targets[:, ends] != IGNORED).sum(1)
    assert (scored <= task.items(128)).all()
    assert (scored < ends.sum()).all()


@pytest.mark.parametrize("task", TOKEN_TASKS, ids=lambda task: task.name)
def test_evaluation_by_an_oracle(task: TokenTask) -> None:
    """A model that solves the task scores 1, one that gives only the first token right 0 as a whole."""

    def oracle(tokens: torch.Tensor, last: int) -> torch.Tensor:
        rows = []
        for row in tokens.tolist():
            asked = len(row) - task.prompt_size - last
            rows.append(solve(task.name, tuple(row[:asked]), tuple(row[asked : asked + task.prompt_size])))
        return torch.tensor(rows)

    def forgetful(tokens: torch.Tensor, last: int) -> torch.Tensor:
        answer = oracle(tokens, last)
        answer[:, 1:] = 0
        return answer

    assert evaluate.accuracy(oracle, task, 200, 10, CPU, 4) == (1.0, 1.0)
    assert evaluate.accuracy(forgetful, task, 200, 10, CPU, 4) == (float(task.answer_size == 1), 1.0)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for clock in ("seconds", "speed"):
            line.pop(clock, None)
    return [line for line in lines if line["kind"] != "options"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    """Twelve steps are the same as six and six more, also across a curriculum step."""
    common = [*SHORT, "--optimizer", optimizer, "--state", "full"]
    train.main([*common, "--steps", "12", "--out", str(tmp_path / "whole")])
    train.main([*common, "--steps", "6", "--out", str(tmp_path / "first")])
    train.main([*common, "--steps", "6", "--resume", str(tmp_path / "first"), "--out", str(tmp_path / "second")])
    whole, halves = log(tmp_path / "whole"), [*log(tmp_path / "first"), *log(tmp_path / "second")]
    halves = [line for line in halves if line["kind"] != "evaluation" or line["step"] != 6]
    assert halves == whole
    mine, theirs = (checkpoint.read(tmp_path / name)[0] for name in ("whole", "second"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls(optimizer: str, tmp_path: Path) -> None:
    train.main([*SHORT, "--optimizer", optimizer, "--rate", "3e-3", "--steps", "30", "--out", str(tmp_path)])
    losses = [sum(line["loss"].values()) for line in log(tmp_path) if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 1.0
    train.main([*SHORT, "--steps", "3", "--resume", str(tmp_path), "--out", str(tmp_path / "on")])  # a light one
    assert log(tmp_path / "on")[0]["step"] == 33


def test_the_curriculum_waits_for_recall_but_not_for_ever_for_hops() -> None:
    curriculum = Curriculum((128, 256, 512), patience=10, seed=0)
    good = dict.fromkeys(("single_qa", "multi_qa", "aggregation", "multi_hop end", "multi_hop names"), 0.95)
    assert not curriculum.advance(good | {"single_qa": 0.5})
    assert curriculum.advance(good)
    assert curriculum.longest == 256
    assert {curriculum.next_length() for _ in range(9)} == {128, 256}
    assert not curriculum.advance(good | {"multi_hop end": 0.1})
    curriculum.next_length()
    assert not curriculum.advance(good | {"single_qa": 0.5, "multi_hop end": 0.1})
    assert curriculum.advance(good | {"multi_hop end": 0.1})
    assert not curriculum.advance(good)  # there is no longer one


def test_orthogonal_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 48, 20, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.4
