"""Marks lengths as varying where compiled code is entered: a model's own inputs, and those of layers compiled alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

# Documented, in spite of where it lives; unlike mark_dynamic it never raises if the model fixes the size after all.
from torch._dynamo import OptimizedModule, maybe_mark_dynamic


def mark_lengths(held: Any, length: int) -> None:
    """Mark every dimension equal to ``length`` of the tensors in mappings, lists and tuples, but for the batch."""
    if isinstance(held, Mapping):
        held = list(held.values())
    if isinstance(held, list | tuple):
        for one in held:
            mark_lengths(one, length)
    elif isinstance(held, torch.Tensor) and length > 1:
        # The first dimension is the batch, which may equal the length by chance.
        for dim in range(1 if held.dim() > 1 else 0, held.dim()):
            if held.shape[dim] == length:
                maybe_mark_dynamic(held, dim)


@contextlib.contextmanager
def parts_marked(model: Any, length: int) -> Iterator[None]:
    """The tensors that modules compiled inside ``model`` are called with are marked, until the block ends.

    A model that is compiled as a whole traces through its parts: it is left as it is.
    """
    parts = [] if _whole(model) else [part for part in _modules(model) if _whole(part)]
    held = [(part, _entry(part), getattr(part, _entry(part))) for part in parts]
    for part, name, call in held:
        setattr(part, name, _marking(call, length))
    try:
        yield
    finally:
        for part, name, call in held:
            setattr(part, name, call)


def _marking(call: Callable[..., Any], length: int) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        mark_lengths((args, kwargs), length)
        return call(*args, **kwargs)

    return marked


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _whole(module: Any) -> bool:
    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def _entry(part: nn.Module) -> str:
    """The attribute by which a compiled module is entered: ``module.compile()`` sets one, ``torch.compile`` another."""
    return "forward" if isinstance(part, OptimizedModule) else "_compiled_call_impl"
