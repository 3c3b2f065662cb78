"""What a kernel asks for by its arguments' names, and calling it with that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.testing.problem import Inputs
from sparsepass.testing.terms import TERMS

Kernel = Callable[..., Any]
"""``kernel(q, k, v, kv_num_blocks, kv_indices, *, ...)`` or ``kernel(q, k, v, *, block_mask, ...)``; see ``Signature``.
It returns the output, or the output and the log-sum-exp (None where it has none)."""

_OURS = ("scale", "left", "right", "offset", "q_segments", "kv_segments", "q_block", "kv_block")
ACCEPTED = (*_OURS, *TERMS, "causal", "block", "block_mask", "return_lse")
"""Keywords that a kernel may have. ``causal``: bool; ``block``: tokens, of queries and keys alike; those of ``TERMS``
change the scores, as the fields of ``kernels.dispatch.Scores``; others as ours."""


class Signature:
    """Which of ``ACCEPTED`` a kernel takes: what it does not take is not asked of it. Raises ``KernelInputError``."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.name = getattr(kernel, "__name__", type(kernel).__name__)
        parameters = list(inspect.signature(kernel).parameters.values())
        named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wanted = 3 if "block_mask" in named else 5
        if len(positional) < wanted and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise KernelInputError(
                f"{self.name} takes {len(positional)} positional arguments; accepted is "
                "(q, k, v, kv_num_blocks, kv_indices, ...), or (q, k, v, ...) with a keyword block_mask."
            )
        self.positional = wanted
        unknown = [p.name for p in (*positional[wanted:], *keyword_only) if p.name not in ACCEPTED]
        needed = [p.name for p in parameters if p.name in unknown and p.default is p.empty]
        if needed:
            raise KernelInputError(
                f"{self.name} needs {', '.join(needed)}, which the checks do not give; they give "
                f"{', '.join(ACCEPTED)}. Wrap the kernel in a function that sets the others."
            )
        taken = {p.name for p in (*positional[wanted:], *keyword_only)}
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            taken |= {*_OURS} - {"block_mask"}
        self.takes = frozenset(taken & set(ACCEPTED))

    def __call__(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """The kernel's output and log-sum-exp on these inputs. Raises ``AssertionError`` where it returns neither."""
        mask = inputs.mask
        given: dict[str, Any] = {name: mask[name] for name in _OURS if name in self.takes}
        given |= {name: getattr(inputs.scores, name, None) for name in TERMS if name in self.takes}
        if "causal" in self.takes:
            given["causal"] = mask["right"] == 0
        if "block" in self.takes:
            given["block"] = mask["kv_block"]
        if "return_lse" in self.takes:
            given["return_lse"] = True
        tensors = [inputs.q, inputs.k, inputs.v, inputs.kv_num_blocks, inputs.kv_indices]
        if "block_mask" in self.takes:
            given["block_mask"] = inputs.block_mask()
        with torch.no_grad():
            result = self.kernel(*tensors[: self.positional], **given)
        out, lse = result if isinstance(result, tuple | list) else (result, None)
        if not isinstance(out, Tensor) or not (lse is None or isinstance(lse, Tensor)):
            raise AssertionError(f"{self.name} returned {type(out).__name__}; expected a tensor, or (out, lse)")
        return out, lse
