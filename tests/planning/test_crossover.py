"""Crossover: fitting records, looking between and beyond them, the file that overrides the shipped table."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.errors import OptionError
from sparsepass.kernels.runtime.tuned import TUNING_ENV
from sparsepass.planning.crossover import Verdict, current_table, full_wins, main, sparse_wins
from sparsepass.planning.crossover_table import MARGIN, Record, Table, fit, interpolate, parse

K = 1024


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNING_ENV, "off")


def record(length: int, density: float, speedup: float, **fields: Any) -> Record:
    known = {"device": "NVIDIA X", "device_type": "cuda", "dtype": "bfloat16", "head_dim": 128, **fields}
    return Record(length=length, density=density, sparse_ms=1.0, dense_ms=speedup, **known)


def points(*records: Record) -> tuple[tuple[int, float], ...]:
    (curve,) = fit(records)
    return curve.points


def ask(length: int, density: float, **fields: Any) -> Verdict:
    known = {"device_name": "NVIDIA X", "device_type": "cuda", "dtype": "torch.bfloat16", "head_dim": 128, **fields}
    return sparse_wins(length=length, density=density, **known)


# Fitting


def test_fit_takes_the_largest_density_below_the_first_loss() -> None:
    grid = [(0.1, 3.0), (0.2, 1.5), (0.3, 1.04), (0.4, 1.2)]  # 4% is no win, and a win beyond a loss is noise
    assert points(*(record(8 * K, density, speedup) for density, speedup in grid)) == ((8 * K, 0.2),)


def test_fit_never_promises_a_short_length_more_than_a_long_one_kept() -> None:
    noisy = [record(8 * K, 0.4, 2), record(8 * K, 0.6, 0.5), record(16 * K, 0.2, 2), record(16 * K, 0.4, 0.9)]
    assert points(*noisy) == ((8 * K, 0.2), (16 * K, 0.2))


def test_fit_keeps_what_a_shorter_length_showed_where_the_grid_ended_early() -> None:
    assert points(record(8 * K, 0.4, 2), record(64 * K, 0.1, 9)) == ((8 * K, 0.4), (64 * K, 0.4))


def test_fit_uses_the_median_of_repeats() -> None:
    assert points(*(record(8 * K, 0.1, speedup) for speedup in (1.2, 1.3, 0.2))) == ((8 * K, 0.1),)


RECORDS = st.lists(
    st.builds(
        record,
        st.sampled_from([2 * K, 8 * K, 32 * K, 128 * K]),
        st.sampled_from([0.05, 0.1, 0.3, 0.6, 1.0]),
        st.floats(0.1, 20),
        head_dim=st.sampled_from([64, 128]),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(RECORDS)
def test_fitted_curves_rise_and_follow_order_of_nothing(records: list[Record]) -> None:
    curves = fit(records)
    assert fit(reversed(records)) == curves
    for curve in curves:
        assert [length for length, _ in curve.points] == sorted({length for length, _ in curve.points})
        limits = [limit for _, limit in curve.points]
        assert limits == sorted(limits)
        for limit in limits:
            assert limit == 0 or any(one.density == limit and one.dense_ms >= MARGIN for one in records)
    table = Table(curves, {"cuda": ((8 * K, 0.1),)})
    read = parse(json.loads(json.dumps(table.to_json())), "file")
    assert (read.to_json(), read.fingerprint) == (table.to_json(), table.fingerprint)


# Looking up


def test_interpolation_is_linear_in_the_logarithm_of_the_length() -> None:
    curve = ((4 * K, 0.0), (16 * K, 0.4), (64 * K, 0.6))
    assert [interpolate(curve, length) for length in (100, 4 * K - 1, 4 * K)] == [0, 0, 0]
    assert interpolate(curve, 8 * K) == pytest.approx(0.2)
    assert interpolate(curve, 16 * K) == 0.4
    assert interpolate(curve, 32 * K) == pytest.approx(0.5)
    assert [interpolate(curve, length) for length in (64 * K, 1024 * K)] == [0.6, 0.6]


@settings(deadline=None)
@given(st.integers(1, 1 << 21), st.integers(1, 1 << 21), st.floats(0, 1, exclude_min=True))
def test_longer_and_sparser_never_turns_a_win_into_a_loss(one: int, other: int, density: float) -> None:
    short, long = sorted((one, other))
    for device_name, device_type in (("NVIDIA H200", "cuda"), ("NVIDIA unheard of", "cuda"), ("a CPU", "cpu")):
        for head_dim in (64, 128, 256):
            known = {"device_name": device_name, "device_type": device_type, "head_dim": head_dim}
            if ask(short, density, **known):
                assert ask(long, density, **known)
                assert ask(long, density / 2, **known)


def test_unknown_devices_get_the_cautious_default() -> None:
    assert not ask(8 * K - 1, 0.05)
    assert ask(16 * K, 0.4)
    assert not ask(1024 * K, 0.41)
    assert "cautious default, NVIDIA X was not measured" in ask(16 * K, 0.4).reason
    verdict = ask(16 * K, 0.1, device_type="mps")
    assert not verdict
    assert "mps" in verdict.reason


def test_shipped_table_agrees_with_known_figures() -> None:
    h200 = {"device_name": "NVIDIA H200"}
    assert ask(128 * K, 0.1, **h200)  # 33 ms against 250
    assert not ask(512, 0.05, **h200)
    cpu = {"device_name": "any", "device_type": "cpu", "dtype": "float32", "head_dim": 64}
    assert ask(16 * K, 0.1, **cpu)  # 4.5 times
    assert not ask(512, 0.5, **cpu)


TABLE = {
    "version": 1,
    "curves": [
        {"device": "NVIDIA X", "device_type": "cuda", "dtype": dtype, "head_dim": dim, "points": [[8 * K, limit]]}
        for dtype, dim, limit in [("bfloat16", 64, 0.7), ("bfloat16", 128, 0.5), ("float32", 128, 0.2)]
    ],
}


@pytest.fixture
def table_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(TABLE))
    monkeypatch.setenv(TUNING_ENV, str(path))
    return path


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"head_dim": 64}, 0.7),
        ({"head_dim": 80}, 0.5),  # the nearest larger
        ({"head_dim": 32}, 0.7),
        ({"head_dim": 256}, 0.4),  # none larger: the most cautious, the default included
        ({"dtype": "float16"}, 0.5),  # runs at the rate of bfloat16
        ({"dtype": "float64"}, 0.2),  # the most cautious of all dtypes
        ({"device_name": "nvidia x"}, 0.5),
        ({"device_name": "NVIDIA Y"}, 0.4),
    ],
)
def test_nearest_measured_case(table_file: Path, fields: dict[str, Any], limit: float) -> None:
    verdict = ask(16 * K, limit, **fields)
    assert verdict
    assert verdict.max_density == limit
    assert not ask(16 * K, limit + 0.01, **fields)


def test_override_replaces_its_devices_alone_and_is_read_again(table_file: Path) -> None:
    devices = {curve.device for curve in current_table().curves}
    assert {"NVIDIA X", "NVIDIA H200"} < devices
    before = current_table()
    assert current_table() is before
    rows = [
        {"device": "Some CPU", "dtype": "torch.float32", "head_dim": 64, "length": 2 * K, "density": d}
        | {"sparse_ms": 1, "dense_ms": 2}
        for d in (0.1, 0.2)
    ]
    table_file.write_text(json.dumps({"hardware": "x", "records": rows}))  # records serve as well
    after = current_table()
    assert [curve.device for curve in after.curves if curve.device_type == "cpu"] == ["Some CPU"]
    verdict = ask(2 * K, 0.2, device_type="cpu", device_name="Another", dtype="float32", head_dim=64)
    assert verdict
    assert "another CPU" in verdict.reason
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "mine.json"),
        ("{}", "'version' is missing"),
        ('{"version": 9}', "version is 9"),
        ('{"version": 1, "curves": [{}]}', "'device' is missing"),
        ('{"records": [{"device": "x"}]}', "lacks the field 'dtype'"),
        (json.dumps(TABLE).replace("0.5", "5"), "densities 0 to 1"),
        (json.dumps(TABLE).replace(str(8 * K), "0"), "lengths rising"),
    ],
)
def test_bad_override_is_an_error(table_file: Path, content: str, message: str) -> None:
    table_file.write_text(content)
    with pytest.raises(OptionError, match=message):
        ask(8 * K, 0.1)


def test_missing_override_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNING_ENV, "/nowhere/none.json")
    with pytest.raises(OptionError, match=r"SPARSEPASS_TUNING names '/nowhere/none\.json'"):
        ask(8 * K, 0.1)


def test_build_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"device": "NVIDIA X", "dtype": "bfloat16", "head_dim": 128, "density": 0.1, "sparse_ms": 1.0}
    files = []
    for length in (8 * K, 16 * K):
        path = tmp_path / f"{length}.json"
        content = {"hardware": "one X", "versions": {}, "command": "bench"}
        path.write_text(json.dumps({**content, "records": [{**row, "length": length, "dense_ms": 2.0}]}))
        files.append(str(path))
    out = tmp_path / "table.json"
    assert main(["build", *files, "-o", str(out)]) == 0
    assert "NVIDIA X, bfloat16, head size 128: 8192: 0.1, 16384: 0.1" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [source["command"] for source in written["sources"]] == ["bench", "bench"]
    assert set(written["fallback"]) == {"cpu", "cuda"}
    monkeypatch.setenv(TUNING_ENV, str(out))
    assert ask(8 * K, 0.1).reason.startswith("Sparse: density 0.1 is within 0.1")
    row["sparse_ms"] = 0
    Path(files[0]).write_text(json.dumps({"records": [{**row, "length": 1, "dense_ms": 2.0}]}))
    assert main(["build", *files, "-o", str(out)]) == 1
    assert "times over 0 ms" in capsys.readouterr().err


def test_exact_attention_by_the_faster_kernel() -> None:
    """Shipped figures of the H200: full lists pay from 16K at head size 128; a mask tensor is never worth having."""
    h200 = {"device_name": "NVIDIA H200", "device_type": "cuda", "dtype": "bfloat16"}
    assert full_wins(**h200, head_dim=128, length=32768, flagged=True)
    assert not full_wins(**h200, head_dim=128, length=8192, flagged=True)
    assert full_wins(**h200, head_dim=128, length=8192, flagged=False)
    assert not full_wins(**h200, head_dim=128, length=1024, flagged=False)
    assert not full_wins(**h200 | {"dtype": "float32"}, head_dim=128, length=8192, flagged=False)
    assert not full_wins(**h200 | {"device_name": "Unknown GPU"}, head_dim=128, length=32768, flagged=False)
    assert not full_wins(device_name="cpu", device_type="cpu", dtype="float32", head_dim=64, length=9, flagged=False)
