"""One entry per operation: the kernel of the tensors' device, with its arguments checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsepass.errors import KernelInputError
from sparsepass.kernels import arguments
from sparsepass.kernels.scores import Scores, check_scores, sinks_apart, with_sinks
from sparsepass.kernels.support import why_not
from sparsepass.kernels.types import UNBOUNDED, BlockLists, Columns, Visible

__all__ = [
    "UNBOUNDED",
    "BlockLists",
    "Columns",
    "Scores",
    "Visible",
    "block_sparse_attention",
    "check_inputs",
    "implementations",
    "is_empty",
    "kernel_name",
    "nothing_seen",
    "visible_blocks",
]


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    *,
    scale: float,
    visible: Visible,
    scores: Scores | None = None,
    return_lse: bool = False,
    counter: torch.Tensor | None = None,
    implementation: str = "auto",
    check_values: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of query [B, H, Sq, D] over the listed blocks of key [B, Hkv, Skv, D] and value [B, Hkv, Skv, Dv].

    fp16, bf16 or fp32, any strides, H a multiple of Hkv. Returns the output [B, H, Sq, Dv], laid out [B, Sq, H, Dv],
    and the log-sum-exp float32 [B, H, Sq] of the scores (natural logarithm; None unless asked for). ``scores``: what
    happens to them between scaling and softmax; a listed block of which it hides every pair is not computed. A row
    that sees nothing gives 0 and -inf. ``counter``: int64 [3] on the device; a launch and the computed blocks are
    added to its first two entries, with columns also the blocks that a row's columns would fill. With columns the
    result is the softmax over the union of listed blocks and columns. No host synchronization. ``implementation``:
    one of ``implementations(device)``; one asked for by name never falls back. ``check_values``: False for
    lists that this package's selection made, whose entries need no second look on the CPU. Raises ``KernelInputError``.
    """
    check_inputs(query, key, value)
    check_visible(query, key, visible)
    arguments.check_counter(counter, query)
    scores, by_query = sinks_apart(check_scores(scores, query, key, by_query=True))
    if implementation not in (known := implementations(query.device)):
        raise KernelInputError(
            f"implementation is {implementation!r}; accepted on {query.device.type} are {', '.join(known)}."
        )
    if is_empty(query, key, value):
        lse = _lse_of_nothing(query, scores, by_query) if return_lse else None
        return nothing_seen(query, value), lse
    check_lists(query, key, lists, check_values)
    query, key = with_head_size(query, key)
    chosen: dict[str, Any] = {} if implementation == "auto" else {"implementation": implementation}
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    if query.device.type == "cuda":
        from sparsepass.kernels.attend.triton.launch import block_sparse_attention_cuda

        attend = block_sparse_attention_cuda
    else:
        from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu

        attend = block_sparse_attention_cpu
    out, lse = attend(
        query,
        key,
        value,
        lists.kv_num_blocks,
        lists.kv_indices,
        scale=scale,
        **visible.arguments(),
        q_block=lists.q_block,
        kv_block=lists.kv_block,
        scores=scores,
        blocks=visible.blocks,
        skip=lists.skip,
        return_lse=return_lse or lists.columns is not None or by_query is not None,
        counter=counter,
        **chosen,
    )
    if lists.columns is not None and lse is not None:
        _add_columns(query, key, value, lists, lists.columns, out, lse, scale, visible, scores, counter)
    if by_query is not None and lse is not None:
        out, lse = with_sinks(out, lse, by_query)
    return out, lse if return_lse else None


def is_empty(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None) -> bool:
    """Whether there is no output to compute, or no key to see."""
    return 0 in (*query.shape[:3], key.shape[2]) or (value is not None and value.shape[3] == 0)


