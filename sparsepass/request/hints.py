"""Task hints: what kind of request this is, said by the user around the call.

The axes are those of The Sparse Frontier (arXiv 2504.17768): *scope*, how many distinct facts the answer needs, and
*dispersion*, how hard they are to find and how far apart they lie. No hint means the hardest class, never the easiest.

In eager code the hint is kept in a ContextVar, so threads and asyncio tasks each have their own. Inside a compiled
region a ContextVar cannot be set: there ``task`` annotates the traced nodes instead (``NODE_KEY``).

A batch of different requests has a hint per row: a sequence of hints, in force as a tuple of classes (``Rows``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from sparsepass.errors import HintError, close_names, shown
from sparsepass.types import Rows, TaskClass

NODE_KEY = "sparsepass_task"
"""A hint given inside a compiled region is ``node.meta["custom"][NODE_KEY]``: its text, as ``hint_text`` writes it."""

AUTO = "auto"
"""Not a class: the request is read, by a model that ``sparsepass.measure.auto.attach`` prepared."""

Level = Literal["low", "high"]
_Fn = TypeVar("_Fn", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class TaskHint:
    """A request described by its two axes, for those whose task has no name here.

    ``queries`` counts the independent questions asked at once. Raises ``HintError`` for anything else.
    """

    scope: Level
    dispersion: Level
    queries: int = 1

    def __post_init__(self) -> None:
        for name, level in (("scope", self.scope), ("dispersion", self.dispersion)):
            if level not in ("low", "high"):
                raise HintError(f"TaskHint {name} is {shown(level)}; accepted are 'low' and 'high'.")
        if not isinstance(self.queries, int) or isinstance(self.queries, bool) or self.queries < 1:
            raise HintError(f"TaskHint queries is {shown(self.queries)}; accepted is an integer of 1 or more.")

    @property
    def task_class(self) -> TaskClass:
        """Low/low is ``single_qa``, with more queries ``multi_qa``; one high axis is ``multi_hop`` or ``aggregation``.

        Both high is in none of the measured classes, so it gets what no hint gets: the hardest, ``unknown``.
        """
        if self.scope == "high":
            return TaskClass.UNKNOWN if self.dispersion == "high" else TaskClass.AGGREGATION
        if self.dispersion == "high":
            return TaskClass.MULTI_HOP
        return TaskClass.SINGLE_QA if self.queries == 1 else TaskClass.MULTI_QA


Hint = str | TaskHint | TaskClass | None
"""What a user may give as a hint for one request."""

Hints = Hint | Sequence[Hint]
"""What a user may give for a batch: one hint for all of it, or one per row."""

_BY_NAME = {str(member): member for member in TaskClass}


def resolve_hint(hint: Hint) -> TaskClass:
    """The task class that a hint names; ``None`` is ``UNKNOWN``. Raises ``HintError`` naming the close spellings."""
    if hint is None:
        return TaskClass.UNKNOWN
    if isinstance(hint, TaskHint):
        return hint.task_class
    if isinstance(hint, str):  # TaskClass is a str too
        found = _BY_NAME.get(str(hint))
        if found is None and str(hint) == AUTO:
            raise HintError(
                "The hint 'auto' is read by sparsepass.task alone, for the whole batch: with task(\"auto\"). "
                "It decides row by row."
            )
        if found is None:
            raise HintError(f"Unknown task hint {shown(str(hint))}. {close_names(str(hint), _BY_NAME)}")
        return found
    raise HintError(
        f"A task hint is a {type(hint).__name__}: {shown(hint)}; accepted are a name, a TaskHint, a TaskClass or None. "
        f"{close_names(str(hint), _BY_NAME)}"
    )


def resolve_hints(hint: Hints) -> TaskClass | Rows:
    """The class of a hint, or the class of each row of a list of hints. Raises ``HintError`` naming the row."""
    if not isinstance(hint, list | tuple) and (isinstance(hint, str | TaskHint) or not isinstance(hint, Sequence)):
        return resolve_hint(hint)  # type: ignore[arg-type]  # which refuses whatever else is given
    if len(hint) == 0:
        raise HintError("A list of task hints is empty; accepted is one hint per row of the batch, or a single hint.")
    rows = []
    for row, one in enumerate(hint):
        try:
            rows.append(resolve_hint(one))
        except HintError as error:
            raise HintError(f"Row {row} of the task hints: {error}") from None
    return tuple(rows)


def hint_text(resolved: TaskClass | Rows) -> str:
    """A resolved hint as one text: the class's name, or for a list each row's, followed by a comma."""
    return "".join(f"{row}," for row in resolved) if isinstance(resolved, tuple) else str(resolved)


def hint_words(resolved: TaskClass | Rows) -> str:
    """A resolved hint for people: ``single_qa``, or ``multi_hop, 2x single_qa`` for rows, whatever their order."""
    if not isinstance(resolved, tuple):
        return str(resolved)
    counts = sorted((str(task), resolved.count(task)) for task in set(resolved))
    return ", ".join(task if count == 1 else f"{count}x {task}" for task, count in counts)


def parse_hint_text(text: str) -> TaskClass | Rows:
    """The resolved hint that ``hint_text`` wrote."""
    return tuple(map(TaskClass, text[:-1].split(","))) if text.endswith(",") else TaskClass(text)


def alike(resolved: TaskClass | Rows) -> TaskClass | None:
    """The one class of a hint, also of a list whose rows are all of one class; None where classes differ."""
    if not isinstance(resolved, tuple):
        return resolved
    return resolved[0] if len(set(resolved)) == 1 else None


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """One entered hint and those around it. Frames are immutable, so a context that was copied keeps its own."""

    hint: TaskClass | Rows
    """Under ``auto``: the least cautious hint that it may decide for, the hardest class if none was given."""
    outer: _Frame | None
    scope: object
    auto: bool = False
    bounded: bool = True
    """Under ``auto``: whether a hint was given beside it."""


_current: ContextVar[_Frame | None] = ContextVar("sparsepass_task", default=None)


def current_task() -> TaskClass | Rows:
    """The hint in force in this thread or asyncio task: its class, or the class of each row where it is a list.

    A hint given inside a compiled region does not show here.
    """
    frame = _current.get()
    return TaskClass.UNKNOWN if frame is None else frame.hint


def current_hint() -> TaskClass | Rows | None:
    """As ``current_task``, but ``None`` where no hint is in force: a region's own default may then hold."""
    frame = _current.get()
    return None if frame is None else frame.hint


