"""``sparsepass tune``: what it measures, writes and goes on from; that its file is found, and by whom it is used."""

from __future__ import annotations

import functools
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
import torch.nn.functional as F
from typer.testing import CliRunner

import sparsepass
from sparsepass.cli.commands import app
from sparsepass.errors import OptionError
from sparsepass.host.environment import cpu_name
from sparsepass.kernels.runtime import tuned
from sparsepass.kernels.runtime.tuned import TUNING_ENV, default_file, tile_for, tuning_file, tuning_json
from sparsepass.kernels.spec import AttendTile, attend_tile
from sparsepass.measure.bench import ours
from sparsepass.measure.bench.timing import Clock, Run
from sparsepass.measure.tune import measure, run, store
from sparsepass.measure.tune.__main__ import main
from sparsepass.measure.tune.grid import QUICK_DENSITIES, CrossoverPoint, TilePoint, TuneOptions, candidates, points
from sparsepass.planning.crossover import current_table, provenance, sparse_wins

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--quick", "--head-dims", "32", "--lengths", "128", "256", "--budget-ms", "1"]
TILE = AttendTile(64, 64, 4, 2, 16, 1)
runner = CliRunner()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for the default file, and no file named."""
    monkeypatch.setenv("SPARSEPASS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(TUNING_ENV, raising=False)
    return tmp_path / "tuning.json"


@pytest.fixture(autouse=True)
def even_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call on the CPU takes a millisecond: how busy the machine is changes no test."""
    real = Clock.repeated

    def repeated(self: Clock, run: Run, calls: int) -> list[float]:
        if self.cuda:
            return real(self, run, calls)
        run()
        return [1.0] * calls

    monkeypatch.setattr(Clock, "repeated", repeated)


def content(*devices: dict[str, Any]) -> dict[str, Any]:
    return {"format": "sparsepass.tuning", "version": 1, "devices": list(devices)}


def device(name: str, speedup: float, **fields: Any) -> dict[str, Any]:
    """An entry whose sparse path is ``speedup`` times faster at each density, at 1K and 4K tokens."""
    kind = "cpu" if name == cpu_name() else "cuda"
    common = {"device": name, "device_type": kind, "dtype": "float32", "head_dim": 64}
    records = [
        {**common, "length": length, "density": density, "sparse_ms": 1.0, "dense_ms": speedup}
        for length in (1024, 4096)
        for density in (0.1, 0.6)
    ]
    base = {"device": name, "device_type": kind, "measured": "2030-01-02", "environment": {}, "curves": []}
    return {**base, "tiles": [], "tiles_measured": [], "records": records, **fields}


def ask(name: str, density: float = 0.5, kind: str = "cpu") -> Any:
    return sparse_wins(device_name=name, device_type=kind, dtype="float32", head_dim=64, length=2048, density=density)


# Measuring


def test_it_measures_writes_and_is_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    written = json.loads(home.read_text())
    store.validate(written)
    (entry,) = written["devices"]
    assert entry["device"] == cpu_name()
    assert {record["length"] for record in entry["records"]} == {128, 256}
    assert all(record["dtype"] == "float32" and record["head_dim"] == 32 for record in entry["records"])
    assert entry["environment"]["versions"]["torch"] == torch.__version__
    assert tuning_file() == home
    assert str(home) in provenance(CPU)
    assert [curve.source for curve in current_table().curves if curve.device_type == "cpu"] == [str(home)]
    assert entry["measured"] in capsys.readouterr().out
    assert not home.with_name("tuning.json.partial").exists()


def test_a_dry_run_measures_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "crossover fp32 32 128" in shown
    assert str(home) in shown
    assert not home.exists()


def test_an_interrupted_run_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = measure.measure_crossover
    measured: list[str] = []

    def counted(point: CrossoverPoint, *rest: Any) -> dict[str, Any]:
        if len(measured) == 1 and "stop" not in measured:
            measured.append("stop")
            raise KeyboardInterrupt
        measured.append(str(point))
        return real(point, *rest)

    monkeypatch.setattr(run, "measure_crossover", counted)
    with pytest.raises(KeyboardInterrupt):
        main(SMALL)
    assert not home.exists()  # half a table would decide about the other half
    assert main([*SMALL, "--dry-run"]) == 0
    assert "crossover fp32 32 128 (measured already)" in capsys.readouterr().out
    assert main(SMALL) == 0
    assert measured == ["crossover fp32 32 128", "stop", "crossover fp32 32 256"]
    assert {record["length"] for record in json.loads(home.read_text())["devices"][0]["records"]} == {128, 256}


