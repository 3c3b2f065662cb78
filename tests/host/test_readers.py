"""Every reader of a file, given anything: what it cannot read it refuses by an error of ours that is short."""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.errors import OptionError, SparsepassError
from sparsepass.host.files import read_json
from sparsepass.kernels.runtime.tuned import tuning_json
from sparsepass.measure.auto.probe import Probe
from sparsepass.measure.auto.records import Records
from sparsepass.measure.auto.router import Router, Term
from sparsepass.measure.bench.result import Result, legible
from sparsepass.measure.bench.tables import show
from sparsepass.measure.calibrate.cell import Outcome
from sparsepass.measure.calibrate.log import Log
from sparsepass.measure.coverage.store import Sweep
from sparsepass.measure.tasks.text.codec import Bytes
from sparsepass.measure.tasks.text.documents import read as read_documents
from sparsepass.measure.tune import store
from sparsepass.methods import decode_budget
from sparsepass.planning.crossover_table import parse
from sparsepass.policies.policy import Policy, published_policy
from sparsepass.policies.rule import Ranges
from sparsepass.reports.report import Report

RECORD = {
    "device": "NVIDIA X",
    "device_type": "cuda",
    "dtype": "bfloat16",
    "head_dim": 64,
    "length": 4096,
    "density": 0.1,
    "sparse_ms": 1.0,
    "dense_ms": 2.0,
}
TIMED = {"variant": "ours", "does": "lists", "length": 4096, "median_ms": 1.0, "min_ms": 0.9, "max_ms": 1.1}
KEY = {"device": "NVIDIA X"}


def crossover(file: Path) -> object:
    return parse(read_json(file, "crossover file", OptionError), "file")


def shows(file: Path) -> None:
    result = Result.load(file)
    with legible(file):
        show(result)


def tuning(file: Path) -> object:
    return store.merged(file, store.entry({**KEY, "device_type": "cuda", "date": "2030-01-01"}, {}, {}))


def log(file: Path) -> None:
    Log(file, {"weights": "w"}).close()


def valid() -> dict[str, tuple[Callable[[Path], object], Any]]:
    """By name: a reader, and content that it reads."""
    router = Router({"entropy": Term(0.0, 1.0, 1.0)}, 0.0, 0.5, Probe(), 0, 4096, budgets=("dense",))
    places = {"task": "t", "task_class": "single_qa", "template": 0, "length": 1, "budget": "dense", "density": 1.0}
    sweep = {"kind": "k", "arch": "a", "implementation": "sdpa", "phase": "prefill", "error": "none"}
    tuned = {"device": "NVIDIA X", "measured": "2030-01-01", "records": [RECORD], "tiles": [], "tiles_tried": []}
    curve = {"device": "x", "device_type": "cpu", "dtype": "float32", "head_dim": 64, "points": [[1024, 0.5]]}
    policy = published_policy().to_json()
    policy["rules"] = [{**policy["rules"][0], "layers": "0-3,7", "floor": 0.5}]
    return {
        "policy": (Policy.load, policy),
        "router": (Router.load, {**router.to_json(), "fingerprint": router.fingerprint}),
        "records": (
            Records.load,
            {"version": 1, "about": {}, "places": [{**places, "right": [1], "signals": {"entropy": [0.5]}}]},
        ),
        "result": (
            shows,
            json.loads(Result("kernel", KEY, records=[TIMED]).to_text()),
        ),
        "sweep": (
            Sweep.load,
            {"format": "sparsepass.coverage", "version": 1, "versions": {}, "settings": {}, "records": [sweep]},
        ),
        "curves": (crossover, {"version": 1, "curves": [curve], "fallback": {"cpu": [[1024, 0.5]]}}),
        "measured": (crossover, {"records": [RECORD], "date": "2030-01-01"}),
        "tuning": (tuning, {"format": "sparsepass.tuning", "version": 1, "devices": [tuned]}),
        "report": (lambda file: Report.from_json(file.read_text(errors="replace")), json.loads(Report(()).to_json())),
        "log": (log, {"format": "sparsepass.calibration", "version": 1, "conditions": {"weights": "w"}}),
        "documents": (
            lambda file: read_documents(file, Bytes()),
            {"document": "d", "question": "q", "answer": "a", "choices": ["a", "b"]},
        ),
        "unfinished": (lambda file: store.Progress(file, KEY, False), {"key": KEY, "done": {"point": {}}}),
    }


READERS = valid()