@dataclass(frozen=True, slots=True)
class Auto:
    """``auto`` in force. ``at_most``: the hint that bounds it; None where none was given."""

    at_most: TaskClass | Rows | None


def current_auto() -> Auto | None:
    """What bounds ``task("auto")``, where that is the innermost hint in force; else None."""
    frame = _current.get()
    if frame is None or not frame.auto:
        return None
    return Auto(frame.hint if frame.bounded else None)


class TaskScope(Protocol):
    """What ``task`` returns: a context manager and a decorator."""

    def __enter__(self) -> object: ...
    def __exit__(self, *exc: Any) -> bool | None: ...
    def __call__(self, fn: _Fn, /) -> _Fn: ...


class _EagerScope:
    """Holds a hint over a block. It stores nothing itself, so one object serves many threads, tasks and nestings."""

    def __init__(self, hint: TaskClass | Rows) -> None:
        self.hint = hint

    def __enter__(self) -> TaskClass | Rows:
        _current.set(_Frame(self.hint, _current.get(), self))
        return self.hint

    def __exit__(self, *exc: Any) -> None:
        # Not a token: it would have to be stored here, shared by all contexts. The walk skips hints that a suspended
        # generator left behind.
        frame = _current.get()
        while frame is not None and frame.scope is not self:
            frame = frame.outer
        if frame is not None:
            _current.set(frame.outer)

    def __call__(self, fn: _Fn, /) -> _Fn:
        return _decorate(fn, self.hint)

    def __repr__(self) -> str:
        return f"sparsepass.task({_given(self.hint)!r})"


