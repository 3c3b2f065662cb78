"""Checks of what users bring besides query, key and value: block lists, columns, segments, counters. Torch only.

Shapes, dtypes and devices are checked on the host. Values are looked at where that costs no waiting: on the CPU; on
CUDA only with ``SPARSEPASS_CHECK_LISTS=1``, since the kernels keep to the memory that is there whatever lists say.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError, OptionError
from sparsepass.kernels.blocks import ceil_div

CHECK_ENV = "SPARSEPASS_CHECK_LISTS"
"""Environment variable: 1 checks the values of block lists on CUDA, too, which waits for the device."""

MAX_TOKENS = 1 << 29
"""Positions and offsets stay under this, so that every in-kernel comparison fits int32. Addresses are int64."""

MAX_BLOCK = 1 << 16
"""Greatest block of lists, in tokens: a task holds the scores of a whole block."""


@functools.cache
def checks_values_on_device() -> bool:
    """Whether ``SPARSEPASS_CHECK_LISTS`` asks for it. Raises ``OptionError``."""
    given = os.environ.get(CHECK_ENV, "")
    if given not in ("", "0", "1"):
        raise OptionError(f"{CHECK_ENV} is {given!r}; accepted are 0 and 1.")
    return given == "1"


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raises ``KernelInputError`` unless ``value`` is an int of ``low`` to ``high``; a bool is none."""
    if type(value) is not int or not low <= value <= high:
        raise KernelInputError(f"{name} is {value!r}; accepted is a whole number from {low} to {high}.")


