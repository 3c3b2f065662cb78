"""A compiled graph with its plan, and what each call of it checks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsepass.graph import torch_private
from sparsepass.planning import crossover
from sparsepass.planning.plan import GraphPlan, Settings
from sparsepass.request import observer as watch
from sparsepass.request.hints import current_auto, hint_words
from sparsepass.rewriting import counters, record
from sparsepass.rewriting.call_sizes import CallSizes
from sparsepass.rewriting.elsewhere import Elsewhere, attention_module
from sparsepass.rewriting.row_inputs import RowSource, check_rows
from sparsepass.sites import Findings
from sparsepass.types import Rows, TaskClass


@dataclass(frozen=True)
class AddedInputs:
    """The inputs of a mixed graph besides those captured: for the compiler, and how to make them at each call."""

    examples: tuple[torch.Tensor, ...] = ()
    sources: tuple[RowSource, ...] = ()


class CompiledGraph:
    """A compiled graph with the plan it was compiled for.

    Each call compares the plan wanted now with that plan, and its sizes with those that the plan holds for: a guard
    that was dropped (``guard_filter_fn``, or a stance that skips guards) is answered by running the captured graph
    densely, never with the wrong budget. A list of hints is checked against the rows of the batch, and a mixed graph is
    given each row's class as a tensor: read at the call, not when the graph was compiled or captured.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        captured: fx.GraphModule,
        findings: Findings,
        plan: GraphPlan,
        settings: Settings,
        slots: counters.Slots | None,
        hint_guard: str | None,
        row_sources: Sequence[RowSource] = (),
        watched: watch.WatchedGraph | None = None,
        layers: tuple[torch_private.ObjectGuard, ...] = (),
        sizes: CallSizes | None = None,
    ) -> None:
        self.compiled = compiled
        self.captured = captured
        self.findings = findings
        self.plan = plan
        self.settings = settings
        self.slots = slots
        """Where the counts of its sites are, kept as long as the graph; None where nothing was rewritten."""
        hint = (f"{hint_guard} == {plan.current.key!r}",) if hint_guard else ()
        self.guards = (*plan.length_guards, *hint, *(guard.text for guard in layers))
        self.compile_seconds = 0.0
        self.runs = 0
        self.key = plan.current.key
        self.rows: Rows | None = None
        """Classes of the rows of the last call with a list of hints."""
        self.watched = watched
        """What a monitor is told of this graph, where it samples rows."""
        self._row_sources = tuple(row_sources)
        self._batches = _batch_readers(captured, findings, plan) if plan.registry_key is not None else ()
        self._wanted = None if plan.registered is None else plan.registered.key
        self._sizes = sizes
        self._layers = layers
        self.elsewhere = None if findings.sites else Elsewhere(attention_module(captured), findings.refused)
        """Where no site was found: whether attention runs outside this graph."""
        self._warned = False
        devices = () if settings.always_sparse else dict.fromkeys(found.site.device for found in findings.prefill)
        self.measurements = tuple(crossover.provenance(torch.device(device)) for device in devices)
        """By which measurements sparse was taken to be faster or not: a sentence for each device."""

    def __call__(self, *args: Any) -> Any:
        if record.ACTIVE:
            record.ran(self)
        self.runs += 1
        if self.elsewhere is None:
            record.with_sites += 1
        else:
            self.elsewhere.ran()
        if self._layers and not torch_private.ObjectGuard.all_passed(self._layers):
            return self._run_dense(
                args, f"the layers that it was compiled for ({self._layers[0].text}) were not checked"
            )
        if self._sizes is not None and (other := self._sizes.other(args)):
            return self._run_dense(args, other)
        if self._wanted is None:
            return self.compiled(*args, *(source.make(TaskClass.UNKNOWN, args) for source in self._row_sources))
        hint = self.settings.wanted()
        if current_auto() is not None:
            _warn_of_auto()
        if isinstance(hint, tuple):
            for batch in self._batches:
                check_rows(hint, batch(args))
            self.rows = hint
        if (wanted := self._wanted()) != self.key:
            return self._run_dense(args, f"the hint in force wants {wanted!r}")
        added = [source.make(hint, args) for source in self._row_sources]
        if self.watched is None:
            return self.compiled(*args, *added)
        return self._run_watched((*args, *added), hint)

    def _run_watched(self, args: tuple[Any, ...], hint: TaskClass | Rows) -> Any:
        """The graph's outputs without the last ones, what its sampled rows kept, which the monitor in force gets."""
        assert self.watched is not None  # the caller looked
        outputs = self.compiled(*args)
        count = len(self.watched.sites)
        if (watching := watch.current()) is not None:
            watching.add(self.watched, self.settings.given(), hint, outputs[-count:])
        return outputs[:-count]

    def _run_dense(self, args: tuple[Any, ...], why: str) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"This graph was compiled for the plan {self.key!r}, but {why}: its guard was dropped "
                "(guard_filter_fn, or a stance that skips guards). It runs dense and uncompiled; keep the guards on "
                "sparsepass.plan_keys, on sizes and on layers.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.captured(*args)

    def counts(self) -> dict[int, counters.Counts]:
        """Counts of what ran so far, by site index. Waits for the device."""
        if self.slots is None or not self.slots.counted:
            return {found.site.index: counters.Counts() for found in self.findings.sites}
        return {
            found.site.index: counters.read(torch.device(found.site.device), self.slots.first + found.site.index)
            for found in self.findings.sites
        }

    def kernel(self, site: int) -> str | None:
        """The sparse kernel that ran for a site, if one has."""
        if self.slots is None or not self.slots.counted:
            return None
        return counters.kernels.get(self.slots.first + site)

    def summary(self) -> str:
        current = self.plan.current
        sparse = sum(1 for entry in current.entries if not entry.budget.dense)
        return (
            f"compiled a graph with {len(self.findings.sites)} attention sites, {sparse} sparse, "
            f"{len(self.findings.refused)} refused; task {hint_words(current.task)}, bucket {current.bucket}, "
            f"plan {current.key!r}, guards {list(self.guards)}, {self.compile_seconds:.1f} s"
        )


@functools.cache
def _warn_of_auto() -> None:
    """Once in a process."""
    warnings.warn(
        'sparsepass.task("auto") is in force, but this model reads no requests: it runs under the hint around auto, or '
        "as without a hint. Prepare it with sparsepass.measure.auto.attach(model, router).",
        RuntimeWarning,
        stacklevel=4,
    )


def _batch_readers(
    captured: fx.GraphModule, findings: Findings, plan: GraphPlan
) -> tuple[Callable[[Sequence[Any]], int], ...]:
    """How to tell the rows of the batches that the hint in force is for: those of its sparse sites."""
    sizes = {
        str(size): size
        for found, entry in zip(findings.sites, plan.current.entries, strict=True)
        if not entry.budget.dense and found.hint is None
        for size in found.query_shape[:1]
    }
    readers = [torch_private.size_reader(captured.graph, size) for size in sizes.values()]
    return tuple(reader for reader in readers if reader is not None)