def empty_lists(query: torch.Tensor, block: int) -> BlockLists:
    """Lists of no block for query [B, H, Sq, D]."""
    num = query.new_zeros(*query.shape[:2], -(-query.shape[2] // block), dtype=torch.int32)
    return BlockLists(num, num[..., None].clone(), block, block)


def nothing_seen(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output where no query sees a key, as SDPA has it: 0 [B, H, Sq, Dv], laid out [B, Sq, H, Dv]."""
    batch, heads, q_len, _ = query.shape
    return query.new_zeros(batch, q_len, heads, value.shape[3]).transpose(1, 2)


def _lse_of_nothing(query: torch.Tensor, scores: Scores | None, by_query: torch.Tensor | None) -> torch.Tensor:
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
    if by_query is not None:
        return lse.copy_(by_query)
    return lse if scores is None or scores.sinks is None else lse.copy_(scores.sinks[:, None])


def with_head_size(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of head size 0 as ones of size 1 with the same scores: 0."""
    if query.shape[3]:
        return query, key
    return query.new_zeros(*query.shape[:3], 1), key.new_zeros(*key.shape[:3], 1)


def check_visible(query: torch.Tensor, key: torch.Tensor, visible: Visible) -> None:
    """Raises ``KernelInputError`` unless band and segments fit the checked query and key."""
    arguments.check_band(visible.left, visible.right, visible.offset)
    arguments.check_segments(query, key, visible.q_segments, visible.kv_segments)


def check_lists(query: torch.Tensor, key: torch.Tensor, lists: BlockLists, values: bool = True) -> None:
    """Raises ``KernelInputError`` unless lists fit the checked query and key; values on CUDA only where asked for.

    ``values``: whether to look at them on the CPU.
    """
    if type(lists.skip) not in (int, float) or not 0 <= lists.skip < 1:
        raise KernelInputError(f"lists.skip is {lists.skip!r}; accepted is 0 (nothing is skipped) and up to under 1.")
    arguments.check_block_sizes(lists.q_block, lists.kv_block)
    arguments.check_lists(lists.kv_num_blocks, lists.kv_indices, query, lists.q_block)
    columns = lists.columns
    if columns is not None:
        arguments.check_columns(columns.num, columns.indices, query, lists.q_block)
    if not (values and query.device.type == "cpu") and not arguments.checks_values_on_device():
        return
    arguments.check_list_values(lists.kv_num_blocks, lists.kv_indices, -(-key.shape[2] // lists.kv_block))
    if columns is not None:
        arguments.check_column_values(columns.num, columns.indices, key.shape[2])


def implementations(device: torch.device) -> tuple[str, ...]:
    """The implementations of the attention that a device can be asked for; ``auto`` is the fastest that fits."""
    return ("auto", "hopper", "triton") if device.type == "cuda" else ("auto",)


def kernel_name(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    *,
    scale: float,
    scores: Scores | None = None,
) -> str:
    """The kernel that ``block_sparse_attention`` takes by itself: hopper, triton, native (C++) or gathered (torch)."""
    scores, _ = sinks_apart(scores)
    if query.device.type == "cuda":
        from sparsepass.kernels.attend.hopper import launch as attend_hopper

        reason = attend_hopper.why_not(
            query,
            key,
            value,
            scale=scale,
            q_block=lists.q_block,
            kv_block=lists.kv_block,
            scores=scores,
            skip=lists.skip,
        )
        return "triton" if reason else "hopper"
    from sparsepass.kernels.attend.cpu import native as cpu_native

    return "native" if cpu_native.available(query.dtype) else "gathered"


def _add_columns(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: BlockLists,
    columns: Columns,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    visible: Visible,
    scores: Scores | None,
    counter: torch.Tensor | None,
) -> None:
    """Continue the softmax of ``out`` and ``lse`` over the columns, in place."""
    attend: Callable[..., None]
    if query.device.type == "cuda":
        from sparsepass.kernels.attend.columns.triton import attend_columns_cuda

        attend = attend_columns_cuda
    else:
        from sparsepass.kernels.attend.columns.cpu import attend_columns_cpu

        attend = attend_columns_cpu
    attend(
        query,
        key,
        value,
        lists.kv_num_blocks,
        lists.kv_indices,
        columns.num,
        columns.indices,
        out,
        lse,
        scale=scale,
        **visible.arguments(),
        q_block=lists.q_block,
        kv_block=lists.kv_block,
        scores=scores,
        blocks=visible.blocks,
        counter=counter,
    )


def visible_blocks(
    query: torch.Tensor, key: torch.Tensor, scores: Scores, visible: Visible, *, q_block: int, kv_block: int
) -> torch.Tensor:
    """The block map of ``scores``' mask and bias, the band and the segments: int8 [B or 1, H or 1, nq, nkv].

    0: no pair of the block is visible. 2: mask and bias hide no pair of it (the band or segments may). 1: otherwise.
    Mask and bias are read once. No host synchronization. Raises ``KernelInputError``.
    """
    check_visible(query, key, visible)
    arguments.check_block_sizes(q_block, kv_block)
    found = check_scores(scores, query, key, by_query=True)
    if found is None or not found.hides:
        raise KernelInputError("visible_blocks is for scores with a mask or a bias; without them the band decides.")
    make: Callable[..., torch.Tensor]
    if query.device.type == "cuda":
        from sparsepass.kernels.attend.triton.block_map import block_map_cuda

        make = block_map_cuda
    else:
        from sparsepass.kernels.attend.cpu.block_map import block_map_cpu

        make = block_map_cpu
    return make(
        found,
        **visible.arguments(),
        batch=query.shape[0],
        q_len=query.shape[2],
        kv_len=key.shape[2],
        q_block=q_block,
        kv_block=kv_block,
    )


def check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raises ``KernelInputError`` unless the kernels of the tensors' device take query, key and value together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.layout != torch.strided:
            raise KernelInputError(
                f"{name} has shape {tuple(tensor.shape)} ({tensor.layout}); accepted is [batch, heads, length, size], "
                "strided."
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise KernelInputError(
                f"{name} is {tensor.dtype} on {tensor.device} but query is {query.dtype} on {query.device}; "
                "give all three one type and one device."
            )
    if key.shape[0] != query.shape[0] or value.shape[:3] != key.shape[:3] or query.shape[3] != key.shape[3]:
        raise KernelInputError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not go together: "
            "batch, and head size, must be the same, and key and value must have the same heads and length."
        )
    if query.shape[1] % key.shape[1] if key.shape[1] else query.shape[1]:
        raise KernelInputError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}; query heads must be a multiple of key heads."
        )
    # Of size 0: SDPA takes them, and so do we.
    reason = why_not(query.device, query.dtype, query.shape[3] or 1, value.shape[3] or 1)
    if reason:
        raise KernelInputError(reason)
