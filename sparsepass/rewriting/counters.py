"""Counts of what ran, kept on the device: launches, blocks computed, blocks visible. Reading is the only sync.

The kernels add to a row of a per-device table while they run, so the counts hold under CUDA graphs too, where no
Python runs. A row ("slot") belongs to one site of one compiled graph for as long as the graph lives; the compiler sees
no table.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass

import torch

CAPACITY = 1 << 14
"""Slots in a table. The last one is no graph's; a further row takes what the sites count that found no slot free."""


@dataclass(frozen=True, slots=True)
class Counts:
    """launches: attention launches; computed: key/value blocks they processed; visible: blocks the masks let through.

    Blocks are summed over batch, query heads and query blocks.
    """

    launches: int = 0
    computed: int = 0
    visible: int = 0

    @property
    def density(self) -> float | None:
        """Computed share of the visible blocks, or None if nothing ran."""
        return self.computed / self.visible if self.visible else None

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.launches - other.launches, self.computed - other.computed, self.visible - other.visible)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.launches + other.launches, self.computed + other.computed, self.visible + other.visible)


_lock = threading.Lock()
_tables: dict[torch.device, torch.Tensor] = {}
_live: dict[int, int] = {}
"""First slot and number of slots of each graph that lives."""
_homes: OrderedDict[str, int] = OrderedDict()
"""First slot that a content had last, also after its graph is gone: at most ``CAPACITY`` of them."""
_freed: deque[int] = deque()
"""First slots of graphs that are gone: entered by finalizers, which may run while the lock is held."""
_next = 0

kernels: dict[int, str] = {}
"""The kernel that first ran for a slot, by the names of ``kernels.dispatch.kernel_name``."""


class Slots:
    """Consecutive slots of one graph, its own as long as this object lives. ``counted``: whether there were any."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.counted = first < CAPACITY


def reserve(content: str, sites: int) -> Slots:
    """``sites`` consecutive slots for a graph, which no other graph that lives has.

    A content gets the slots that it had before where they are free, so that compiling it again yields the same graph
    and Inductor's caches still serve it. Warns where the table is full.
    """
    key = f"{hashlib.sha256(content.encode()).hexdigest()}:{sites}"
    with _lock:
        while _freed:
            _release(_freed.popleft())
        first = _place(key, sites)
        if first is not None:
            _live[first] = sites
            _homes[key] = first
            _homes.move_to_end(key)
            while len(_homes) > CAPACITY:
                _homes.popitem(last=False)
    if first is None:
        warnings.warn(
            f"The table of counters is full: the compiled graphs that are in use have {CAPACITY - 1} attention sites. "
            "Further graphs run as planned, but their reports show no counts. Drop models that are no longer used, or "
            "call torch._dynamo.reset().",
            RuntimeWarning,
            stacklevel=2,
        )
        return Slots(CAPACITY)
    slots = Slots(first)
    weakref.finalize(slots, _freed.append, first).atexit = False
    return slots


def _release(first: int) -> None:
    for slot in range(first, first + _live.pop(first)):
        kernels.pop(slot, None)


def _place(key: str, sites: int) -> int | None:
    """Where the content was last; else behind all that were given; else the first gap that is wide enough."""
    global _next
    taken = sorted(_live.items())
    home = _homes.get(key)
    if home is not None and all(home + sites <= first or first + count <= home for first, count in taken):
        return home
    if _next + sites < CAPACITY:
        _next += sites
        return _next - sites
    low = 0
    for first, count in [*taken, (CAPACITY - 1, 0)]:
        if first - low >= sites:
            return low
        low = first + count
    return None


def prepare(device: torch.device) -> None:
    """Create the table of a device. Called at compile time: a CUDA graph must not own the table's memory."""
    device = _indexed(device)
    with _lock:
        if device not in _tables:
            _tables[device] = torch.zeros(CAPACITY + 1, 3, dtype=torch.int64, device=device)


def row(device: torch.device, slot: int) -> torch.Tensor | None:
    """The int64 [3] row the kernels add to, or None if the device has no table (compiled in another process)."""
    table = _tables.get(_indexed(device))
    return None if table is None else table[min(slot, CAPACITY)]


def read(device: torch.device, slot: int) -> Counts:
    """Counts of one slot so far. Waits for the device."""
    held = row(device, slot)
    return Counts() if held is None else Counts(*(int(count) for count in held.tolist()))


def total() -> Counts:
    """Counts over every device and slot since the process started. Waits for the devices."""
    summed = Counts()
    for table in list(_tables.values()):
        summed += Counts(*(int(count) for count in table.sum(0).tolist()))
    return summed


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