@pytest.mark.parametrize("change", ["fresh", "device"])
def test_what_another_device_left_is_not_gone_on_with(tmp_path: Path, change: str) -> None:
    out = tmp_path / "t.json"
    progress = store.Progress(out, {"device": "a", "quick": True}, fresh=False)
    progress.add("point", {"records": []})
    assert store.Progress(out, {"device": "a", "quick": True}, fresh=False).done == {"point": {"records": []}}
    other = store.Progress(out, {"device": "b" if change == "device" else "a", "quick": True}, fresh=change == "fresh")
    assert other.done == {}


def test_the_time_limit_ends_a_run_that_can_be_gone_on_with(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = count()
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(second)))
    assert main([*SMALL, "--time-limit", "1.5"]) == 1
    assert not home.exists()
    assert main([*SMALL, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("(measured already)") == 1


def test_a_wrong_sparse_result_ends_it(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(ours, "operator", lambda problem, method: torch.zeros_like(problem.query))
    assert main(SMALL) == 2
    assert "The sparse result is wrong" in capsys.readouterr().err
    assert not home.exists()


def test_other_devices_and_head_sizes_are_kept(home: Path) -> None:
    former = device(cpu_name(), 2.0, tiles=[{"dtype": "float32", "head_dim": 64, "tile": TILE._asdict(), "gain": 1.1}])
    home.write_text(json.dumps(content(device("NVIDIA X", 3.0), former)))
    assert main(SMALL) == 0
    other, mine = json.loads(home.read_text())["devices"]
    assert other["device"] == "NVIDIA X"
    assert {record["head_dim"] for record in mine["records"]} == {32, 64}
    assert {record.get("measured") for record in mine["records"] if record["head_dim"] == 64} == {"2030-01-02"}
    assert [tile["head_dim"] for tile in mine["tiles"]] == [64]
    assert main(SMALL) == 0  # its own former figures are replaced
    again = json.loads(home.read_text())["devices"][1]["records"]
    assert len([record for record in again if record["head_dim"] == 64]) == 4
    assert len(again) == 4 + 2 * len(QUICK_DENSITIES)


def test_a_foreign_file_is_not_overwritten(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.write_text('{"mine": 1}')
    assert main(SMALL) == 2
    assert "no tuning file" in capsys.readouterr().err
    assert home.read_text() == '{"mine": 1}'


def test_the_grid() -> None:
    gpu = torch.device("cuda")
    full = points(TuneOptions(), gpu)
    assert isinstance(full[0], TilePoint)
    assert isinstance(full[-1], CrossoverPoint)
    assert len({str(point) for point in full}) == len(full)
    assert len(points(TuneOptions(quick=True), gpu)) < 10 < len(full)
    assert all(isinstance(point, CrossoverPoint) for point in points(TuneOptions(), CPU))
    assert {point.dtype for point in points(TuneOptions(only="tiles"), gpu) if isinstance(point, TilePoint)} == {
        "bf16",
        "fp32",
    }
    with pytest.raises(OptionError, match="no kernel configurations"):
        points(TuneOptions(only="tiles"), CPU)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize(("dtype", "head_dim"), [("bf16", 64), ("bf16", 128), ("bf16", 96), ("fp32", 128)])
def test_candidates_begin_with_the_built_in_tile(dtype: str, head_dim: int, capability: tuple[int, int]) -> None:
    found = candidates(dtype, head_dim, capability)
    built_in = attend_tile(torch.float32 if dtype == "fp32" else torch.bfloat16, head_dim, capability)
    assert found[0] == built_in
    assert len(found) == len(set(found)) >= 5
    assert {tile.precision for tile in found} == {built_in.precision}  # accuracy is not for sale
    for tile in found:
        assert tuned.parse_tile(tile._asdict()) == tile


@pytest.mark.parametrize(
    "change", [{"block_m": 100}, {"num_stages": 0}, {"precision": "tf32"}, {"block_n": "64"}, {"warps": 4}]
)
def test_what_is_no_tile_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="no tile"):
        tuned.parse_tile(TILE._asdict() | change)


# Use


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")
    monkeypatch.setattr(tuned, "_triton_version", lambda: "3.6.0")
    monkeypatch.setattr(tuned, "capability_of", lambda _: (9, 0))
    return torch.device("cuda", 0)


def with_tile(triton: str) -> dict[str, Any]:
    tiles = [{"dtype": "bfloat16", "head_dim": 128, "tile": TILE._asdict(), "gain": 1.1}]
    return content(device("NVIDIA X", 1.0, tiles=tiles, environment={"versions": {"triton": triton}}))


def test_tuned_tiles_are_used_on_their_device(home: Path, fake_gpu: torch.device) -> None:
    built_in = attend_tile(torch.bfloat16, 128, (9, 0))
    assert tile_for(fake_gpu, torch.bfloat16, 128) == built_in
    home.write_text(json.dumps(with_tile("3.6.0")))
    assert tile_for(fake_gpu, torch.bfloat16, 128) == TILE
    assert tile_for(fake_gpu, torch.float16, 128) == TILE  # the same rate
    assert tile_for(fake_gpu, torch.float32, 128) == attend_tile(torch.float32, 128, (9, 0))
    assert tile_for(fake_gpu, torch.bfloat16, 96) == attend_tile(torch.bfloat16, 96, (9, 0))  # another use of registers
    home.write_text(json.dumps(with_tile("3.7.1 ")))  # may not fit under another compiler
    assert tile_for(fake_gpu, torch.bfloat16, 128) == built_in


def test_tiles_can_be_forced_while_measuring(home: Path, fake_gpu: torch.device) -> None:
    try:
        tuned.force_tiles({("bfloat16", 128): TILE})
        assert tile_for(fake_gpu, torch.float16, 128) == TILE
    finally:
        tuned.force_tiles({})
    assert tile_for(fake_gpu, torch.float16, 128) != TILE


def test_the_crossover_of_the_file_decides(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = provenance(CPU)
    home.write_text(json.dumps(content(device(cpu_name(), 0.5))))
    assert not ask(cpu_name(), 0.1)
    assert "2030-01-02" in ask(cpu_name(), 0.1).reason
    assert str(home) in provenance(CPU)
    home.write_text(json.dumps(content(device(cpu_name(), 2.00))))  # another size: read again
    assert ask(cpu_name(), 0.5)
    monkeypatch.setenv(TUNING_ENV, "off")
    assert provenance(CPU) == shipped


def test_the_environment_names_another_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.write_text(json.dumps(content(device(cpu_name(), 0.5))))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content(device(cpu_name(), 2.0))))
    monkeypatch.setenv(TUNING_ENV, str(other))
    assert tuning_file() == other
    assert ask(cpu_name())


def test_a_broken_default_file_is_left_alone_a_broken_named_one_is_not(
    home: Path, monkeypatch: pytest.MonkeyPatch, fake_gpu: torch.device
) -> None:
    home.write_text("{")
    assert ask("NVIDIA H200", 0.1, "cuda").max_density >= 0
    assert tile_for(fake_gpu, torch.bfloat16, 128) == attend_tile(torch.bfloat16, 128, (9, 0))
    monkeypatch.setenv(TUNING_ENV, str(home))
    with pytest.raises(OptionError, match="not JSON"):
        ask("NVIDIA H200", 0.1, "cuda")
    with pytest.raises(OptionError, match="not JSON"):
        tile_for(fake_gpu, torch.bfloat16, 128)
    home.write_text(json.dumps({**content(), "version": 9}))
    with pytest.raises(OptionError, match="version is 9"):
        ask("NVIDIA H200", 0.1, "cuda")


def test_the_former_name_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEPASS_CROSSOVER", "mine.json")
    with pytest.raises(OptionError, match="now called SPARSEPASS_TUNING"):
        current_table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one["records"][0].update(density=2), "out of range"),
        (lambda one: one["records"][0].update(dtype="int8"), "dtype"),
        (lambda one: one.update(measured="yesterday"), "measured"),
        (lambda one: one.update(device_type="tpu"), "device_type"),
        (lambda one: one["tiles"].append({"dtype": "float32", "head_dim": 64, "tile": {}, "gain": 1}), "no tile"),
    ],
)
def test_the_schema_refuses(change: Any, message: str) -> None:
    held = json.loads(json.dumps(content(device(cpu_name(), 2.0))))
    store.validate(held)
    change(held["devices"][0])
    with pytest.raises(OptionError, match=message):
        store.validate(held)


