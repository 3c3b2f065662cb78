"""This package's own kernels, by the entry points that compiled graphs use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import OptionError, close_names
from sparsepass.kernels.attend import api as dispatch
from sparsepass.kernels.types import BlockLists
from sparsepass.measure.bench.problem import Problem
from sparsepass.methods import Method

AUTO = "auto"
"""Whatever the dispatcher takes by itself."""


def implementations(device: torch.device) -> tuple[str, ...]:
    """Names that ``implementation=`` of the attention takes on a device, ``auto`` first."""
    return dispatch.implementations(device)


def check_implementation(name: str, device: torch.device) -> None:
    """Raises ``OptionError`` if the attention cannot be forced to this implementation here."""
    known = implementations(device)
    if name not in known:
        raise OptionError(f"--implementations {name!r} cannot be forced on {device.type}. {close_names(name, known)}")


def attend(problem: Problem, lists: BlockLists, implementation: str = AUTO, counter: Tensor | None = None) -> Tensor:
    """Attention over given lists. Raises ``KernelInputError`` if the implementation named does not take them."""
    tensors = (problem.query, problem.key, problem.value)
    options: dict[str, Any] = {"scale": problem.shape.scale, "counter": counter, "implementation": implementation}
    return dispatch.block_sparse_attention(*tensors, lists, visible=problem.visible, **options)[0]


def select(problem: Problem, method: Method, counter: Tensor | None = None) -> BlockLists:
    """A method's lists."""
    return method.select(
        problem.query, problem.key, scale=problem.shape.scale, visible=problem.visible, counter=counter
    )


def operator(problem: Problem, method: Method, implementation: str = AUTO, counter: Tensor | None = None) -> Tensor:
    """Selection and attention, as a compiled graph runs them."""
    return attend(problem, select(problem, method, counter), implementation, counter)


def kernel_that_runs(problem: Problem, lists: BlockLists) -> str:
    """Name of the kernel that the dispatcher takes for these inputs, empty where it has no choice."""
    if problem.device.type != "cuda":
        return ""
    try:
        from sparsepass.kernels.attend.hopper import launch as attend_hopper
    except ImportError:
        return ""
    reason = attend_hopper.why_not(
        problem.query,
        problem.key,
        problem.value,
        scale=problem.shape.scale,
        q_block=lists.q_block,
        kv_block=lists.kv_block,
    )
    return "triton" if reason else "hopper"
