"""``sparsepass bench``: its lists and its judgment of results, what it writes, and both of its command lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsepass.cli.commands import app
from sparsepass.errors import OptionError
from sparsepass.kernels.attend import api as dispatch
from sparsepass.kernels.attend.reference import block_sparse_attention_reference
from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench import Peer, Problem, Shape, ours, peers, register_peer, trial
from sparsepass.measure.bench.__main__ import main
from sparsepass.measure.bench.arguments import parse
from sparsepass.measure.bench.baselines import dense_call
from sparsepass.measure.bench.check import Sample, invalid_lists
from sparsepass.measure.bench.commands import COMMANDS
from sparsepass.measure.bench.lists import make_lists
from sparsepass.measure.bench.options import KernelOptions, OpOptions, make, specs, spread
from sparsepass.measure.bench.peers import Does, installed_peers
from sparsepass.measure.bench.problem import listed_blocks, listed_flops, make_problem, visible_blocks
from sparsepass.measure.bench.result import Result, add_speedups, fit_lines
from sparsepass.measure.bench.sweeps import cases
from sparsepass.measure.bench.tables import tables
from sparsepass.measure.bench.timing import Clock, Effort, summary, time_variants

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--heads", "4", "--rounds", "2", "--budget-ms", "1"]
runner = CliRunner()


def problem(length: int = 512, dtype: str = "fp32", batch: int = 1, heads: int = 4, kv_heads: int = 2) -> Problem:
    return make_problem(Shape(batch, heads, kv_heads, length, 32, dtype), CPU, 0)


@pytest.fixture
def no_new_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_peers", dict(peers._peers))


# Lists


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(["random", "uneven", "full"]), st.integers(1, 1500), st.floats(0.02, 1), st.integers(0, 3))
def test_lists_are_valid_and_repeatable(kind: str, length: int, density: float, seed: int) -> None:
    one = problem(length)
    lists = make_lists(kind, one, density, 64, seed)
    assert invalid_lists(lists, one) == ""
    again = make_lists(kind, one, density, 64, seed)
    assert torch.equal(lists.kv_num_blocks, again.kv_num_blocks)
    assert torch.equal(lists.kv_indices, again.kv_indices)
    rows = torch.arange(lists.kv_num_blocks.shape[2])
    last = lists.kv_indices.gather(3, (lists.kv_num_blocks - 1)[..., None].long())[..., 0]
    assert (last == rows).all()  # the diagonal block is always there
    enough = lists.kv_num_blocks > 1
    assert (lists.kv_indices[..., 0][enough] == 0).all()  # and the first one, where two fit


@pytest.mark.parametrize("kind", ["random", "uneven"])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_lists_reach_their_density(kind: str, density: float) -> None:
    one = problem(16384, heads=1, kv_heads=1)
    lists = make_lists(kind, one, density, 128, 0)
    reached = listed_blocks(lists, 1, 1) / visible_blocks(one.shape, 128)
    assert reached == pytest.approx(density, rel=0.02)


def test_uneven_counts_differ_tenfold() -> None:
    counts = make_lists("uneven", problem(32768, heads=1, kv_heads=1), 0.1, 128, 0).kv_num_blocks[0, 0, 128:]
    assert counts.max() >= 8 * counts.min()
    even = make_lists("random", problem(32768, heads=1, kv_heads=1), 0.1, 128, 0).kv_num_blocks[0, 0, 128:]
    assert even.max() - even.min() <= 1


def test_heads_have_lists_of_their_own() -> None:
    lists = make_lists("random", problem(4096), 0.3, 64, 0)
    assert not torch.equal(lists.kv_indices[0, 0], lists.kv_indices[0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda indices: indices[0, 0, 3].fill_(9), "no query of their row sees"),
        (lambda indices: indices[0, 1, 6, :2].copy_(torch.tensor([2, 1])), "do not ascend"),
    ],
)
def test_wrong_lists_are_found(change: Any, message: str) -> None:
    one = problem()
    lists = make_lists("full", one, 1.0, 64, 0)
    change(lists.kv_indices)
    assert message in invalid_lists(lists, one)


def test_operations_are_counted_by_block_and_by_visible_pair() -> None:
    one = problem(256, heads=2, kv_heads=2)
    whole, needed = listed_flops(one.shape, make_lists("full", one, 1.0, 64, 0))
    assert needed == one.shape.dense_flops
    assert whole == 2 * 10 * 64 * 64 * 4 * 32


# Judgment


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_expected_rows_are_those_of_the_reference(dtype: str) -> None:
    one = problem(300, dtype, batch=2)
    lists = make_lists("random", one, 0.4, 64, 0)
    sample = Sample(one)
    exact, _ = block_sparse_attention_reference(
        one.query.double(), one.key.double(), one.value.double(), lists.kv_num_blocks, lists.kv_indices,
        scale=one.shape.scale, **one.visible.arguments(), q_block=64, kv_block=64,
    )  # fmt: skip
    expected = sample.expected(lists)
    torch.testing.assert_close(sample.take(exact), expected.out, rtol=1e-6, atol=1e-9)
    assert 0 < expected.mass < 1
    assert sample.dense().mass == pytest.approx(1)
    check = sample.compare(ours.attend(one, lists), expected)
    assert check.correct, check.why
    dense = sample.compare(dense_call("sdpa", one)(), sample.dense())
    assert dense.correct, dense.why


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_missing_block_is_seen(dtype: str) -> None:
    one = problem(2048, dtype)
    lists = make_lists("random", one, 0.5, 64, 0)
    fewer = BlockLists((lists.kv_num_blocks - 1).clamp(min=1), lists.kv_indices, 64, 64)
    check = Sample(one).compare(ours.attend(one, fewer), Sample(one).expected(lists))
    assert not check.correct
    assert "by rounding" in check.why


@pytest.mark.parametrize("fault", ["nan", "shape"])
def test_values_that_are_not_finite_and_wrong_shapes_are_seen(fault: str) -> None:
    one = problem()
    out = dense_call("sdpa", one)().clone()
    out = out[:, :, 1:] if fault == "shape" else out.index_fill_(2, torch.tensor([333]), float("nan"))
    check = Sample(one).compare(out, Sample(one).dense())
    assert not check.correct
    assert ("shape" if fault == "shape" else "finite") in check.why


@pytest.mark.usefixtures("no_new_peers")
def test_a_wrong_peer_gets_no_time_and_no_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(problem: Problem, lists: BlockLists | None) -> Any:
        return lambda: torch.zeros_like(problem.query)

    def broken(problem: Problem, lists: BlockLists | None) -> Any:
        raise ZeroDivisionError("no such thing")

    def picky(problem: Problem, lists: BlockLists | None) -> Any:
        raise OptionError("it takes nothing")

    for name, build in (("wrong", wrong), ("broken", broken), ("picky", picky)):
        register_peer(Peer(name, Does.LISTS, build))
    out = tmp_path / "k.json"
    arguments = ["kernel", *SMALL, "--lengths", "512", "--densities", "0.5", "--baselines", "sdpa", "--out", str(out)]
    assert main(arguments) == 1
    by = {record["variant"]: record for record in Result.load(out).records}
    assert by["wrong"]["correct"] is False
    assert not {"median_ms", "speedup"} & by["wrong"].keys()
    assert by["broken"]["failed"] == "ZeroDivisionError: no such thing"
    assert by["picky"]["skipped"] == "it takes nothing"
    assert set(by["sparsepass"]["speedup"]) == {"sdpa", "dense"}
    assert "WRONG" in capsys.readouterr().out


def test_nothing_is_faster_than_a_wrong_result() -> None:
    base = {"batch": 1, "length": 8, "lists": "random", "density": 0.1, "correct": True}
    records: list[dict[str, Any]] = [
        {**base, "variant": "a", "does": "dense", "median_ms": 4.0},
        {**base, "variant": "b", "does": "dense", "median_ms": 2.0, "correct": False},
        {**base, "variant": "c", "does": "dense", "median_ms": 1.0, "length": 4},
        {**base, "variant": "flex", "does": "lists", "median_ms": 3.0},
        {**base, "variant": "ours", "does": "lists", "median_ms": 2.0},
        {**base, "variant": "other lists", "does": "lists", "median_ms": 1.0, "lists": "uneven"},
    ]
    add_speedups(records)
    assert records[4]["speedup"] == {"a": 2.0, "dense": 2.0, "flex": 1.5}


# Times


def test_each_round_takes_every_variant_in_an_order_of_its_own() -> None:
    taken: list[str] = []
    runs = {name: (lambda name=name: taken.append(name)) for name in "abcdef"}
    times = time_variants(runs, Clock(CPU), Effort(rounds=4, budget_ms=0.0))
    assert {name: len(rounds) for name, rounds in times.items()} == dict.fromkeys("abcdef", 4)
    # With no budget every round is the warm-up call alone.
    per_round = [taken[i : i + 6] for i in range(0, len(taken), 6)]
    assert all(sorted(order) == list("abcdef") for order in per_round)
    assert len({tuple(order) for order in per_round}) > 1


def test_the_summary_has_the_range() -> None:
    found = summary([[3.0, 1.0], [2.0]])
    assert (found["median_ms"], found["min_ms"], found["max_ms"], found["round_ms"]) == (2.0, 1.0, 3.0, [2.0, 2.0])


def test_the_line_is_that_of_the_points() -> None:
    shape = {"batch": 1, "heads": 4, "kv_heads": 4, "length": 8, "head_dim": 64, "dtype": "bf16"}
    records = [
        {**shape, "variant": "ours", "does": "lists", "lists": "random", "correct": True}
        | {"density_computed": x, "median_ms": 3 + 20 * x}
        for x in (0.05, 0.1, 0.5)
    ]
    (fit,) = fit_lines(records)
    assert (fit["slope_ms"], fit["constant_ms"], fit["r2"]) == (20, 3, 1)
    assert fit["constant_share"] == pytest.approx(0.75)
    assert fit_lines(records[:2]) == []


# Command lines


def test_several_values_may_follow_an_option() -> None:
    given = [
        "kernel",
        "--lengths",
        "8K,32K",
        "65536",
        "--rounds",
        "3",
        "--densities=0.1,0.2",
        "--lists",
        "full",
        "random",
    ]
    found = spread(given, KernelOptions)
    assert found[1:7] == ["--lengths", "8192", "--lengths", "32768", "--lengths", "65536"]
    command, options = parse(given, COMMANDS, "bench")
    assert command.name == "kernel"
    assert (options.lengths, options.densities, options.lists) == ((8192, 32768, 65536), (0.1, 0.2), ("full", "random"))
    assert options.batch == (1,)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_both_command_lines_have_every_option(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = runner.invoke(app, ["bench", command.name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    with pytest.raises(SystemExit):
        main([command.name, "--help"])
    plain = capsys.readouterr().out
    for spec in specs(command.options):
        flag = "--json" if spec.name == "as_json" else spec.flag
        assert flag in shown
        assert flag in plain
        assert spec.help


def test_typer_passes_the_same_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ["--methods", "pooled_topk=0.2,0.4", "--lengths", "256", "1K", *SMALL, "--json"]
    _, wanted = parse(["op", *given], COMMANDS, "bench")
    result = runner.invoke(app, ["bench", "op", *given])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    settings = content["settings"]
    assert settings == {name: list(x) if isinstance(x, tuple) else x for name, x in vars(wanted).items()}
    assert {record["length"] for record in content["records"]} == {256, 1024}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "--densities", "1.5"], "--densities holds 1.5"),
        (["kernel", "--kv-heads", "3"], "does not divide"),
        (["kernel", "--dtypes", "fp8"], "accepted: bf16, fp16, fp32"),
        (["kernel", "--baselines", "cudn"], "--baselines 'cudn' is not known"),
        (["kernel", "--implementations", "fastest"], "fastest"),
        (["kernel", "--device", "tpu"], "--device 'tpu' is not there"),
        (["kernel", "--lengths", "0"], "--lengths is 0"),
        (["op", "--methods", "pooled_topp"], "Did you mean 'pooled_topk'"),
        (["op", "--methods", "pooled_topk=many"], "no list of numbers"),
        (["op", "--methods", "pooled_topk=7"], "density is 7"),
        (["op", "--peer-file", "none.py"], "is no file"),
        (["model", "--hints", "singel_qa"], "single_qa"),
        (["show", "none.json"], "cannot be read"),
    ],
)
def test_errors_are_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = [] if arguments[0] == "show" or "--device" in arguments else ["--device", "cpu"]
    assert main([*arguments, *small]) == 2
    assert message in capsys.readouterr().err


def test_the_standard_library_is_enough(tmp_path: Path) -> None:
    """On a machine with torch alone; the tables are plain text there."""
    missing = ("typer", "rich", "matplotlib", "jsonschema", "numpy", "hypothesis", "transformers")
    code = f"""
