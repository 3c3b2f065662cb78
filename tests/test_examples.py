"""Every example runs, at small sizes and without Inductor's C++ compiler; the demo and one example with it too."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import fx

from sparsepass.graph import torch_private

ROOT = Path(__file__).resolve().parent.parent
DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
SMALL = {
    "answers": [
        "--length",
        "256",
        "--contexts",
        "1",
        "--questions",
        "2",
        "--hints",
        "multi_hop",
        "--out",
        "answers.png",
    ],
    "decorator": ["--length", "300"],
    "guard": ["--length", "256", "--requests", "1", "--calibrate", "1"],
    "demo": ["--lengths", "200", "1100", "--hints", "single_qa", "none", "--layers", "1", "--repeats", "1"],
    "mixed_batch": ["--length", "1100", "--always-sparse"],
    "own_kernel_test": ["--length", "40", "--device", "cpu"],
    "match_time": ["--layers", "2", "--length", "300", "--no-inductor"],
    "own_models": ["--length", "1100"],
    "own_pattern": ["--length", "300"],
    "own_policy": ["--length", "1100", "--always-sparse"],
    "quickstart": ["--length", "1100", "--always-sparse", "--new-tokens", "2"],
    "serving_hints": ["--length", "1100", "--always-sparse"],
    "unmatched_site": [],
    "watch_hints": ["--length", "2100", "--always-sparse", "--floor", "0.99"],
    "without_hints": ["--length", "1024", "--fit", "4", "--requests", "1"],
}
EXPECTED = {
    "answers": ["Right answers by task and hint, 256 tokens", "multi_hop under multi_hop:", "Picture: answers.png"],
    "decorator": ["function, by its own task:", "class:"],
    "demo": ["Dense Inductor against sparsepass", "1100", "Dense at 200 tokens, single_qa"],
    "guard": ["Requests in their order, all with the hint single_qa", "with repeats", "False alarms: 0 of 1"],
    "mixed_batch": ["1 graphs", "0 new graphs", "alone: True", "refused: 4 task hints for a batch of 3 rows"],
    "own_kernel_test": [
        "Right. my_kernel: passed",
        "not tried: padding and packing (no argument kv_segments)",
        "WRONG. forgets_the_diagonal, case 'plain': largest error",
        "To replay: sparsepass.testing.check_case(forgets_the_diagonal, Case(",
    ],
    "match_time": ["sdpa: ", "eager: ", "matching, planning and rewriting"],
    "own_models": [
        "nanoGPT: sparse, mask full + tensor",
        "einops: sparse, mask causal",
        "nn.MultiheadAttention: sparse, mask causal",
        "returns probabilities: not matched: 'att', inside the attention, is returned to the caller",
    ],
    "own_pattern": ["Without the entry point: the scores are multiplied by"],
    "own_policy": ["at /rules/0/budget", "Did you mean 'density'", "1x pooled_topk(density=0.14)"],
    "quickstart": ["2 sparse (density", "2x pooled_topk(density=0.4)", "2 new tokens"],
    "serving_hints": ["threads: 6 requests", "asyncio: 6 requests", "that of its own hint: True"],
    "unmatched_site": ["2 sparse (density", "1 not matched", "the scores are scaled by 'norm', which is computed from"],
    "watch_hints": ["request 5: logits differ", "After call 1: single_qa runs", "single_qa now runs as: dense"],
    "without_hints": ["token_chains: 0 of 2 requests lost", "yes │ right │ wrong", "of 4 requests ran again"],
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_graph(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any] | None) -> Any:
    return gm.forward


def test_every_example_is_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(SMALL) == set(EXPECTED)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "name", sorted(set(SMALL) - ({"guard"} if not DEEP else set()))
)  # test_guard.py runs its parts
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_private, "inductor", run_graph)
    example = load(name)
    if name == "demo":
        monkeypatch.setattr(example, "DENSE_BACKEND", "eager")
    monkeypatch.chdir(tmp_path)
    example.main(SMALL[name])
    assert (tmp_path / "answers.png").exists() == (name == "answers")
    printed = " ".join(capsys.readouterr().out.split())
    for text in EXPECTED[name]:
        assert text in printed
    if name == "serving_hints":
        counts = re.findall(r"(\d+) blocks computed, (\d+) expected", printed)
        assert len(counts) == 2
        assert all(computed == expected != "0" for computed, expected in counts)
        assert "own hint: False" not in printed


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_demo_with_inductor(capsys: pytest.CaptureFixture[str]) -> None:
    load("demo").main(["--lengths", "600", "--hints", "single_qa", "--layers", "1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "speedup" in printed
    assert "dense, mask" in printed


def test_demo_refuses_more_text_than_there_is() -> None:
    with pytest.raises(SystemExit, match="give a smaller length"):
        load("demo").text_tokens(10_000_000)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load(name).main(["--help"])
    assert stopped.value.code == 0
    assert "--length" in capsys.readouterr().out