# What was compiled under another table


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_says_by_which_measurements(home: Path) -> None:
    home.write_text(json.dumps(content(device(cpu_name(), 2.0))))
    query = torch.zeros(1, 2, 2048, 64)
    report = sparsepass.explain(attention, query, query, query, task="single_qa")
    (graph,) = report.graphs
    assert f"Where sparse pays: measured on {cpu_name()}, 2030-01-02, {home}." in graph.notes
    assert graph.sites[0].density_achieved is not None


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_graph_compiled_under_another_table_is_not_used_for_this_one(home: Path, inductor: bool) -> None:
    """With Inductor its caches are warm from the second time on, and hold the other table's graph."""
    options = {"sparsepass.inductor": inductor}
    query = torch.randn(1, 2, 2048, 64)
    outcomes: list[tuple[str, str]] = []
    for speedup in (2.0, 0.5, 2.0):
        home.write_text(json.dumps(content(device(cpu_name(), speedup))) + " " * len(outcomes))
        torch._dynamo.reset()
        compiled = torch.compile(attention, backend=functools.partial(sparsepass.backend, options=options))
        (graph,) = sparsepass.explain(compiled, query, query, query, task="single_qa").graphs
        outcomes.append((graph.sites[0].outcome.value, graph.plan_key))
    assert outcomes[0] == outcomes[2]
    assert outcomes[0][0] == "sparse"
    assert outcomes[1] == ("dense", "dense")


