"""One entry per way to select blocks: the kernels of the tensors' device, with their arguments checked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsepass.errors import KernelInputError
from sparsepass.kernels.arguments import check_counter
from sparsepass.kernels.attend.api import check_inputs, check_visible, empty_lists, is_empty, with_head_size
from sparsepass.kernels.select.rule import Rule
from sparsepass.kernels.support import default_block
from sparsepass.kernels.types import BlockLists, Visible


def select_pooled_topk(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    visible: Visible,
    density: float | torch.Tensor,
    max_density: float | None = None,
    block: int | None = None,
    self_similarity: float | None = None,
    last: int = 0,
    counter: torch.Tensor | None = None,
) -> BlockLists:
    """Pooled block top-k (The Sparse Frontier, arXiv 2504.17768) for query [B, H, Sq, D] and key [B, Hkv, Skv, D].

    ``density``: share of the visible blocks to keep, or a float32 tensor [B or 1, H or 1] of shares on the device, at
    most ``max_density``. ``block``: tokens per block, 64 or 128; None for the device's default. ``self_similarity``:
    blocks whose tokens' mean cosine is under it are computed whole (SpargeAttn, arXiv 2502.18137). ``last``: query
    blocks at the end that list every visible block (FlashPrefill), besides ``density``. ``counter``: int64 [3] on the
    device; the number of visible blocks is added to its last entry. No host synchronization. Raises
    ``KernelInputError``.
    """
    size = _block_size(query, key, visible, block, counter)
    if isinstance(density, torch.Tensor):
        density = _per_head("density", density, query)
    if is_empty(query, key):
        return empty_lists(query, size)
    query, key = with_head_size(query, key)
    select: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    if query.device.type == "cuda":
        from sparsepass.kernels.select.triton.topk import select_blocks_cuda

        select = select_blocks_cuda
    else:
        from sparsepass.kernels.select.cpu.topk import select_blocks_cpu

        select = select_blocks_cpu
    num, indices = select(
        query,
        key,
        scale=scale,
        **visible.arguments(),
        q_block=size,
        kv_block=size,
        density=density,
        max_density=max_density,
        self_similarity=self_similarity,
        last=last,
        blocks=visible.blocks,
        counter=counter,
    )
    return BlockLists(num, indices, size, size)


def select_scored(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    visible: Visible,
    rule: Rule,
    dial: torch.Tensor | None = None,
    block: int | None = None,
    counter: torch.Tensor | None = None,
) -> BlockLists:
    """Blocks of query [B, H, Sq, D] and key [B, Hkv, Skv, D] that ``rule`` takes by its score.

    ``dial``: float32 [B or 1, H or 1] on the device, each head's own dial; one that costs more than the rule's is cut
    to it. Lists by position alone may have a batch or heads of 1. Otherwise as ``select_pooled_topk``.
    """
    size = _block_size(query, key, visible, block, counter)
    if dial is not None:
        _per_head("dial", dial, query)
    if is_empty(query, key):
        return empty_lists(query, size)
    query, key = with_head_size(query, key)
    select: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    if query.device.type == "cuda":
        from sparsepass.kernels.select.triton.scored import select_scored_cuda

        select = select_scored_cuda
    else:
        from sparsepass.kernels.select.cpu.scored import select_scored_cpu

        select = select_scored_cpu
    num, indices = select(
        query,
        key,
        scale=scale,
        **visible.arguments(),
        q_block=size,
        kv_block=size,
        rule=rule,
        dial=dial,
        blocks=visible.blocks,
        counter=counter,
    )
    return BlockLists(num, indices, size, size)


def _block_size(
    query: torch.Tensor, key: torch.Tensor, visible: Visible, block: int | None, counter: torch.Tensor | None
) -> int:
    """Tokens per block, after the tensors have been checked."""
    check_inputs(query, key, key)
    check_visible(query, key, visible)
    check_counter(counter, query)
    size = default_block(query.device) if block is None else block
    if size not in (64, 128):
        raise KernelInputError(f"block is {size!r}; accepted are 64 and 128.")
    return int(size)


def _per_head(name: str, values: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """``values`` as [B or 1, H], from float32 [B or 1, H or 1] on the device. Raises ``KernelInputError``."""
    batch, heads = query.shape[:2]
    fits = values.dim() == 2 and values.shape[0] in (1, batch) and values.shape[1] in (1, heads)
    if not fits or values.dtype != torch.float32 or values.device != query.device:
        raise KernelInputError(
            f"{name} is {values.dtype} {tuple(values.shape)} on {values.device}; accepted is a number, or float32 "
            f"[{batch} or 1, {heads} or 1] on {query.device}."
        )
    return values.expand(-1, heads)
