"""``task("auto")`` on a model: each prefill is tried cheaply, looked at, and run again where it fell short."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsepass.measure.auto import caches
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.probe import logit_signals, probe
from sparsepass.measure.auto.router import Router
from sparsepass.policies.fingerprint import differences
from sparsepass.request.hints import Auto, being_traced, current_auto, task
from sparsepass.types import Rows, TaskClass

REMEMBERED = 256
"""Decisions that are kept for the user to look at."""


@dataclass(frozen=True)
class Decision:
    """One prefill under ``auto``. ``tried``: what it ran under first; ``again``: rows of the batch that then ran under
    ``then``; ``scores``: the router's log-odds by row, empty where nothing was tried, for the ``reason`` given."""

    length: int
    tried: TaskClass | Rows
    then: TaskClass | None = None
    again: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    reason: str = ""


class Attached:
    """A model that reads requests. ``decisions`` has the latest ones, the newest last."""

    def __init__(self, model: Any, router: Router, run: Callable[..., Any]) -> None:
        self.model = model
        self.router = router
        self.decisions: deque[Decision] = deque(maxlen=REMEMBERED)
        self._run = run
        self._signature = inspect.signature(type(model).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        auto = None if being_traced() else current_auto()
        if auto is None:
            return self._run(*args, **kwargs)
        bound = self._signature.bind(self.model, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        given.pop(next(iter(self._signature.parameters)))
        given.pop("kwargs", None)
        ids = given.get("input_ids")
        if ids is not None and ids.shape[1] == 1 and caches.length_of(given.get("past_key_values")):
            with task(self._otherwise(auto)):  # decode: nothing to decide
                return self._run(**given)
        why_not = self._why_not(given, auto)
        if why_not:
            with task(self._otherwise(auto)):
                out = self._run(**given)
            length = 0 if ids is None else ids.shape[1]
            self.decisions.append(Decision(length, self._otherwise(auto), reason=why_not))
            return out
        return self._prefill(given, auto)

    def _otherwise(self, auto: Auto) -> Any:
        """What a call runs under that is not tried: what auto is bounded by, else the router's denser class."""
        return self.router.then if auto.at_most is None else auto.at_most

    def _why_not(self, given: dict[str, Any], auto: Auto) -> str:
        """A sentence if this prefill cannot be read, else nothing."""
        ids, mask, keep = given.get("input_ids"), given.get("attention_mask"), given.get("logits_to_keep", 0)
        if ids is None:
            return "The call has no input_ids."
        if given.get("labels") is not None or given.get("return_dict") is False:
            return "The call asks for a loss or a tuple."
        if isinstance(keep, torch.Tensor):
            return "The call asks for logits of its own choice of positions."
        if caches.length_of(given.get("past_key_values")):
            return "The call continues a cache."
        if mask is not None and mask.dim() != 2:
            return "The attention mask is not [batch, length]."
        starts = auto.at_most if isinstance(auto.at_most, tuple) else (auto.at_most or self.router.first,)
        if all(start in (self.router.then, TaskClass.DENSE) for start in starts):
            return "The hint beside auto is as dense as auto becomes."
        if not self.router.holds_at(ids.shape[1]):
            return f"The router was calibrated above {self.router.above} up to {self.router.up_to} tokens."
        return ""

    def _prefill(self, given: dict[str, Any], auto: Auto) -> Any:
        """The cheap pass, the look at it, and the denser pass of the rows that need it. Waits for the device once."""
        ids, mask, cache = given["input_ids"], given.get("attention_mask"), given.get("past_key_values")
        kept = caches.keep(cache)
        start = auto.at_most or self.router.first
        wants_cache = bool(given.get("use_cache", True))
        cheap = {**given, "use_cache": True} if self.router.probes else given
        with task(start):
            out = self._run(**cheap)
        logits = out.logits[:, -1]
        with torch.no_grad():
            if self.router.probes:
                caches.check(out.past_key_values)
                signals = probe(self.model, ids, out.past_key_values, logits, self.router.effective_probe, mask)
            else:
                signals = logit_signals(logits)
            score = self.router.score(signals)
        if mask is not None:
            score = score.masked_fill(mask[:, -1] == 0, torch.inf)  # padded on the right: that was not the last token
        scores = tuple(score.tolist())  # the one place that waits for the device
        again = tuple(row for row, one in enumerate(scores) if one >= self.router.threshold)
        if isinstance(start, tuple):
            again = tuple(row for row in again if start[row] not in (self.router.then, TaskClass.DENSE))
        self.decisions.append(Decision(ids.shape[1], start, self.router.then if again else None, again, scores))
        if again:
            with task(self.router.then):
                out = self._again(given, out, again, kept)
        if not wants_cache:
            out.past_key_values = None
        return out

    def _again(self, given: dict[str, Any], out: Any, again: tuple[int, ...], kept: Any) -> Any:
        """The outputs with these rows run anew; the cache that was given holds what the outputs' does."""
        rows, cache = len(given["input_ids"]), given.get("past_key_values")
        if len(again) == rows:
            caches.put_back(cache, kept)
            return self._run(**given)
        chosen = torch.tensor(again, device=given["input_ids"].device)
        part = {name: _rows_of(value, rows, chosen) for name, value in given.items() if name != "past_key_values"}
        denser = self._run(**{**part, "use_cache": out.past_key_values is not None})
        caches.merge(out.past_key_values, denser.past_key_values, chosen)
        for name, value in out.items():
            if name != "past_key_values":
                out[name] = _merged(value, denser.get(name), rows, chosen)
        return out


def attach(model: Any, router: Router | str | Path) -> Attached:
    """Let ``sparsepass.task("auto")`` read requests to ``model``, which is changed in place; undo it by ``detach``.

    ``model``: a causal language model of transformers with SDPA attention, compiled with sparsepass before
    (``model.compile(backend="sparsepass", ...)`` or by its ``forward``). Its policy should be the one that the router
    was fitted for. ``router``: one that ``sparsepass auto fit`` wrote, or its file. Warns where the router was fitted
    for another model. Raises ``AutoError``.
    """
    chosen = router if isinstance(router, Router) else Router.load(router)
    if isinstance(_wrapper(model), Attached):
        raise AutoError("This model reads requests already; call sparsepass.measure.auto.detach(model) first.")
    if not {"input_ids", "past_key_values"} <= set(inspect.signature(type(model).forward).parameters):
        raise AutoError(
            f"{type(model).__name__}.forward takes no input_ids and past_key_values; accepted is a causal language "
            "model of transformers."
        )
    windows = set(getattr(getattr(model, "config", None), "layer_types", None) or ()) - {"full_attention"}
    if windows:
        raise AutoError(
            f"The model has layers of {', '.join(sorted(windows))}; auto reads models all of whose layers attend fully."
        )
    if chosen.calibrated and (other := differences(chosen.calibrated, model)):
        warnings.warn(
            f"Router {chosen.name!r} was fitted for another setting: {'; '.join(other)}. What it trusts may be wrong "
            "here; fit it again.",
            RuntimeWarning,
            stacklevel=2,
        )
    compiled = getattr(model, "_compiled_call_impl", None)
    attached = Attached(model, chosen, compiled or model.forward)
    if compiled is not None:
        model._compiled_call_impl = attached
    else:

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return attached(*args, **kwargs)

        forward.attached = attached  # type: ignore[attr-defined]
        model.forward = forward
    return attached


def detach(model: Any) -> None:
    """Undo ``attach``. Raises ``AutoError`` if the model is not attached."""
    attached = _wrapper(model)
    if not isinstance(attached, Attached):
        raise AutoError("This model was not attached, or was compiled since: there is nothing to undo.")
    run = attached._run
    if getattr(model, "_compiled_call_impl", None) is attached:
        model._compiled_call_impl = run
    else:
        model.forward = run


def _wrapper(model: Any) -> object:
    compiled = getattr(model, "_compiled_call_impl", None)
    return compiled if compiled is not None else getattr(getattr(model, "forward", None), "attached", None)


def _rows_of(value: Any, rows: int, chosen: torch.Tensor) -> Any:
    """Rows of an argument that has one per row of the batch; others as they are."""
    if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == rows:
        return value[chosen.to(value.device)]
    return value


def _merged(value: Any, other: Any, rows: int, chosen: torch.Tensor) -> Any:
    """``value`` with its rows ``chosen`` taken from ``other``: tensors with one row per row of the batch, also inside
    tuples."""
    if isinstance(value, tuple):
        return tuple(_merged(one, its, rows, chosen) for one, its in zip(value, other, strict=True))
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and value.dim() and value.shape[0] == rows:
        return value.index_copy(0, chosen.to(value.device), other.to(value.dtype))
    return value