import sys
for name in {missing!r}:
    sys.modules[name] = None
from sparsepass.measure.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = ["op", *SMALL, "--lengths", "256", "--methods", "pooled_topk=0.5", "--out", str(tmp_path / "op.json")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pooled_topk(density=0.5)" in done.stdout
    assert Result.load(tmp_path / "op.json").what == "op"


# Whole runs


def test_kernel_writes_what_it_measured(tmp_path: Path) -> None:
    out = tmp_path / "kernel.json"
    given = ["--lengths", "512", "--densities", "0.4", "0.6", "1", "--block", "64", "--lists", "random", "uneven"]
    given += ["--dtypes", "bf16", "--baselines", "sdpa", "sdpa_repeated"]
    assert main(["kernel", *SMALL, *given, "--out", str(out), "--plots", str(tmp_path / "plots")]) == 0
    result = Result.load(out)
    assert result.environment["device_type"] == "cpu"
    assert {"command", "versions", "date", "threads", "power"} <= result.environment.keys()
    sparse = [record for record in result.records if record["variant"] == "sparsepass"]
    assert [(one["lists"], one["density"]) for one in sparse] == [
        (kind, density) for kind in ("random", "uneven") for density in (0.4, 0.6, 1.0)
    ]
    for record in sparse:
        assert record["correct"]
        assert record["min_ms"] <= record["median_ms"] <= record["max_ms"]
        assert record["error"] <= record["allowed_error"]
        assert record["speedup"].keys() == {"sdpa", "sdpa_repeated", "dense"}
        assert record["tflops"] > 0
    assert {(fit["variant"], fit["lists"]) for fit in result.fits} == {
        ("sparsepass", "random"),
        ("sparsepass", "uneven"),
    }
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "kernel-rate.png", "kernel-speedup.png", "kernel-time.png",
    }  # fmt: skip
    titles = [title for title, _, _ in tables(result)]
    assert len(titles) == 2
    assert "straight line" in titles[1]