def reads(name: str, content: bytes, folder: Path) -> SparsepassError | None:
    """The error of a reader, checked, or None where it reads this."""
    file = folder / ("x.partial" if name == "unfinished" else "x")
    file.write_bytes(content)
    try:
        READERS[name][0](folder / "x")
    except SparsepassError as error:
        caught = error
    else:
        return None
    assert len(str(caught)) < 600, str(caught)
    return caught


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.mark.parametrize("name", READERS)
def test_valid_content_is_read(name: str, folder: Path) -> None:
    content = json.dumps(READERS[name][1]).encode() + b"\n"
    assert reads(name, content, folder) is None
    assert reads(name, b"\xef\xbb\xbf" + content, folder) is None or name in ("report", "log")


BROKEN = {
    "nothing": b"",
    "blanks": b" \n ",
    "UTF-16": '{"version": 1}'.encode("utf-16"),
    "Latin-1": b'{"name": "\xe9"}',
    "null byte": b'{"name": "\0"}',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "5000 digits": b'{"version": ' + b"9" * 5000 + b"}",
    "400 digits": b'{"version": ' + b"9" * 400 + b"}",
    "NaN": b'{"version": NaN}',
    "twice": b'{"version": 1, "version": 1}',
    "half a character": b'{"version": "\\ud800"}',
    "a long text": b'"' + b"x" * 1_000_000 + b'"',
    "a long name": b'{"version": 1, "' + b"x" * 1_000_000 + b'": 1}',
    "a number": b"1",
    "packed": gzip.compress(b"{}"),
    "packed and cut": gzip.compress(b"{}" * 100)[:-9],
    "packed zeros": gzip.compress(b"0" * (1 << 20)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_content_is_refused(broken: str, folder: Path) -> None:
    for name in READERS:
        assert reads(name, BROKEN[broken], folder) is not None or name == "unfinished" or (name, broken) in FINE, name


FINE = {("log", "nothing")}
"""An empty log is one that begins."""

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 3)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\u2028", "x" * 100_000, 10**400, 1e308, "NaN", "0-", "9" * 400])
)
VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in JSON."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(path for key, value in inner for path in places(value, (*at, key)))]


def changed(data: Any, path: tuple[Any, ...], value: Any, how: str) -> Any:
    if not path:
        return value
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    if how == "remove":
        del holder[path[-1]]
    elif how == "add" and isinstance(holder, dict):
        holder[str(value)[:50]] = value
    else:
        holder[path[-1]] = value
    return data


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_changed_content_is_read_or_refused(name: str, data: st.DataObject, folder: Path) -> None:
    content = READERS[name][1]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(content)))
        how = data.draw(st.sampled_from(["set", "remove", "add"]))
        content = changed(content, path, data.draw(VALUES), how)
    text = json.dumps(content) + "\n"
    if name == "log" and data.draw(st.booleans()):
        text = json.dumps(READERS[name][1]) + "\n" + text
    reads(name, text.encode(), folder)


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_cut_and_flipped_bytes_are_read_or_refused(name: str, data: st.DataObject, folder: Path) -> None:
    content = bytearray(json.dumps(READERS[name][1]).encode() + b"\n")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    reads(name, bytes(content), folder)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    if name in ("report", "unfinished"):
        pytest.skip("reads a text, or what its own run left")
    reader = READERS[name][0]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    missing = [] if name in ("tuning", "log") else [tmp_path / "none", Path("a\0b"), Path("\ud800"), Path("x" * 5000)]
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "huge", *missing):
        if name == "tuning" and not path.is_file():
            continue
        if name == "log" and path.is_fifo():
            continue
        with pytest.raises(SparsepassError) as caught:
            reader(path)
        assert len(str(caught.value)) < 500


@given(
    text=st.text()
    | st.sampled_from(["9" * 5000, "f(" * 3000, "x" * 100_000, "pooled_topk(density=" + "9" * 4000 + ")"])
)
def test_texts_of_budgets_and_ranges(text: str) -> None:
    for read in (decode_budget, Ranges.parse):
        caught: list[SparsepassError] = []
        try:
            read(text)
        except SparsepassError as error:
            caught.append(error)
        assert all(len(str(error)) < 500 for error in caught)


def test_the_log_keeps_what_it_had(folder: Path) -> None:
    """A broken log is refused, and what it has stays there."""
    file = folder / "kept.jsonl"
    held = Log(file, {"weights": "w"})
    held.put(("t", 1, 0, "dense"), Outcome((1.0,), 1.0))
    held.close()
    with file.open("a") as stream:
        stream.write('{"task": "t"}\n')
    before = file.read_bytes()
    with pytest.raises(OptionError, match="line 3"):
        log(file)
    assert file.read_bytes() == before


def test_a_tuning_file_in_force(folder: Path) -> None:
    (folder / "tuning.json").write_bytes(BROKEN["5000 digits"])
    with pytest.raises(OptionError, match="digits"):
        tuning_json(folder / "tuning.json")
