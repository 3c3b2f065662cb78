"""Makes the values that a pattern hands on in another shape than the graph has them: see ``Made`` in canon."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import Made, Operand, nodes_of, value


@dataclass
class Maker:
    """Makes the values of one graph; the same call twice is one value, so that layers share what they can."""

    _made: dict[tuple[Any, ...], Made] = field(default_factory=dict)

    def call(self, target: str | Callable[..., Any], *args: Operand, **kwargs: Any) -> Made:
        """The call, run on fake tensors to know its shape. No guard is installed. Raises what the call raises."""
        key = (target, _hashable(args), _hashable(tuple(kwargs.items())))
        if key not in self._made:
            held, named = _held(args), {name: _held(given) for name, given in kwargs.items()}
            with unguarded((args, tuple(kwargs.values()))):
                if isinstance(target, str):
                    result = getattr(held[0], target)(*held[1:], **named)
                else:
                    result = target(*held, **named)
            self._made[key] = Made(target, args, kwargs, {"example_value": result})
        return self._made[key]

    def steps(self, source: Operand, steps: tuple[tuple[Any, ...], ...]) -> Operand:
        """``source`` after the calls of ``steps``, each (method, arguments...)."""
        for target, *rest in steps:
            source = self.call(target, source, *rest)
        return source


def _held(source: Any) -> Any:
    if isinstance(source, tuple | list):
        return type(source)(_held(part) for part in source)
    return value(source)


def _hashable(part: Any) -> Any:
    if isinstance(part, tuple | list):
        return tuple(_hashable(inner) for inner in part)
    return str(part) if isinstance(part, slice) else part


@contextlib.contextmanager
def unguarded(sources: Any) -> Iterator[None]:
    """Symbolic sizes are compared by the current ones, and no guard is kept: only shapes come of it."""
    tensors = [value(node) for node in nodes_of(sources)]
    sizes: list[int | torch.SymInt] = [s for held in tensors if isinstance(held, torch.Tensor) for s in held.shape]
    env = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    with torch_private.suppressed_guards(env):
        yield
