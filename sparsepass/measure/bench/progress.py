"""A progress bar on stderr: rich's where it is installed, lines of text elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any


class Reporter:
    """Says on stderr what is being measured, one line per problem."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def problem(self, title: str) -> None:
        """The next problem begins."""
        self.done += 1
        print(f"[{self.done}/{self.total}] {title}", file=sys.stderr, flush=True)

    def steps(self, what: str, count: int) -> None:
        """What is done with the problem now, in so many steps."""

    def advance(self) -> None:
        """One step is done."""

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class RichReporter(Reporter):
    """Two bars: problems, and the steps of the current one."""

    def __init__(self, total: int, rich: Any) -> None:
        super().__init__(total)
        from rich.console import Console

        self._bars = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._problems = self._bars.add_task("problems", total=total)
        self._steps = self._bars.add_task("", total=None, visible=False)
        self._title = ""

    def __enter__(self) -> Reporter:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def problem(self, title: str) -> None:
        self._bars.update(self._problems, completed=self.done)
        self.done += 1
        self._title = title

    def steps(self, what: str, count: int) -> None:
        self._bars.reset(self._steps, total=count, description=f"{self._title}: {what}", visible=True)

    def advance(self) -> None:
        self._bars.advance(self._steps)

    def say(self, line: str) -> None:
        self._bars.console.print(line, markup=False)


def reporter(total: int, quiet: bool = False) -> Reporter:
    """The best reporter that this machine has for so many problems."""
    if quiet or not sys.stderr.isatty():
        return Reporter(total) if not quiet else Silent(total)
    try:
        from rich import progress
    except ImportError:
        return Reporter(total)
    return RichReporter(total, progress)


class Silent(Reporter):
    """Says nothing but what went wrong."""

    def problem(self, title: str) -> None:
        self.done += 1
