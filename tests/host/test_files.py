"""Files are written whole or not at all, and whatever cannot be written is said in words of ours."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsepass.errors import LONGEST, OptionError, PolicyError, SparsepassError, close_names, shown
from sparsepass.host.files import parse_json, write_whole
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.probe import Probe
from sparsepass.measure.auto.records import Place, Records
from sparsepass.measure.auto.router import Router, Term
from sparsepass.measure.bench.options import check_paths, whole_number
from sparsepass.measure.bench.result import Result
from sparsepass.measure.calibrate.cell import Outcome
from sparsepass.measure.calibrate.command import CalibrateOptions, check_asked
from sparsepass.measure.calibrate.command import run as calibrate
from sparsepass.measure.calibrate.log import Log
from sparsepass.measure.coverage.store import Sweep
from sparsepass.measure.tune import store
from sparsepass.policies.policy import Policy, builtin_policy, resolve_policy
from sparsepass.policies.rule import Ranges, Rule
from sparsepass.request.hints import resolve_hint
from sparsepass.types import DENSE, Budget, TaskClass


def router(name: str = "r") -> Router:
    return Router({"entropy": Term(0.0, 1.0, 1.0)}, 0.0, 0.5, Probe(), 0, 4096, name=name)


def large(file: Path) -> None:
    Policy(name="p", description="x" * 100_000).save(file)


WRITERS: dict[str, Callable[[Path], None]] = {
    "policy": large,
    "router": router("x" * 100_000).save,
    "records": Records((Place("t", "c", 0, 1, "dense", 1.0, (True,)),), {"x": "x" * 100_000}).save,
    "result": Result("kernel", {"device": "x" * 100_000}).save,
    "sweep": Sweep({"torch": "x" * 100_000}, {}).save,
    "tuning": lambda file: store.write(file, "x" * 100_000),
}


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """A disk on which no file may grow over ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_leaves_the_former_file(what: str, tmp_path: Path) -> None:
    file = tmp_path / "held.json"
    file.write_text("former")
    with full_after(4096), pytest.raises(SparsepassError, match=r"held\.json' cannot be written: File too large"):
        WRITERS[what](file)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("held.json", "former")]
    WRITERS[what](file)
    assert file.stat().st_size > 90_000


def test_a_text_that_is_not_unicode_leaves_the_former_file(tmp_path: Path) -> None:
    file = tmp_path / "held.json"
    file.write_text("former")
    with pytest.raises(PolicyError, match=r"'\\ud800' has no form in UTF-8"):
        Policy(name="\ud800").save(file)
    assert file.read_text() == "former"
    assert os.listdir(tmp_path) == ["held.json"]


@pytest.mark.parametrize("value", [object(), {1, 2}, [[]] * 1])
def test_content_without_a_form_in_json_leaves_the_former_file(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "held.json"
    file.write_text("former")
    if value == [[]]:
        value[0] = value  # which contains itself
    with pytest.raises(PolicyError, match="cannot be written as JSON"):
        Policy(calibrated={"x": value}).save(file)
    assert file.read_text() == "former"


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    file, link = tmp_path / "target.json", tmp_path / "link.json"
    file.write_text("former")
    file.chmod(0o640)
    link.symlink_to("target.json")
    builtin_policy().save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert Policy.load(file) == Policy.load(link) == builtin_policy()
    dangling = tmp_path / "dangling.json"
    dangling.symlink_to("made.json")
    builtin_policy().save(dangling)
    assert (tmp_path / "made.json").is_file()


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    builtin_policy().save(tmp_path / "new.json")
    assert (tmp_path / "new.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("save", [builtin_policy().save, router().save])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing/p.json", "No such file"),
        (".", "it is a folder"),
        ("a\0b", "embedded null (byte|character)"),
        ("\ud800", "has no form in UTF-8"),
        ("x" * 5000, "File name too long"),
        ("/dev/full", "No space left"),
    ],
)
def test_paths_that_cannot_be_written(save: Callable[[Any], None], path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises((PolicyError, AutoError), match=reason) as caught:
        save(path if path.startswith("/") else os.path.join(tmp_path, path))
    assert len(str(caught.value)) < 500


def test_a_device_is_written_to_and_stays_one() -> None:
    builtin_policy().save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text", OptionError)
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


# Before anything is measured


def unreadable(options: CalibrateOptions) -> str:
    with pytest.raises(OptionError) as caught:
        calibrate(options)
    return str(caught.value)


def test_paths_are_checked_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sparsepass.measure.testbed.load", lambda *given, **options: pytest.fail("the model was loaded")
    )
    (tmp_path / "file").write_text("")
    assert "--out: " in unreadable(CalibrateOptions(out=tmp_path))
    assert "--report: " in unreadable(CalibrateOptions(report=tmp_path / "file" / "report.html"))
    assert "accepted suffixes: .png" in unreadable(CalibrateOptions(plot=tmp_path / "plot.gif"))
    assert "--documents: " in unreadable(CalibrateOptions(documents=tmp_path / "none.jsonl"))
    assert "is given for --out, too" in unreadable(CalibrateOptions(out=tmp_path / "a", details=tmp_path / "." / "a"))
    assert "folder" in unreadable(CalibrateOptions(log=(tmp_path,)))
    assert "none.jsonl" in unreadable(CalibrateOptions(log=(tmp_path / "log.jsonl", tmp_path / "none.jsonl")))
    assert os.listdir(tmp_path) == ["file"]  # trials are removed