def test_op_measures_the_share_of_selection_and_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[Any, float] = {ours.select: 1.0, ours.attend: 3.0, ours.operator: 5.0}
    monkeypatch.setattr(Clock, "round", lambda self, run, budget_ms: [taken.get(getattr(run, "func", None), 10.0)])
    out = tmp_path / "op.json"
    given = ["--lengths", "1K", "--methods", "pooled_topk=0.5,0.7,1", "--inputs", "structured"]
    assert main(["op", *SMALL, *given, "--out", str(out)]) == 0
    result = Result.load(out)
    ops = [record for record in result.records if record["does"] == "op"]
    assert len(ops) == 3
    errors = [record["error_over_dense"] for record in ops]
    assert errors[0] >= errors[1] > errors[2]  # less left out, less error
    assert errors[2] < 1e-5
    assert ops[2]["mass"] == pytest.approx(1)
    for record in ops:
        assert record["select_share"] == 0.25
        assert record["speedup"]["dense"] == 2.0
    pictures = runner.invoke(app, ["bench", "plot", str(out)])
    assert pictures.exit_code == 0, pictures.output
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"op-error.png", "op-selection.png", "op-speedup.png", "op-time.png"}
    assert "pooled_topk" in runner.invoke(app, ["bench", "show", str(out)]).output


