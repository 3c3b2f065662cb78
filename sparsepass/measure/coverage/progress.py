"""How far a sweep is: a bar on a terminal, a line for each measurement elsewhere, with the time that is left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """Lines on stderr."""

    def __init__(self, total: int) -> None:
        self.total, self.count = total, 0
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def done(self, line: str, alarming: bool) -> None:
        """One measurement is through; ``line`` says what came of it."""
        self.count += 1
        gone = time.monotonic() - self._began
        left = gone / self.count * (self.total - self.count)
        print(f"[{self.count}/{self.total} {_clock(gone)}, left {_clock(left)}] {line}", file=sys.stderr, flush=True)


class Quiet(Progress):
    """Says what is alarming, and nothing else."""

    def done(self, line: str, alarming: bool) -> None:
        if alarming:
            print(line, file=sys.stderr, flush=True)


class Bar(Progress):
    """A bar with the time that is left; above it what is alarming."""

    def __init__(self, total: int, rich: Any) -> None:
        super().__init__(total)
        from rich.console import Console

        self._bar = rich.Progress(
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def done(self, line: str, alarming: bool) -> None:
        if alarming:
            self._bar.console.print(line, markup=False)
        self._bar.update(self._task, advance=1, description=line.partition(":")[0])


def progress(total: int, quiet: bool = False) -> Progress:
    """The best that stderr takes for so many measurements."""
    if quiet:
        return Quiet(total)
    if not sys.stderr.isatty():
        return Progress(total)
    try:
        from rich import progress as rich
    except ImportError:
        return Progress(total)
    return Bar(total, rich)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
