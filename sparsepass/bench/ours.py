"""This package's own kernels, by the entry points that compiled graphs use."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sparsepass.bench.problem import Problem
from sparsepass.errors import OptionError, close_names
from sparsepass.kernels import dispatch
from sparsepass.kernels.dispatch import BlockLists
from sparsepass.methods import Method

AUTO = "auto"
"""Whatever the dispatcher takes by itself."""


def implementations(device: torch.device) -> tuple[str, ...]:
    """Names that ``implementation=`` of the attention takes on a device, ``auto`` first."""
    listed = getattr(dispatch, "implementations", None)
    names: tuple[str, ...] = tuple(listed(device)) if listed is not None else ()
    return (AUTO, *(name for name in names if name != AUTO))


def check_implementation(name: str, device: torch.device) -> None:
    """Raises ``OptionError`` if the attention cannot be forced to this implementation here."""
    if name == AUTO or "implementation" in inspect.signature(dispatch.block_sparse_attention).parameters:
        return
    raise OptionError(
        f"The implementation {name!r} cannot be forced: this version picks the kernel by itself. "
        f"{close_names(name, implementations(device))}"
    )


def attend(problem: Problem, lists: BlockLists, implementation: str = AUTO, counter: Tensor | None = None) -> Tensor:
    """Attention over given lists."""
    forced: dict[str, Any] = {} if implementation == AUTO else {"implementation": implementation}
    out, _ = dispatch.block_sparse_attention(
        problem.query,
        problem.key,
        problem.value,
        lists,
        scale=problem.shape.scale,
        visible=problem.visible,
        counter=counter,
        **forced,
    )
    return out


def select(problem: Problem, method: Method, counter: Tensor | None = None) -> BlockLists:
    """A method's lists."""
    return method.select(
        problem.query, problem.key, scale=problem.shape.scale, visible=problem.visible, counter=counter
    )


def operator(problem: Problem, method: Method, implementation: str = AUTO, counter: Tensor | None = None) -> Tensor:
    """Selection and attention, as a compiled graph runs them."""
    return attend(problem, select(problem, method, counter), implementation, counter)


def kernel_that_ran(problem: Problem, lists: BlockLists) -> str:
    """Name of the kernel that the dispatcher takes for these inputs, empty where it does not say."""
    asked = getattr(dispatch, "kernel_name", None)
    if asked is None:
        return ""
    try:
        return str(asked(problem.query, problem.key, problem.value, lists, visible=problem.visible))
    except TypeError:
        return ""
