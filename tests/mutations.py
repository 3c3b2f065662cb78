"""Which one-line mutations of the code the tests notice: ``python tests/mutations.py`` (``make mutations``).

The mutations are in ``mutations.toml``, matched by text. Each is made in a copy of the tree, where the tests that are
named for it run, one file after the other, until one fails. What was run is kept in a file, and gone on with.
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
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")
LEFT_OUT = (".git", ".venv", "build", ".hypothesis", "*_cache", "__pycache__", "*.egg-info", "docs/plots")
KILLED, SURVIVED, LATE = "killed", "survived", "time limit"


class MutationError(Exception):
    """A list of mutations that does not fit the tree, or tests that fail without any."""


@dataclass(frozen=True)
class Mutation:
    """``find`` stands in ``file`` exactly once. ``tests``: what should notice, the quickest first."""

    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256("\0".join((self.file, self.find, self.replace, *self.tests)).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.file}: {self.find.strip()}  ->  {self.replace.strip() or '(nothing)'}"

    def applied(self, text: str) -> str:
        """The mutated text of the file. Raises ``MutationError``."""
        count = text.count(self.find)
        if count != 1:
            raise MutationError(f"{self.file} has {self.find!r} {count} times; a mutation's text stands there once.")
        if self.find == self.replace:
            raise MutationError(f"{self.file}: {self.find!r} is replaced by itself.")
        return text.replace(self.find, self.replace)


def load(file: Path = LIST) -> list[Mutation]:
    """The mutations in a file, checked against the tree. Raises ``MutationError`` naming all that do not fit."""
    found = []
    for group in tomllib.loads(file.read_text(encoding="utf-8"))["group"]:
        tests = tuple(group["tests"])
        found += [Mutation(group["file"], find, replace, tests) for find, replace in group["mutations"]]
    wrong = list(_wrong(found))
    if wrong:
        raise MutationError("\n".join(wrong))
    return found


def _wrong(mutations: Iterable[Mutation]) -> Iterator[str]:
    seen: set[str] = set()
    for one in mutations:
        if one.key in seen:
            yield f"{one} is listed twice."
        seen.add(one.key)
        yield from (f"{one}: {test} is not there." for test in one.tests if not (ROOT / test.split("::")[0]).exists())
        try:
            one.applied((ROOT / one.file).read_text(encoding="utf-8"))
        except (OSError, MutationError) as error:
            yield str(error)


def copy_tree(folder: Path) -> Path:
    """A copy of the tree, links kept as links."""
    copied = folder / "tree"
    shutil.copytree(ROOT, copied, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return copied


@contextmanager
def mutated(tree: Path, one: Mutation) -> Iterator[None]:
    file = tree / one.file
    text = file.read_text(encoding="utf-8")
    file.write_text(one.applied(text), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


def run_tests(tree: Path, test: str, limit: float) -> str:
    """``killed`` if a test fails, ``survived`` if all pass, ``time limit``. Raises ``MutationError`` otherwise."""
    settings = {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # two texts of one size, written in one second, share their bytecode
        "SPARSEPASS_CACHE_DIR": str(tree.parent / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", test]
    try:
        done = subprocess.run(
            command, cwd=tree, env={**os.environ, **settings}, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return LATE
    if done.returncode == 0:
        return SURVIVED
    if done.returncode in (1, 2) or done.returncode < 0:  # a failed test, a module that cannot be imported, a crash
        return KILLED
    raise MutationError(
        f"pytest {test} ends with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
    )


def check_unmutated(tests: Sequence[str], limit: float) -> None:
    """Every test passes where nothing is changed: else it would kill whatever it is asked about."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for test in tests:
            if (outcome := run_tests(tree, test, limit)) != SURVIVED:
                raise MutationError(f"{test} fails without a mutation ({outcome}); mend that first.")
            print(f"  passes unmutated: {test}", flush=True)


def outcomes(mutations: Sequence[Mutation], jobs: int, limit: float) -> Iterator[tuple[Mutation, str, str, float]]:
    """Each mutation with its outcome, the tests that decided, and seconds; as they are done."""
    done: SimpleQueue[tuple[Mutation, str, str, float] | BaseException] = SimpleQueue()
    own = threading.local()

    def ask(one: Mutation) -> None:
        try:
            if not hasattr(own, "tree"):
                own.tree = copy_tree(Path(tempfile.mkdtemp(dir=folder)))
            began, outcome, test = time.monotonic(), SURVIVED, ""
            with mutated(own.tree, one):
                for test in one.tests:
                    if (outcome := run_tests(own.tree, test, limit)) != SURVIVED:
                        break
            done.put((one, outcome, test, time.monotonic() - began))
        except BaseException as error:
            done.put(error)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for one in mutations:
            pool.submit(ask, one)
        for _ in mutations:
            found = done.get()
            if isinstance(found, BaseException):
                pool.shutdown(cancel_futures=True)
                raise found
            yield found


def former(file: Path) -> dict[str, str]:
    """Outcomes of earlier runs by key; a cut last line does not count."""
    if not file.exists():
        return {}
    lines = [line for line in file.read_text(encoding="utf-8").split("\n")[:-1] if line]
    return {one["key"]: one["outcome"] for one in map(json.loads, lines)}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="mutations asked about side by side")
    parser.add_argument("--only", default="", help="regular expression: of these files or texts")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one file of tests")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutations.jsonl", help="gone on with")
    parser.add_argument("--again", action="store_true", help="ask about those that were asked about, too")
    parser.add_argument("--trust", action="store_true", help="do not first run the tests unmutated")
    parser.add_argument("--check", action="store_true", help="only see that every text is there")
    options = parser.parse_args(given)
    try:
        every = [one for one in load() if re.search(options.only, str(one))]
        print(f"{len(every)} mutations in {len({one.file for one in every})} files")
        if options.check:
            return 0
        held = {} if options.again else former(options.out)
        left = [one for one in every if one.key not in held]
        if left and not options.trust:
            check_unmutated(list(dict.fromkeys(test for one in left for test in one.tests)), options.limit)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as stream:
            for one, outcome, test, seconds in outcomes(left, options.jobs, options.limit):
                held[one.key] = outcome
                line = {"key": one.key, "outcome": outcome, "mutation": str(one), "by": test, "s": round(seconds, 1)}
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                print(f"{outcome:10} {seconds:5.0f} s  {one}  [{test}]", flush=True)
    except MutationError as error:
        print(error, file=sys.stderr)
        return 2
    counts = Counter(held[one.key] for one in every)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    for one in every:
        if held[one.key] == SURVIVED:
            print(f"survived: {one}")
    return int(counts[SURVIVED] > 0)


if __name__ == "__main__":
    sys.exit(main())
