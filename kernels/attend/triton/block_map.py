"""Launches the kernel that finds which blocks a mask or a bias leaves anything of; the kernels' arguments for terms."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from sparsepass.kernels.attend.triton.terms import _block_map
from sparsepass.kernels.blocks import ceil_div
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.scores import Scores, hidden_at_most

LOG2E = 1.4426950408889634


def in_kernel_form(scores: Scores | None) -> Scores:
    """Checked scores with masks as bytes and biases of a type that the kernels read."""
    if scores is None:
        return Scores()
    bias, mask = scores.bias, scores.mask
    return Scores(
        scores.softcap,
        scores.slopes,
        bias.float() if bias is not None and bias.dtype == torch.float64 else bias,
        None if mask is None else mask.view(torch.int8),
        scores.sinks,
    )


def pair_arguments(scores: Scores) -> dict[str, Any]:
    """The kernels' arguments for mask and bias, in the form of ``in_kernel_form``: strides are 0 where shared.

    None for what is not there: Triton compiles that away.
    """
    arguments: dict[str, Any] = {"hidden": None if scores.bias is None else hidden_at_most(scores.bias.dtype)}
    for name, x in (("mask", scores.mask), ("bias", scores.bias)):
        arguments[f"{name}_ptr"] = x
        for at, letter in enumerate("bhqk"):
            arguments[f"{name}_stride_{letter}"] = None if x is None else x.stride(at) if x.shape[at] > 1 else 0
    return arguments


def term_arguments(scores: Scores, scale: float) -> dict[str, Any]:
    """The attention kernel's arguments for scores in the form of ``in_kernel_form`` and what replaces its scale."""
    slopes, sinks, softcap = scores.slopes, scores.sinks, scores.softcap
    changed = softcap is not None or slopes is not None or scores.bias is not None
    arguments = {
        **pair_arguments(scores),
        "slopes_ptr": slopes,
        "sinks_ptr": sinks,
        "slopes_stride_b": None if slopes is None else slopes.stride(0) if slopes.shape[0] > 1 else 0,
        "slopes_stride_h": None if slopes is None else slopes.stride(1),
        "sinks_stride": None if sinks is None else sinks.stride(0),
        "factor": None if not changed else scale * LOG2E if softcap is None else scale / softcap,
        "softcap": None if softcap is None else softcap * LOG2E,
        "CHANGED": changed,
    }
    if changed:  # the sign of the scale is in the factor
        arguments |= {"log2_scale": 1.0, "SIGN": 1}
    return arguments


def block_map_cuda(
    scores: Scores,
    *,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    batch: int,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
) -> Tensor:
    """As ``dispatch.visible_blocks``, for checked ``scores``. Nothing synchronizes with the host."""
    scores = in_kernel_form(scores)
    given = [x for x in (scores.mask, scores.bias) if x is not None]
    shape = {"batch": batch, "q_len": q_len, "kv_len": kv_len, "q_block": q_block, "kv_block": kv_block}

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launch, found = block_map_launch(scores, left, right, offset, q_segments, kv_segments, **shape)
        return [launch], (found,)

    inputs = (scores.mask, scores.bias, q_segments, kv_segments)
    numbers = ("block_map", left, right, offset, *shape.values())
    return cast(Tensor, run_prepared(given[0].device, numbers, inputs, build)[0])


def block_map_launch(
    scores: Scores,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    q_block: int,
    kv_block: int,
) -> tuple[Launch, Tensor]:
    """The launch of ``block_map_cuda`` and the map it fills; ``scores`` as ``in_kernel_form`` gives them."""
    given = [x for x in (scores.mask, scores.bias) if x is not None]
    items = batch if kv_segments is not None else max(x.shape[0] for x in given)
    heads = max(x.shape[1] for x in given)
    rows, blocks = ceil_div(q_len, q_block), ceil_div(kv_len, kv_block)
    found = given[0].new_empty(items, heads, rows, blocks, dtype=torch.int8)
    q_segments = None if kv_segments is None else q_segments
    arguments: dict[str, Any] = {
        "map_ptr": found,
        **pair_arguments(scores),
        "q_segments_ptr": q_segments,
        "kv_segments_ptr": kv_segments,
        "q_segments_stride_b": 0 if q_segments is None else q_segments.stride(0),
        "q_segments_stride_s": 1 if q_segments is None else q_segments.stride(1),
        "kv_segments_stride_b": 0 if kv_segments is None else kv_segments.stride(0),
        "kv_segments_stride_s": 1 if kv_segments is None else kv_segments.stride(1),
        "q_len": q_len,
        "kv_len": kv_len,
        "left": host.side(left),
        "right": host.side(right),
        "offset": offset,
        "rows": rows,
        "blocks": blocks,
        "heads": heads,
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "STEP": min(32, q_block),
    }
    return Launch(_block_map, (blocks, rows, items * heads), arguments, {"num_warps": 4}), found