def test_selection_alone() -> None:
    result = runner.invoke(
        app, ["bench", "selection", *SMALL, "--lengths", "512", "--methods", "pooled_topk", "--json"]
    )
    assert result.exit_code == 0, result.output
    records = json.loads(result.stdout)["records"]
    assert {record["variant"] for record in records} == {"select", "attend"}
    assert all("select_over_attend" in record for record in records if record["variant"] == "select")


def test_every_method_has_a_sweep() -> None:
    found = cases(())
    assert {case.name for case in found} >= {"pooled_topk"}
    assert [case.text for case in cases(("pooled_topk(density=0.1, block=64)",))] == [
        "pooled_topk(density=0.1, block=64)"
    ]


def test_the_time_limit_leaves_problems_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = count()
    monkeypatch.setattr(trial, "time", SimpleNamespace(monotonic=lambda: next(second)))
    given = ["--lengths", "256", "512", "--methods", "pooled_topk=0.5", "--time-limit", "1.5"]
    assert main(["selection", *SMALL, *given]) == 0
    assert "1 of 2 problems left out" in capsys.readouterr().out


def test_an_implementation_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    real = dispatch.block_sparse_attention

    def attention(*tensors: Any, implementation: str, **options: Any) -> Any:
        used.append(implementation)
        return real(*tensors, implementation="auto", **options)

    monkeypatch.setattr(dispatch, "block_sparse_attention", attention)
    monkeypatch.setattr(dispatch, "implementations", lambda device: ("auto", "hopper", "triton"))
    assert ours.implementations(CPU) == ("auto", "hopper", "triton")
    one = problem()
    ours.check_implementation("hopper", CPU)
    ours.attend(one, make_lists("full", one, 1.0, 64, 0), "hopper")
    assert used == ["hopper"]