def test_paths_that_are_fine_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text("former")
    check_asked(CalibrateOptions(out=tmp_path / "policy.json", report=tmp_path / "new" / "report.html"))
    assert (tmp_path / "policy.json").read_text() == "former"
    assert os.listdir(tmp_path / "new") == []


def test_every_path_of_a_command_says_what_it_is_for() -> None:
    from dataclasses import fields

    from sparsepass.measure.auto.command import COMMANDS as AUTO
    from sparsepass.measure.bench.commands import COMMANDS as BENCH
    from sparsepass.measure.calibrate.command import COMMAND as CALIBRATE
    from sparsepass.measure.calibrate.evaluate_command import COMMAND as EVALUATE
    from sparsepass.measure.coverage.run import COMMAND as COVERAGE
    from sparsepass.measure.tune.run import COMMAND as TUNE

    elsewhere = {"log", "model"}  # by check_asked, and by loading, which comes first
    for command in (*AUTO, *BENCH, CALIBRATE, EVALUATE, COVERAGE, TUNE):
        for one in fields(command.options):
            if "Path" in str(one.type) and one.name not in elsewhere:
                assert one.metadata["use"], f"{command.name} --{one.name}"
        check_paths(command.options())


# Numbers, names and rules of any size


def test_numbers_of_the_command_line() -> None:
    assert [whole_number(text) for text in ("4096", "4K", "4k", "1M", "-5", " 7 ")] == [
        4096,
        4096,
        4096,
        1 << 20,
        -5,
        7,
    ]
    for text in ("", "K", "1.5K", "1G", "0x10", "9" * 19, "9" * 5000, "\u0663", "x" * 1_000_000):
        with pytest.raises(OptionError, match=r"no number") as caught:
            whole_number(text)
        assert len(str(caught.value)) < 400


def test_what_was_given_is_shown_short() -> None:
    for value in ("x" * 1_000_000, b"x" * 1_000_000, 10**5000, [10**5000] * 1000, {"a": ["b" * 10**6]}):
        assert len(shown(value)) <= 170


def test_a_value_that_cannot_be_shown() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ZeroDivisionError

    assert "Broken" in shown(Broken())


def test_a_long_name_is_near_none() -> None:
    assert close_names("x" * 1_000_000, ["single_qa"]) == "Known: 'single_qa'."
    with pytest.raises(SparsepassError) as caught:
        resolve_hint("x" * 1_000_000)
    assert len(str(caught.value)) < 500
    assert len(str(OptionError("x" * 1_000_000))) <= LONGEST
    assert str(OptionError("short")) == "short"


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), True, "1", None, [1]], ids=repr)
@pytest.mark.parametrize("name", ["density", "last", "block", "self_similarity"])
def test_parameters_of_any_size_and_type(name: str, value: object) -> None:
    if value is None and name in ("block", "self_similarity"):
        pytest.skip("means the default")
    if value is True and name == "self_similarity":
        pytest.skip("tested as a number elsewhere")
    with pytest.raises(PolicyError) as caught:
        Rule(None, Budget("pooled_topk", {"density": 0.1, name: value}))
    assert len(str(caught.value)) < 300


def test_twenty_thousand_pieces_of_layers() -> None:
    """Linear in the pieces: by comparing each with each, this takes minutes."""
    even = Ranges(tuple((2 * place, 2 * place) for place in range(20_000)))
    odd = Ranges(tuple((3 * place, 3 * place) for place in range(20_000)))
    sparse, denser = (Budget("pooled_topk", {"density": density}) for density in (0.1, 0.3))
    policy = Policy(rules=(Rule(None, sparse), Rule(None, denser, layers=even, heads=odd)))
    bucket = policy.bucket(9000)
    assert policy.budget(TaskClass.SINGLE_QA, bucket) == denser
    assert policy.budget(TaskClass.SINGLE_QA, bucket, 7) == sparse
    assert policy.budget(TaskClass.SINGLE_QA, bucket, 38_000, 3) == denser
    assert policy.budget(TaskClass.SINGLE_QA, bucket, None, 4) == sparse
    assert policy.budget(TaskClass.SINGLE_QA, bucket, None, 6) == denser
    assert Ranges.parse(str(even)) == even