class _TracedScope(_EagerScope):
    """Holds a hint over a block of code that is traced as it runs, and annotates the nodes traced in it."""

    def __init__(self, hint: TaskClass | Rows) -> None:
        super().__init__(hint)
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> TaskClass | Rows:
        from sparsepass.graph import torch_private

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch_private.annotated({NODE_KEY: hint_text(self.hint)}))
            hint = super().__enter__()
            self._entered.append(stack.pop_all())
        return hint

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._entered.pop().close()


class _AutoScope(_EagerScope):
    """Holds ``auto`` over a block, bounded by ``at_most`` or else by the hint around it."""

    def __init__(self, at_most: TaskClass | Rows | None) -> None:
        super().__init__(TaskClass.UNKNOWN if at_most is None else at_most)
        self.bounded = at_most is not None

    def __enter__(self) -> TaskClass | Rows:
        outer = _current.get()
        around = outer is not None and outer.bounded and not self.bounded
        hint = outer.hint if outer is not None and around else self.hint
        _current.set(_Frame(hint, outer, self, auto=True, bounded=self.bounded or around))
        return hint

    def __call__(self, fn: _Fn, /) -> _Fn:
        if inspect.isclass(fn) or not callable(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise HintError(
                f"{self!r} decorates functions and coroutine functions, and was given {fn!r}; enter it inside, around "
                "the call of the model."
            )
        wrapper: Any
        if inspect.iscoroutinefunction(fn):

            async def held_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await fn(*args, **kwargs)

            wrapper = held_coroutine
        else:

            def held(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return fn(*args, **kwargs)

            wrapper = held
        wrapped: Any = functools.wraps(fn)(wrapper)
        return wrapped  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"sparsepass.task({AUTO!r}" + (f", at_most={_given(self.hint)!r})" if self.bounded else ")")


def task(hint: Hints, *, at_most: Hints = None) -> TaskScope:
    """Say what the request is: ``with task("single_qa"): ...`` or ``@task("single_qa")``.

    ``hint`` is a class name (``single_qa``, ``multi_qa``, ``multi_hop``, ``aggregation``, ``dense``, ``unknown``), a
    ``TaskHint``, a ``TaskClass``, or ``None`` for the hardest class. A list or tuple of these is one hint per row of
    the batch; a batch of another size is then a ``HintError`` when the model is called. The inner of two nested hints
    counts.

    ``"auto"`` reads the request: a model prepared by ``sparsepass.measure.auto.attach`` tries a cheap prefill and
    repeats a denser one where that fell short. A hint around it, or ``at_most``, bounds it: it then begins with that
    hint's budgets, never with sparser ones. On any other model it means no more than the hint that bounds it, or no
    hint; a sparse graph then warns once.

    As a decorator it takes functions, coroutine functions and (asynchronous) generator functions; the hint
    holds while the function's own code runs, not while its caller handles a yielded value. Raises ``HintError`` right
    here.

    Inside a compiled region it takes effect on the attention traced within the ``with`` block, and overrules the
    caller's hint there. Write the call in the ``with`` statement itself: Dynamo cannot enter an object made outside.
    A function with a graph break inside such a block runs eagerly as a whole, the functions it calls still compiled.
    """
    import torch  # not at import: hints are read by tools that run no model

    auto = isinstance(hint, str) and str(hint) == AUTO
    if at_most is not None and not auto:
        raise HintError(f"at_most={shown(at_most)} is given beside the hint {shown(hint)}; it bounds 'auto' alone.")
    if torch.compiler.is_dynamo_compiling():  # folded while Dynamo reads this code, whatever other threads do
        if auto:
            raise HintError(_AUTO_TRACED)
        traced: Any = torch.fx.traceback.annotate({NODE_KEY: hint_text(resolve_hints(hint))})
        return traced  # type: ignore[no-any-return]
    if auto:
        if being_traced():
            raise HintError(_AUTO_TRACED)
        return _AutoScope(None if at_most is None else resolve_hints(at_most))
    return _TracedScope(resolve_hints(hint)) if being_traced() else _EagerScope(resolve_hints(hint))


_AUTO_TRACED = "The hint 'auto' is given inside a compiled region; enter it around the call of the model."


def being_traced() -> bool:
    """Whether the code that asks is being traced: by Dynamo, or as it runs (``torch.export``, ``make_fx``).

    Not ``torch.compiler.is_compiling()``, which is true in every thread while one of them compiles.
    """
    import torch

    if torch.compiler.is_dynamo_compiling():
        return True
    from sparsepass.graph import torch_private

    return torch_private.traced_by_running()


def _given(resolved: TaskClass | Rows) -> str | list[str]:
    """What ``task`` takes for a resolved hint, of plain strings: what Dynamo traces best."""
    return [str(row) for row in resolved] if isinstance(resolved, tuple) else str(resolved)


def _decorate(fn: _Fn, hint: TaskClass | Rows) -> _Fn:
    """Wrap ``fn`` by its kind. Wrappers enter ``task`` anew at each call, since a call may be traced or not."""
    if inspect.isclass(fn) or not callable(fn):
        raise HintError(
            f"sparsepass.task({_given(hint)!r}) decorates functions and methods, and was given {fn!r}; "
            "decorate the method that runs the model, for instance forward."
        )
    given = _given(hint)
    body: Any = fn if inspect.isroutine(fn) else getattr(fn, "__call__", fn)  # noqa: B004 - the method is wanted
    wrapper: Any
    if inspect.isasyncgenfunction(fn) or inspect.isasyncgenfunction(body):

        async def held_async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            steps = _Steps(hint)
            source = fn(*args, **kwargs)
            step, value = source.asend, None
            try:
                while True:
                    with steps:
                        try:
                            out = await step(value)
                        except StopAsyncIteration:
                            return
                    try:
                        step, value = source.asend, (yield out)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        step, value = source.athrow, error
            finally:
                with steps:
                    await source.aclose()

        wrapper = held_async_generator
    elif inspect.isgeneratorfunction(fn) or inspect.isgeneratorfunction(body):

        def held_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            steps = _Steps(hint)
            source = fn(*args, **kwargs)
            step, value = source.send, None
            try:
                while True:
                    with steps:
                        try:
                            out = step(value)
                        except StopIteration as stop:
                            return stop.value
                    try:
                        step, value = source.send, (yield out)
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        step, value = source.throw, error
            finally:
                with steps:
                    source.close()

        wrapper = held_generator
    elif inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(body):

        async def held_coroutine(*args: Any, **kwargs: Any) -> Any:
            with task(given):
                return await fn(*args, **kwargs)

        wrapper = held_coroutine
    else:

        def held(*args: Any, **kwargs: Any) -> Any:
            with task(given):
                return fn(*args, **kwargs)

        wrapper = held
    wrapped: Any = functools.wraps(fn)(wrapper)
    return wrapped  # type: ignore[no-any-return]


class _Steps:
    """Holds the hint over each step of one generator: never over its consumer, and hints that the generator itself
    entered around a ``yield`` are there again at the next step."""

    def __init__(self, hint: TaskClass | Rows) -> None:
        self.inner: _Frame | None = _Frame(hint, None, self)
        self.outer: _Frame | None = None

    def __enter__(self) -> None:
        self.outer = _current.get()
        _current.set(self.inner)

    def __exit__(self, *exc: Any) -> None:
        self.inner = _current.get()
        _current.set(self.outer)
