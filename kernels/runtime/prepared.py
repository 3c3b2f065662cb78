"""Runs a problem's launches again without building them again.

Checking arguments, filling in fifty kernel parameters and looking up the compiled kernel take Python longer than a GPU
needs for a short prompt. All of it depends on shapes, strides, dtypes and plain numbers alone, so it is done once for
each combination of those; after that only the tensors change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepass.kernels.runtime.launch import Launch, run_all

Outputs = tuple[Tensor | None, ...]

LIMIT = 512
"""Problems remembered; past it all are forgotten, which costs each its next first call."""


class Prepared:
    """The launches of one problem: compiled kernels, arguments, and which of those are tensors of the call."""

    __slots__ = ("_outputs", "_room", "_steps")

    def __init__(
        self, launches: Sequence[Launch], compiled: Sequence[Any], inputs: Sequence[Tensor | None], outputs: Outputs
    ) -> None:
        slots = {id(x): index for index, x in reversed(list(enumerate(inputs))) if x is not None}
        room: list[Tensor] = []
        self._steps: list[tuple[Callable[..., None], list[Any], list[tuple[int, int]], list[tuple[int, int]]]] = []
        for launch, kernel in zip(launches, compiled, strict=True):
            arguments = [launch.arguments[parameter.name] for parameter in launch.kernel.params]
            tensors, descriptors = [], []
            for position, value in enumerate(arguments):
                tensor = value if isinstance(value, Tensor) else getattr(value, "base", None)
                if not isinstance(tensor, Tensor):
                    continue
                if id(tensor) not in slots:
                    slots[id(tensor)] = len(inputs) + len(room)
                    room.append(tensor)
                # Hold on to no one's memory.
                if tensor is value:
                    tensors.append((position, slots[id(tensor)]))
                    arguments[position] = None
                else:  # a descriptor for the copy engine: the same but for the tensor
                    descriptors.append((position, slots[id(tensor)]))
                    arguments[position] = copy.copy(value)
                    arguments[position].base = None
            self._steps.append((kernel[(*launch.grid, 1, 1)[:3]], arguments, tensors, descriptors))
        self._room = [(tuple(x.shape), x.stride(), x.dtype, x.device) for x in room]
        self._outputs = [None if x is None else slots[id(x)] for x in outputs]

    def run(self, inputs: Sequence[Tensor | None]) -> Outputs:
        """Runs on tensors of the same shapes, strides and alignment as the first time's."""
        tensors = [*inputs]
        for shape, stride, dtype, device in self._room:
            tensors.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        for kernel, template, slots, descriptors in self._steps:
            arguments = template.copy()
            for position, slot in slots:
                arguments[position] = tensors[slot]
            for position, slot in descriptors:
                arguments[position] = copy.copy(template[position])
                arguments[position].base = tensors[slot]
            kernel(*arguments)
        return tuple(None if slot is None else tensors[slot] for slot in self._outputs)


_prepared: dict[Hashable, Prepared] = {}


def run_prepared(
    device: torch.device,
    numbers: Hashable,
    inputs: Sequence[Tensor | None],
    build: Callable[[], tuple[list[Launch], Outputs]],
) -> Outputs:
    """The outputs of ``build()``'s launches, which is called only for a problem not seen before.

    ``numbers`` is all that ``build`` depends on besides the shapes, strides, dtypes and devices of ``inputs``.
    """
    if device.type != "cuda":  # the interpreter compiles nothing
        launches, outputs = build()
        run_all(launches, device)
        return outputs
    # Triton compiles apart for pointers aligned to 16 bytes, and a tensor passed twice takes one slot.
    described = [None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15) for x in inputs]
    same = [id(x) for x in inputs]
    key = (numbers, *described, *map(same.index, same))
    with torch.cuda.device(device):
        found = _prepared.get(key)
        if found is not None:
            return found.run(inputs)
        launches, outputs = build()
        compiled = [launch.run() for launch in launches]
    if len(_prepared) >= LIMIT:
        _prepared.clear()
    _prepared[key] = Prepared(launches, compiled, inputs, outputs)
    return outputs