def test_a_range_of_ten_to_the_eighteenth() -> None:
    wide = Ranges.parse(f"5-{10**18}")
    assert 5 in wide
    assert 10**18 in wide
    assert 4 not in wide
    assert 10**18 + 1 not in wide
    policy = Policy(rules=(Rule(None, Budget("pooled_topk", {"density": 0.1}), layers=wide),))
    assert policy.budget(TaskClass.SINGLE_QA, policy.bucket(9000)) == DENSE
    with pytest.raises(PolicyError, match="no layer or head"):
        Ranges.parse("9" * 5000)


# The log of a calibration

CONDITIONS = {"weights": "w"}
KEY = ("task", 1024, 0, "dense")


def written(path: Path) -> bytes:
    log = Log(path, CONDITIONS)
    log.put(KEY, Outcome((1.0, 0.0), 0.5))
    log.put(("other", 1024, 0, "dense"), Outcome((1.0,), 0.25))
    log.close()
    return path.read_bytes()


def test_a_cut_last_line_is_left_out_with_a_message(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    path.write_bytes(whole[:-5])
    with pytest.warns(RuntimeWarning, match="last line was cut off"):
        log = Log(path, CONDITIONS)
    assert len(log) == 1
    log.put(("other", 1024, 0, "dense"), Outcome((1.0,), 0.25))
    log.close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "1",
        '{"task": "t"}',
        '{"task": "t", "length": true, "seed": 0, "budget": "dense", "scores": [1], "density": 0.5}',
        '{"task": "t", "length": 1024, "seed": 0, "budget": "dense", "scores": ["1"], "density": 0.5}',
        '{"task": "t", "length": 1024, "seed": 0, "budget": "dense", "scores": [1], "density": NaN}',
        '{"task": "t", "length": 1024, "seed": 0, "budget": "dense", "scores": [2], "density": 0.5}',
        "x" * 100_000,
    ],
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    path.write_bytes(whole + line.encode() + b"\n")
    with pytest.raises(OptionError, match="line 4") as caught:
        Log(path, CONDITIONS)
    assert len(str(caught.value)) < 500
    assert path.read_bytes().startswith(whole)


def test_a_line_separator_in_a_text_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(written(path).replace(b'"task": "other"', '"task": "a\u2028b\x85c"'.encode()))
    log = Log(path, CONDITIONS)
    assert log.get(("a\u2028b\x85c", 1024, 0, "dense")) == Outcome((1.0,), 0.25)
    log.close()


@pytest.mark.parametrize("content", ["a note of one line", "two\nlines\n", '{"format": "other"}\n'])
@pytest.mark.parametrize("again", [False, True])
def test_what_is_no_log_is_not_written_over(content: str, again: bool, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(OptionError, match=r"is no log of a calibration|not JSON"):
        Log(path, CONDITIONS, again=again)
    assert path.read_text() == content


def test_again_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    written(path)
    log = Log(path, {"weights": "others"}, again=True)
    log.close()
    assert len(log) == 0
    assert len(path.read_text().splitlines()) == 1


def test_a_full_disk_leaves_whole_lines_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = written(path)
    log = Log(path, CONDITIONS)
    with full_after(len(whole) + 40), pytest.raises(OptionError, match="cannot be written"):
        log.put(("third", 1024, 0, "dense"), Outcome((1.0,) * 100, 0.5))
    assert path.read_bytes() == whole
    log.put(KEY, Outcome((1.0, 0.0), 0.5))
    log.close()
    assert len(path.read_text().splitlines()) == 4


def test_numbers_of_json() -> None:
    assert parse_json('[1, -2.5, 1e300, 18446744073709551615, "\u00e9"]', "x", OptionError)[3] == 2**64 - 1
    for text in ("1e999", "-1e999", "NaN", "Infinity", "9" * 21, "9" * 400, "9" * 5000, "[" * 100_000, "", " \n"):
        with pytest.raises(OptionError) as caught:
            parse_json(text, "x", OptionError)
        assert len(str(caught.value)) < 300


def test_a_policy_is_named_by_no_path_with_a_null_byte() -> None:
    for path in ("a\0b", "\ud800", "x" * 100_000):
        with pytest.raises(PolicyError, match="cannot be read") as caught:
            resolve_policy(path)
        assert len(str(caught.value)) < 500


def test_ranges_that_touch_are_one() -> None:
    assert Ranges.parse("4-7,0-3") == Ranges.parse("0-7")
    assert str(Ranges.parse("0,1,2,5-9,3-")) == "0-"
    assert str(Ranges.parse("0-9,2-3")) == "0-9"


def test_a_rule_keeps_its_budget_in_the_canonical_form() -> None:
    spelled = Budget("pooled_topk", {"density": 0.1, "last": 0, "block": None})
    assert Rule(None, spelled).budget == Budget("pooled_topk", {"density": 0.1})
    assert (
        Policy(rules=(Rule(None, spelled),)).fingerprint
        == Policy(rules=(Rule(None, Budget("pooled_topk", {"density": 0.1})),)).fingerprint
    )