@pytest.mark.usefixtures("fresh_dynamo")
def test_hints_are_resolved_by_the_table_that_a_graph_was_compiled_under(home: Path) -> None:
    """The table changes while a graph lives: that graph keeps its plans, a new length is planned by the new table."""
    home.write_text(json.dumps(content(device(cpu_name(), 2.0))))
    compiled = torch.compile(
        attention, backend=functools.partial(sparsepass.backend, options={"sparsepass.inductor": False}), dynamic=False
    )

    def outcome(length: int) -> str:
        query = torch.randn(1, 2, length, 64)
        (graph,) = sparsepass.explain(compiled, query, query, query, task="single_qa").graphs
        return graph.sites[0].outcome.value

    assert outcome(2048) == "sparse"
    home.write_text(json.dumps(content(device(cpu_name(), 0.5))) + " ")
    assert outcome(2048) == "sparse"
    assert outcome(3000) == "dense"


def test_the_command_is_there() -> None:
    shown = runner.invoke(app, ["tune", "--help"], env={"COLUMNS": "160", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for flag in ("--quick", "--dry-run", "--fresh", "--out", "--only"):
        assert flag in shown.output
    assert default_file().name == "tuning.json"


TILES_INTERPRETED = """
import json, sys, torch
from sparsepass.measure.bench.timing import Effort
from sparsepass.kernels.spec import AttendTile
from sparsepass.measure.tune import measure
from sparsepass.measure.tune.grid import TilePoint
measure.QUICK_CASES, measure.HEADS, measure.KV_HEADS = ((160, 0.7),), 2, 1
built_in, other = AttendTile(64, 64, 8, 3, 64, 1), AttendTile(32, 32, 4, 2, 32, 1)
unfit = AttendTile(48, 64, 8, 3, 64, 1)
measure.candidates = lambda *_: [built_in, other, unfit]
times = {built_in: 2.0, other: 1.0}
measure.time_variants = lambda runs, *_: {tile: [[times[tile]]] for tile in runs}
measure.device_name = lambda _: "NVIDIA X"
outcome = measure.measure_tiles(TilePoint("fp16", 64), torch.device("cpu"), Effort(1, 0), True, print)
print(json.dumps(outcome))
"""


def test_tiles_are_checked_and_the_fastest_is_chosen() -> None:
    """Under Triton's interpreter, with times made up; a tile that does not compile is left out, with the reason."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", TILES_INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["tile"]["tile"]["block_m"] == 32
    assert (outcome["tile"]["gain"], outcome["tile"]["built_in"]) == (2.0, False)
    assert [bool(one["fault"]) for one in outcome["tried"]] == [False, False, True]


@pytest.mark.gpu
def test_tiles_on_a_gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "QUICK_CASES", ((1024, 0.5),))
    assert main(["--quick", "--only", "tiles", "--head-dims", "64", "--budget-ms", "2"]) == 0
    (entry,) = json.loads(home.read_text())["devices"]
    assert entry["tiles_measured"] == [{"dtype": "bfloat16", "head_dim": 64}]


def test_a_tuning_file_of_the_same_size_and_time_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    found = []
    for number in (1, 2):
        path.write_text(f'{{"version": {number}}}', encoding="utf-8")
        os.utime(path, (1_700_000_000, 1_700_000_000))
        found.append(tuning_json(path))
        assert tuning_json(path) == found[-1]
    assert found == [{"version": 1}, {"version": 2}]
