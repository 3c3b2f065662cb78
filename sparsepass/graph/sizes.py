"""Sizes of the tensors in a captured graph."""

from __future__ import annotations

import torch

from sparsepass.graph.canonical import Operand, value


def shape(node: Operand) -> tuple[int | torch.SymInt, ...]:
    """Sizes of a tensor node; () for anything else."""
    held = value(node)
    return tuple(held.shape) if isinstance(held, torch.Tensor) else ()


def same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are provably equal, without installing a guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(left == right)
