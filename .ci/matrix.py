"""The fast tests over the supported versions of torch and Python, each in an environment of its own.

    make matrix                       # everything that can be had here; run it again to go on
    make matrix ARGS="--only 2.14"    # rows whose name holds 2.14

A row whose environment is there and whose tests ran on the present tree is not run again (``--fresh`` does). A missing
interpreter or version is a row that says so. Exits with 1 if tests failed. One environment takes 1 to 7 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    torch: str
    triton: str
    """The one that this torch is released with."""
    python: str

    @property
    def name(self) -> str:
        return f"torch-{self.torch}-python-{self.python}"


ROWS = (
    Row("2.11.0", "3.6.0", "3.11"),
    Row("2.12.1", "3.7.0", "3.11"),
    *(Row("2.13.0", "3.7.1", python) for python in ("3.11", "3.12", "3.13")),
    *(Row("2.14.1", "3.8.0", python) for python in ("3.11", "3.12", "3.13", "3.14")),
)


def interpreter(version: str, given: list[str]) -> str | None:
    """A Python of this version: one of those given, or by its name; None if there is none that starts."""
    for candidate in (*given, f"python{version}"):
        path = shutil.which(candidate)
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        if path and subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return path
    return None


def constraints(row: Row) -> str:
    """The tests' constraints with this row's torch and Triton."""
    text = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "triton"):
        text, found = re.subn(rf"(?m)^{name}==.*$", f"{name}=={getattr(row, name)}", text)
        assert found == 1, f"constraints.txt has {found} lines for {name}"
    return text


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def tree() -> str:
    """A digest of every file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    files = sorted(ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name)
    return digest(*(part for file in files if file.is_file() for part in (bytes(file), file.read_bytes())))


def prepare(row: Row, home: Path, given: list[str]) -> str | None:
    """Makes the row's environment, if it is not there yet; what stood in the way, or None."""
    wanted = constraints(row)
    stamp, key = home / "ready", digest(wanted.encode(), (ROOT / "pyproject.toml").read_bytes())
    if stamp.is_file() and stamp.read_text() == key:
        return None
    python = interpreter(row.python, given)
    if python is None:
        return f"no python{row.python}"
    home.mkdir(parents=True, exist_ok=True)
    (home / "constraints.txt").write_text(wanted)
    install = [str(home / "venv/bin/python"), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    for step in (
        [python, "-m", "venv", str(home / "venv")],
        [*install, "-c", "constraints.txt", "-e", f"{ROOT}[test]"],
    ):
        with (home / "install.log").open("a") as log:
            if subprocess.run(step, cwd=home, stdout=log, stderr=subprocess.STDOUT).returncode:
                return f"not installed: see {home / 'install.log'}"
    stamp.write_text(key)
    return None


def run_tests(home: Path, workers: int) -> dict[str, Any]:
    """Runs the fast tests; caches of compiled code are the environment's own."""
    report = home / "report.xml"
    report.unlink(missing_ok=True)
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SPARSEPASS_CACHE_DIR")
    environment = {**os.environ, **{name: str(home / name.lower()) for name in caches}}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [str(home / "venv/bin/python"), "-m", "pytest", "-q", "-m", "not slow", "-n", str(workers)]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    began = time.monotonic()
    with (home / "tests.log").open("w") as log:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    return {**outcome(report, status, home / "tests.log"), "seconds": round(time.monotonic() - began)}


def outcome(report: Path, status: int, log: Path) -> dict[str, Any]:
    """Counts and the names of what failed, off pytest's report."""
    if not report.is_file():
        return {"result": f"pytest ended with {status}: see {log}", "failed": [str(log)]}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [f"{one.get('classname')}::{one.get('name')}" for one in cases if _has(one, "failure", "error")]
    skipped = sum(_has(one, "skipped") for one in cases)
    if status and not failed:
        failed = [f"pytest ended with {status}: see {log}"]
    return {
        "result": f"{len(cases) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped",
        "failed": failed,
    }


def _has(case: ET.Element, *tags: str) -> bool:
    return any(case.find(tag) is not None for tag in tags)


def measured(row: Row, home: Path, args: argparse.Namespace, of: str) -> dict[str, Any]:
    """The row's outcome: a former one of the same tree, or a new one."""
    file = home / "outcome.json"
    missing = prepare(row, home, args.pythons)
    if missing:
        return {"result": missing, "failed": []}
    if file.is_file() and not args.fresh:
        former: dict[str, Any] = json.loads(file.read_text())
        if former["tree"] == of:
            return former
    made = {"tree": of, **run_tests(home, args.workers)}
    file.write_text(json.dumps(made))
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--home", type=Path, default=ROOT / ".matrix", help="where the environments are kept")
    parser.add_argument("--pythons", nargs="*", default=[], help="interpreters beside those on PATH")
    parser.add_argument("--workers", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="run the tests again where nothing has changed")
    args = parser.parse_args(argv)
    of, outcomes = tree(), {}
    for row in ROWS:
        if args.only in row.name:
            print(f"{row.name} ...", file=sys.stderr, flush=True)
            outcomes[row] = measured(row, args.home.resolve() / row.name, args, of)
    print("| torch | triton | python | fast tests | seconds |\n|---|---|---|---|---|")
    for row, one in outcomes.items():
        print(f"| {row.torch} | {row.triton} | {row.python} | {one['result']} | {one.get('seconds', '-')} |")
    failed = [f"{row.name}: {name}" for row, one in outcomes.items() for name in one["failed"]]
    print("\n".join(failed), end="\n" if failed else "")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