def check_tensor(name: str, x: Any, shape: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ``KernelInputError`` unless x has this type and device and each dimension is one of its choices.

    An empty choice is any size from 1 on.
    """
    if not isinstance(x, Tensor):
        raise KernelInputError(f"{name} is of type {type(x).__name__}; accepted is a {dtype} tensor on {device}.")
    if not _fits(x.shape, shape):
        wanted = ", ".join(
            " or ".join(str(n) for n in sorted(set(known), reverse=True)) or "1 or more" for known in shape
        )
        raise KernelInputError(f"{name} has shape {tuple(x.shape)}; expected {_short(dtype)} [{wanted}].")
    if x.dtype != dtype or x.device != device or x.layout != torch.strided:
        kind = "" if x.layout == torch.strided else f"{x.layout} "
        raise KernelInputError(f"{name} is {kind}{x.dtype} on {x.device}; expected {_short(dtype)} on {device}.")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(have: Sequence[int], shape: Sequence[tuple[int, ...]]) -> bool:
    if len(have) != len(shape):
        return False
    # A generator would take twice as long, and this runs at every call.
    for n, known in zip(have, shape, strict=True):  # noqa: SIM110
        if n not in known if known else n < 1:
            return False
    return True


def check_block_sizes(q_block: Any, kv_block: Any) -> None:
    """Raises ``KernelInputError`` unless both are whole numbers of tokens."""
    if not (type(q_block) is int and type(kv_block) is int and 0 < q_block <= MAX_BLOCK and 0 < kv_block <= MAX_BLOCK):
        check_whole("q_block", q_block, 1, MAX_BLOCK)
        check_whole("kv_block", kv_block, 1, MAX_BLOCK)


def check_lists(num: Any, indices: Any, query: Tensor, q_block: int) -> None:
    """Raises ``KernelInputError`` unless lists fit: int32 [B or 1, H or 1, nq] and [..., width] on query's device."""
    batch, heads = query.shape[:2]
    first = ((batch, 1), (heads, 1), (ceil_div(query.shape[2], q_block),))
    check_tensor("kv_num_blocks", num, first, torch.int32, query.device)
    same = [(n,) for n in num.shape]
    check_tensor("kv_indices", indices, (*same, ()), torch.int32, query.device)


def check_columns(num: Any, indices: Any, query: Tensor, q_block: int) -> None:
    """Raises ``KernelInputError`` unless columns fit: int32 [B or 1, H or 1, nq or 1] and [..., width]."""
    batch, heads = query.shape[:2]
    first = ((batch, 1), (heads, 1), (ceil_div(query.shape[2], q_block), 1))
    check_tensor("columns.num", num, first, torch.int32, query.device)
    same = [(n,) for n in num.shape]
    check_tensor("columns.indices", indices, (*same, ()), torch.int32, query.device)


def check_segments(
    query: Tensor, key: Tensor, q_segments: Tensor | None, kv_segments: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The segments as the kernels take them. Raises ``KernelInputError`` on a wrong shape, dtype or device."""
    if kv_segments is None:
        if q_segments is not None:
            raise KernelInputError(
                "q_segments is given without kv_segments; pass both, or kv_segments alone for key padding."
            )
        return None, None
    for name, segments, x in (("q_segments", q_segments, query), ("kv_segments", kv_segments, key)):
        if segments is not None:
            check_tensor(name, segments, ((x.shape[0],), (x.shape[2],)), torch.int32, query.device)
    return q_segments, kv_segments


def check_cumulative(cu_seqlens: Tensor) -> None:
    """Raises ``KernelInputError`` where cumulative lengths [n + 1] decrease; on CUDA only where asked for."""
    if torch.compiler.is_dynamo_compiling():
        return  # there are no values yet
    if cu_seqlens.device.type != "cpu" and not (cu_seqlens.is_cuda and checks_values_on_device()):
        return
    falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
    if len(falls):
        at = int(falls[0])
        raise KernelInputError(
            f"cu_seqlens falls from {int(cu_seqlens[at])} to {int(cu_seqlens[at + 1])} at entry {at + 1}; accepted are "
            "cumulative lengths, which never decrease."
        )


def check_band(left: Any, right: Any, offset: Any) -> None:
    """Raises ``KernelInputError`` unless the sides are whole numbers from -1 on, and the offset is one."""
    if type(left) is type(right) is type(offset) is int and left >= -1 and right >= -1 and abs(offset) < MAX_TOKENS:
        return
    for name, side in (("left", left), ("right", right)):
        if type(side) is not int or side < -1:
            raise KernelInputError(f"{name} is {side!r}; accepted is a number of tokens, or -1 for no limit.")
    check_whole("offset", offset, 1 - MAX_TOKENS, MAX_TOKENS - 1)


def check_counter(counter: Tensor | None, query: Tensor) -> None:
    """Raises ``KernelInputError`` unless the counter is None or contiguous int64 [3] on query's device."""
    if counter is None:
        return
    check_tensor("counter", counter, ((3,),), torch.int64, query.device)
    if not counter.is_contiguous():
        raise KernelInputError(f"counter has strides {counter.stride()}; expected a contiguous int64 [3].")


def check_list_values(num: Tensor, indices: Tensor, kv_blocks: int) -> None:
    """Raises ``KernelInputError`` unless each row lists distinct blocks under ``kv_blocks``, at most its width."""
    _check_values("kv_num_blocks", "kv_indices", num, indices, kv_blocks, "block", ascending=False)


def check_column_values(num: Tensor, indices: Tensor, kv_len: int) -> None:
    """Raises ``KernelInputError`` unless columns ascend, are under ``kv_len`` and at most the width."""
    _check_values("columns.num", "columns.indices", num, indices, kv_len, "column", ascending=True)


def _check_values(
    num_name: str, name: str, num: Tensor, indices: Tensor, limit: int, what: str, *, ascending: bool
) -> None:
    width = indices.shape[-1]
    least, most = num.aminmax()
    if not 0 <= int(least) <= int(most) <= width:
        raise KernelInputError(
            f"{num_name} has counts from {int(least)} to {int(most)}; accepted is 0 to the width of {name}, {width}."
        )
    used = torch.arange(width, device=num.device) < num[..., None]
    least, most = torch.where(used, indices, 0).aminmax()
    if not 0 <= int(least) <= int(most) < limit:
        bad = int(least) if int(least) < 0 else int(most)
        raise KernelInputError(f"{name} names {what} {bad}; accepted is 0 to {limit - 1} for these lengths.")
    if bool(((indices[..., 1:] > indices[..., :-1]) | ~used[..., 1:]).all()):
        return
    if ascending:
        raise KernelInputError(f"{name} does not ascend in each row; give each {what} once, in order.")
    ordered = torch.where(used, indices, limit + torch.arange(width, device=num.device)).sort(-1).values
    twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if len(twice):
        raise KernelInputError(f"{name} names {what} {int(twice[0])} twice in a row; give each {what} once.")
