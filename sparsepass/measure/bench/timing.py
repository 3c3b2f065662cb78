"""Times of calls: variants in shuffled order over rounds, CUDA events, caches emptied between short calls."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Run = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

MOST_CALLS = 30
"""Calls of one variant in one round."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. ``budget_ms``: per variant and round; a longer call is made once in each round."""

    rounds: int = 5
    budget_ms: float = 150.0
    seed: int = 0


def summary(rounds: list[list[float]]) -> dict[str, Any]:
    """Median, least and greatest of all calls in milliseconds, and the median of each round in the order taken."""
    calls = [time_ms for taken in rounds for time_ms in taken]
    return {
        "median_ms": round(statistics.median(calls), 5),
        "min_ms": round(min(calls), 5),
        "max_ms": round(max(calls), 5),
        "round_ms": [round(statistics.median(taken), 5) for taken in rounds],
        "calls": len(calls),
    }


class Clock:
    """Times calls on one device. On CUDA a buffer twice the second-level cache's size is written before short calls.

    That write also keeps the device busy while the host launches, so that what is timed is the device's work.
    """

    def __init__(self, device: torch.device, working_set: int = 0) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._room: torch.Tensor | None = None
        if self.cuda:
            cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or (64 << 20)
            if working_set < 4 * cache:
                self._room = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    @property
    def flushes(self) -> bool:
        return self._room is not None

    def once(self, run: Run) -> float:
        """Milliseconds of one call."""
        return self.repeated(run, 1)[0]

    def repeated(self, run: Run, calls: int) -> list[float]:
        """Milliseconds of each of several calls. On CUDA the host waits only after the last."""
        if not self.cuda:
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                run()
                times.append((time.perf_counter() - start) * 1e3)
            return times
        with torch.cuda.device(self.device):
            events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls)]
            for begin, end in events:
                if self._room is not None:
                    self._room.zero_()
                begin.record()
                run()
                end.record()
            torch.cuda.synchronize(self.device)
            return [float(begin.elapsed_time(end)) for begin, end in events]

    def round(self, run: Run, budget_ms: float) -> list[float]:
        """One round of a variant: a call to warm up, and as many more as the budget holds.

        Only the latter count, unless there is room for none: a call that long is its own warm-up.
        """
        warm = max(self.once(run), 1e-3)
        if warm >= budget_ms:
            return [warm]
        return self.repeated(run, max(1, min(MOST_CALLS, int(budget_ms / warm))))


def time_variants(
    runs: Mapping[Key, Run], clock: Clock, effort: Effort, advance: Callable[[], None] = lambda: None
) -> dict[Key, list[list[float]]]:
    """Times in milliseconds by variant and round. Each round takes all variants in an order of its own.

    ``advance`` is called after each variant of each round.
    """
    shuffled = random.Random(effort.seed)
    times: dict[Key, list[list[float]]] = {key: [] for key in runs}
    for _ in range(effort.rounds):
        order = list(runs)
        shuffled.shuffle(order)
        for key in order:
            times[key].append(clock.round(runs[key], effort.budget_ms))
            advance()
    return times


def graphed(run: Run) -> Run:
    """``run`` as the replay of a CUDA graph: without what the host takes to launch. Warm ``run`` up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    held: list[object] = []
    with torch.cuda.graph(graph):
        held.append(run())

    def replay() -> object:
        graph.replay()
        return held[0]

    return replay