@pytest.mark.usefixtures("no_new_peers")
def test_peers_come_from_a_file_and_are_known_by_their_module(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from sparsepass.measure.bench import Peer, register_peer\n"
        "from sparsepass.measure.bench.baselines import dense_call\n"
        "register_peer(Peer('mine', 'approximate', lambda problem, lists: dense_call('sdpa', problem)))\n"
        "register_peer(Peer('absent', 'dense', None, 'no_such_module_anywhere'))\n"
    )
    out = tmp_path / "op.json"
    given = ["--lengths", "256", "--methods", "pooled_topk=0.5", "--peer-file", str(file), "--out", str(out)]
    assert main(["op", *SMALL, *given]) == 0
    by = {record["variant"]: record for record in Result.load(out).records}
    assert by["mine"]["error_over_dense"] < 1e-5
    assert "absent" not in {peer.name for peer in installed_peers()}
    assert "absent" not in by


@pytest.mark.slow
def test_flex_attention_with_the_same_blocks(tmp_path: Path) -> None:
    out = tmp_path / "kernel.json"
    given = ["--lengths", "512", "--densities", "0.5", "--baselines", "flex", "--out", str(out)]
    assert main(["kernel", *SMALL, *given]) == 0
    by = {record["variant"]: record for record in Result.load(out).records}
    if "failed" in by["flex"]:
        pytest.skip(f"FlexAttention does not run here: {by['flex']['failed']}")
    assert by["flex"]["correct"]
    assert "flex" in by["sparsepass"]["speedup"]


@pytest.mark.slow
def test_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "model.json"
    given = ["--lengths", "256", "--baselines", "eager", "--hints", "dense", "single_qa", "--rounds", "1"]
    assert main(["model", "--device", "cpu", *given, "--budget-ms", "1", "--out", str(out)]) == 0
    by = {record["variant"]: record for record in Result.load(out).records}
    assert set(by) == {"eager", "sparsepass, dense", "sparsepass, single_qa"}
    assert by["sparsepass, dense"]["error"] < 1e-3
    assert "eager" in by["sparsepass, dense"]["speedup"]


@pytest.mark.gpu
def test_kernel_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "kernel.json"
    given = ["--lengths", "2048", "--densities", "0.3", "1", "--heads", "8", "--rounds", "2", "--budget-ms", "5"]
    given += ["--baselines", "cudnn", "flash", "efficient", "--graphs", "--out", str(out)]
    assert main(["kernel", "--device", "cuda", *given]) == 0
    ran = [record for record in Result.load(out).records if "median_ms" in record]
    assert {"sparsepass", "sparsepass, graph"} <= {record["variant"] for record in ran}


@pytest.mark.gpu
def test_op_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "op.json"
    given = ["--lengths", "2048", "--methods", "pooled_topk=0.3", "--heads", "8", "--rounds", "2", "--budget-ms", "5"]
    assert main(["op", "--device", "cuda", *given, "--graphs", "--out", str(out)]) == 0
    assert all(record.get("correct", True) for record in Result.load(out).records)


def test_make_refuses_what_is_no_choice() -> None:
    with pytest.raises(OptionError, match="--inputs is 'zeros'"):
        make(OpOptions, {"inputs": "zeros"})
