"""Compiles ahead: one run per length and hint, so that no request waits for a compilation."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparsepass.errors import SparsepassError
from sparsepass.host.environment import device_of

if TYPE_CHECKING:
    from rich.progress import Progress

    from sparsepass.request.hints import Hint, Hints

log = logging.getLogger("sparsepass")


class WarmupError(SparsepassError, RuntimeError):
    """A model that cannot be warmed up; the message says why and what to do."""


@dataclass(frozen=True)
class WarmupResult:
    """One run of the model."""

    length: int
    """Tokens."""
    hint: Hint | tuple[Hint, ...]
    """As given; ``None`` is a request without a hint, a tuple has one per row."""
    seconds: float
    """Wall time of the run, compilation included."""
    graphs: int
    """Graphs that sparsepass compiled during the run; 0 when an earlier one already serves it."""


def warmup(
    model: Callable[..., object],
    lengths: Iterable[int],
    hints: Iterable[Hints] | str | None = None,
    *,
    batch: int = 1,
    make_inputs: Callable[[int], Mapping[str, Any]] | None = None,
    dynamic: bool = True,
    progress: bool = True,
) -> list[WarmupResult]:
    """Runs a compiled model once per hint and length under ``torch.no_grad()``, so that its graphs are compiled.

    Give one length per bucket that requests fall into. The longest goes first: it reserves the accelerator's memory
    in one piece, and if it does not fit, that shows at once. Hints are the outer loop, since Dynamo remembers which
    sizes vary: only the first run could otherwise be compiled for its exact length.

    Args:
        model: compiled with sparsepass: ``model.compile(backend="sparsepass")`` or the like.
        lengths: in tokens.
        hints: task hints; ``None`` among them, or alone, is a request without a hint (the default). A list or tuple
            among them is a mixed batch, one hint per row; its graph serves other arrangements and mixes that need no
            higher cap.
        batch: rows of the default inputs. Dynamo specializes on 1: warm up a batched service with its batch size.
            For a list of hints the default inputs have as many rows as it has hints.
        make_inputs: keyword arguments of the model for a length. By default, for transformers models: random
            ``input_ids`` int64 [batch, length] on the model's device, ``use_cache=False``, ``logits_to_keep=1``.
        dynamic: mark the dimensions that equal the length as varying, in the inputs and in what layers compiled one by
            one are called with, so that each graph serves its whole bucket. ``False`` leaves it to Dynamo, which
            compiles the first length for that exact length alone.
        progress: show a progress bar (only on a terminal).

    Returns:
        One result per run, in the order of the runs.

    Raises:
        WarmupError: no or bad lengths, default inputs asked of something that is no transformers model, or sparsepass
            compiled nothing at all.
        HintError: an unknown hint.
    """
    import torch

    from sparsepass.graph import torch_private
    from sparsepass.graph.marked import mark_lengths, parts_marked
    from sparsepass.host import compile_time
    from sparsepass.request import hints as task_hints

    ordered = _lengths(lengths)
    wanted = _hints(hints)
    for hint in wanted:
        task_hints.resolve_hints(hint)  # a misspelled one must not show only after minutes of compiling
        if isinstance(hint, tuple) and make_inputs is None and batch not in (1, len(hint)):
            raise WarmupError(f"A list of {len(hint)} task hints for batch={batch}; accepted is one hint per row.")
    make = _default_inputs(model) if make_inputs is None else _only_length(make_inputs)
    results: list[WarmupResult] = []
    with _bar(progress) as bar, torch.no_grad(), compile_time.expected():
        task_id = bar.add_task("warming up", total=len(ordered) * len(wanted))
        for hint in wanted:
            for length in ordered:
                words = task_hints.hint_words(task_hints.resolve_hints(hint)) if hint else "no hint"
                bar.update(task_id, description=f"{words}, {length} tokens")
                rows = len(hint) if isinstance(hint, tuple) else batch
                inputs = make(length, rows)
                if dynamic:
                    mark_lengths(inputs, length)
                parts = parts_marked(model, length) if dynamic else contextlib.nullcontext()
                before, start = torch_private.compile_count(), time.perf_counter()
                with task_hints.task(hint), parts:
                    model(**inputs)
                    _synchronize()
                seconds = time.perf_counter() - start
                results.append(WarmupResult(length, hint, seconds, torch_private.compile_count() - before))
                log.info("warmup: %s, %d tokens: %.1f s, %d graphs", words, length, seconds, results[-1].graphs)
                bar.advance(task_id)
    _check_compiled(results, torch_private.compile_count())
    return results


def _check_compiled(results: Sequence[WarmupResult], total: int) -> None:
    if total == 0:
        raise WarmupError(
            "warmup ran the model, but sparsepass compiled nothing: this model is not compiled with it. "
            'Call model.compile(backend="sparsepass") first (or pass what torch.compile(model, backend="sparsepass") '
            "returned, not the original model), and see that sparsepass is not turned off by its environment variable."
        )
    if not any(result.graphs for result in results):
        # Another model in this process may have been compiled instead; from here the two cannot be told apart.
        log.warning("warmup compiled no new graph: the model was warm already, or it is not the compiled one")


def _lengths(lengths: Iterable[int]) -> list[int]:
    given = [lengths] if isinstance(lengths, int) else list(lengths)
    if not given:
        raise WarmupError("lengths is empty; give at least one length in tokens, such as [4096, 32768].")
    for length in given:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise WarmupError(f"lengths holds {length!r}; each must be a positive int, a number of tokens.")
    return sorted(set(given), reverse=True)


def _hints(hints: Iterable[Hints] | str | None) -> list[Hint | tuple[Hint, ...]]:
    if hints is None or isinstance(hints, str):
        return [hints]
    given = [tuple(hint) if isinstance(hint, list) else hint for hint in hints]
    return list(dict.fromkeys(given)) or [None]  # type: ignore[arg-type]  # other sequences are refused when resolved


def _only_length(make_inputs: Callable[[int], Mapping[str, Any]]) -> Callable[[int, int], Mapping[str, Any]]:
    return lambda length, rows: make_inputs(length)


def _default_inputs(model: Any) -> Callable[[int, int], Mapping[str, Any]]:
    if not hasattr(model, "config") or not hasattr(model, "parameters"):
        raise WarmupError(
            f"{type(model).__name__} is no transformers model (it has no config), so warmup cannot make its inputs. "
            "Pass make_inputs=lambda length: {...}, the keyword arguments for one call at that length."
        )
    keeps_last = _accepts(model, "logits_to_keep")

    def make(length: int, batch: int) -> dict[str, Any]:
        inputs = random_inputs(model, length=length, batch=batch)
        # Logits of every position would take length x vocabulary, more than the attention at long lengths.
        return inputs | {"logits_to_keep": 1} if keeps_last else inputs

    return make


def _accepts(model: Any, name: str) -> bool:
    """Whether ``forward`` names the argument; a compiled wrapper keeps the original's signature or refers to it."""
    for candidate in (getattr(model, "_orig_mod", model), model):
        try:
            if name in inspect.signature(candidate.forward).parameters:
                return True
        except (AttributeError, TypeError, ValueError):
            continue
    return False


def _synchronize() -> None:
    """Waits for the accelerator, so that its errors and its time belong to the run that caused them."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _bar(show: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not show or not console.is_terminal, transient=True)


Padding = Literal["left", "right", "none"]


def random_inputs(model: Any, *, length: int, batch: int, padding: Padding = "none") -> dict[str, Any]:
    """Inputs for a prefill call: int64 ``input_ids`` [batch, length], and ``attention_mask`` if padded.

    With padding, row ``i`` of ``batch`` has its share of up to a half padded, the first row the most; a batch of one
    is padded by a quarter.
    """
    import torch

    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(int(config.vocab_size), 4), (batch, length), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids.to(device_of(model)), "use_cache": False}
    if padding != "none":
        mask = torch.ones(batch, length, dtype=torch.int64)
        for row in range(batch):
            pad = length // 4 if batch == 1 else length * (batch - row - 1) // (2 * batch)
            mask[row, slice(0, pad) if padding == "left" else slice(length - pad, length)] = 0
        inputs["attention_mask"] = mask.to(device_of(model))
    return inputs
