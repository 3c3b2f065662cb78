"""What a mixed graph is given besides its own inputs: the class number of each row of the batch, on the device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsepass.errors import HintError
from sparsepass.types import TASKS, Rows, TaskClass

KEPT = 512
"""Tensors of class numbers kept, the most recently used; each is a few bytes."""

_held: OrderedDict[tuple[Rows, torch.device, int], torch.Tensor] = OrderedDict()
_lock = threading.Lock()


def class_numbers(rows: Rows, device: torch.device) -> torch.Tensor:
    """The place in ``TASKS`` of each row's class, int32 [rows] on ``device``. Never waits for the device.

    Kept per stream: a copy is only known to be done to the stream that made it.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (rows, device, stream)
    with _lock:
        found = _held.get(key)
        if found is not None:
            _held.move_to_end(key)
            return found
    with torch.inference_mode(False):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _filled(rows, device)
        host = torch.tensor([TASKS.index(task) for task in rows], dtype=torch.int32, device="cpu")
        made = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
    with _lock:
        _held[key] = made
        while len(_held) > KEPT:
            _held.popitem(last=False)
    return made


def _filled(rows: Rows, device: torch.device) -> torch.Tensor:
    """By kernels alone, and not kept: a CUDA graph that the user captures would copy from host memory at each replay,
    and what it writes belongs to it."""
    numbers = torch.empty(len(rows), dtype=torch.int32, device=device)
    for row, task in enumerate(rows):
        numbers[row].fill_(TASKS.index(task))
    return numbers


@dataclass(frozen=True)
class RowSource:
    """How one added input of a graph is made at each call."""

    device: torch.device
    size: Callable[[Sequence[Any]], int] | None
    """Rows of the batch, read from the graph's arguments; None where they do not say, and the op finds out."""
    own: Rows | None = None

    def make(self, hint: TaskClass | Rows, arguments: Sequence[Any]) -> torch.Tensor:
        """The class numbers for a call under ``hint``. Raises ``HintError`` for a list of another length."""
        rows = self.own or hint
        size = None if self.size is None else self.size(arguments)
        if not isinstance(rows, tuple):
            rows = (rows,) * (size or 1)
        check_rows(rows, size)
        return class_numbers(rows, self.device)


def check_rows(rows: Rows, size: int | None) -> None:
    """Raise ``HintError`` unless there is one hint per row of a batch (where its size is known)."""
    if size is not None and len(rows) != size:
        given = ", ".join(repr(str(task)) for task in rows)
        raise HintError(
            f"{len(rows)} task hints for a batch of {size} {'row' if size == 1 else 'rows'}: [{given}]. Accepted is "
            f"one hint per row of the batch, here {size}, or a single hint for all rows: "
            f"sparsepass.task({str(rows[0])!r})."
        )
