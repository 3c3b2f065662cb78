"""Counts of what ran, kept on the device: launches, blocks computed, blocks visible. Reading is the only sync.

The kernels add to a row of a per-device table while they run, so the counts hold under CUDA graphs too, where no
Python runs. A row ("slot") belongs to one site of one compiled graph; the compiler sees neither table nor slot.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

import torch

CAPACITY = 1 << 14
"""Slots in a table. Sites beyond it share the last one; their counts are then the sum of several sites."""


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
_slots: dict[str, int] = {}

kernels: dict[int, str] = {}
"""The kernel that first ran for a slot, by the names of ``kernels.dispatch.kernel_name``."""


def reserve(content: str, sites: int) -> int:
    """First of ``sites`` consecutive slots for a graph. The same content gets the same slots, so that compiling it
    again yields the same graph and Inductor's caches still serve it."""
    key = f"{hashlib.sha256(content.encode()).hexdigest()}:{sites}"
    with _lock:
        if key not in _slots:
            _slots[key] = _slots.get("", 0)
            _slots[""] = _slots[key] + sites
        return _slots[key]


def prepare(device: torch.device) -> None:
    """Create the table of a device. Called at compile time: a CUDA graph must not own the table's memory."""
    device = _indexed(device)
    with _lock:
        if device not in _tables:
            _tables[device] = torch.zeros(CAPACITY, 3, dtype=torch.int64, device=device)


def row(device: torch.device, slot: int) -> torch.Tensor | None:
    """The int64 [3] row the kernels add to, or None if the device has no table (compiled in another process)."""
    table = _tables.get(_indexed(device))
    return None if table is None else table[min(slot, CAPACITY - 1)]


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
