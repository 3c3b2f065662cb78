"""Selection by a score and a rule, in Triton: pools, scores and lists as one series of launches.

Scores: ``pooled`` (here), ``mass`` (``kernels/select/triton/mass.py``), ``antidiagonal``
(``kernels/select/triton/antidiagonal.py``). Rules: ``kernels/select/triton/lists.py``. Only scores float32 [B, H, nq,
nkv] go through memory. Conventions: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels.arguments import check_counter, check_segments
from sparsepass.kernels.attend.triton.lists import segment_range_launch
from sparsepass.kernels.blocks import ceil_div, dim_steps
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import VARYING, Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.scores import check_blocks
from sparsepass.kernels.select.rule import Rule, check_rule, dial_tensor
from sparsepass.kernels.select.triton.antidiagonal import antidiagonal_launches
from sparsepass.kernels.select.triton.lists import rule_launch
from sparsepass.kernels.select.triton.mass import mass_launch
from sparsepass.kernels.select.triton.pool import allowed_launches, average_launch
from sparsepass.kernels.spec import CUDA, refuse_unsupported


@triton.jit(do_not_specialize=VARYING)
def _pooled_scores(
    q_means_ptr,
    k_means_ptr,
    scores_ptr,
    scale,
    rows,
    blocks,
    heads,
    group,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
):
    """scores [B, H, nq, nkv] = means of Q . means of K, both float32 [.., DIM]. Grid: (nkv tiles, nq tiles, B * H)."""
    plane = tl.program_id(2)
    kv_plane = (plane // heads * (heads // group) + plane % heads // group).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q_at = q_means_ptr + (plane.to(tl.int64) * rows + row)[:, None] * DIM
    k_at = k_means_ptr + (kv_plane * blocks + column)[:, None] * DIM
    score = tl.zeros([TILE, TILE], tl.float32)
    for step in range(0, DIM, STEP):
        dim = step + tl.arange(0, STEP)[None, :]
        q = tl.load(q_at + dim, mask=(row < rows)[:, None], other=0.0)
        k = tl.load(k_at + dim, mask=(column < blocks)[:, None], other=0.0)
        score = tl.dot(q, tl.trans(k), score, input_precision="tf32x3")
    at = scores_ptr + (plane.to(tl.int64) * rows + row)[:, None] * blocks + column[None, :]
    tl.store(at, score * scale, mask=(row < rows)[:, None] & (column < blocks)[None, :])


def select_scored_cuda(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_block: int,
    kv_block: int,
    rule: Rule,
    dial: Tensor | None = None,
    blocks: Tensor | None = None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Block lists by ``rule``: (kv_num_blocks int32 [B, H, nq], kv_indices int32 [B, H, nq, width]).

    q [B, H, Sq, D], k [B, Hkv, Skv, D]: fp16, bf16 or fp32, any strides. Band and segments as for
    ``select_blocks_cuda``. ``dial`` float32 [B or 1, H or 1]: each head's own dial, at most ``rule.dial``. ``counter``
    int64 [3]: [2] += blocks with a visible pair. Lists by position alone have B or H of 1 where rows agree. Unused
    entries are 0. Nothing synchronizes with the host. Raises ``KernelInputError``.
    """
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    blocks = None if blocks is None else blocks.contiguous()
    numbers = ("scored", scale, left, right, offset, q_block, kv_block, rule)

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, *outputs = scored_launches(
            q, k, scale=scale, left=left, right=right, offset=offset, q_segments=q_segments, kv_segments=kv_segments,
            q_block=q_block, kv_block=kv_block, rule=rule, dial=dial, counter=counter,
            blocks_map=blocks,
        )  # fmt: skip
        return launches, tuple(outputs)

    inputs = (q, k, q_segments, kv_segments, dial, counter, blocks)
    kv_num_blocks, kv_indices = run_prepared(q.device, numbers, inputs, build)
    return cast(Tensor, kv_num_blocks), cast(Tensor, kv_indices)


def scored_launches(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    rule: Rule,
    dial: Tensor | None,
    counter: Tensor | None,
    blocks_map: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of ``select_scored_cuda`` and the lists they fill; of ``blocks_map``'s blocks, if it is given."""
    host.check_shapes(q, k, None, offset, q_block, kv_block)
    check_counter(counter, q)
    q_segments, kv_segments = check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("select_scored_cuda", q)
    check_rule(rule, q_block, kv_block)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    dial = dial_tensor(dial, batch, heads)
    blocks = ceil_div(kv_len, kv_block)
    host.require(
        blocks <= CUDA.max_kv_blocks,
        lambda: f"{kv_len} keys are {blocks} blocks of {kv_block}; at most {CUDA.max_kv_blocks}: use larger blocks.",
    )
    band = {"q_len": q_len, "kv_len": kv_len, "left": host.side(left), "right": host.side(right), "offset": offset}
    launches: list[Launch] = []
    scores = q_unlike = k_unlike = None
    allowed = blocks_map
    if allowed is None and kv_segments is not None:
        launches, allowed = allowed_launches(q_segments, kv_segments, band, q_block, kv_block)
    seen_q = None if kv_segments is None else q_segments
    similar: dict[str, Any] = {"self_similarity": rule.self_similarity}

    def ranges(segments: Tensor | None, block: int) -> Tensor | None:
        if segments is None:
            return None
        launch, found = segment_range_launch(segments, block)
        launches.append(launch)
        return found

    if rule.score == "antidiagonal":
        q_ranges, kv_ranges = ranges(seen_q, rule.stride), ranges(kv_segments, rule.stride)
        more, scores = antidiagonal_launches(
            q, k, q_segments, kv_segments, q_ranges, kv_ranges, scale, band, q_block, kv_block, rule.stride
        )
        launches += more
    elif rule.score == "mass":
        padded = dim_steps(head_dim, 64)[0]
        launch, k_means, k_unlike = average_launch(k, kv_segments, kv_block, dtype=q.dtype, padded=padded, **similar)
        launches.append(launch)
        kv_ranges = ranges(kv_segments, kv_block)
        launch, scores = mass_launch(q, k_means, q_segments, kv_ranges, scale, band, q_block, kv_block)
        launches.append(launch)
    elif rule.score == "pooled":
        padded = ceil_div(head_dim, 32) * 32
        launch, q_means, q_unlike = average_launch(q, seen_q, q_block, padded=padded, **similar)
        launches.append(launch)
        launch, k_means, k_unlike = average_launch(k, kv_segments, kv_block, padded=padded, **similar)
        launches.append(launch)
        rows = ceil_div(q_len, q_block)
        scores = q.new_empty(batch, heads, rows, blocks, dtype=torch.float32)
        arguments: dict[str, Any] = {
            "q_means_ptr": q_means,
            "k_means_ptr": k_means,
            "scores_ptr": scores,
            "scale": scale,
            "rows": rows,
            "blocks": blocks,
            "heads": heads,
            "group": heads // kv_heads,
            "TILE": 64,
            "DIM": padded,
            "STEP": 32,
        }
        grid = (ceil_div(blocks, 64), ceil_div(rows, 64), batch * heads)
        launches.append(Launch(_pooled_scores, grid, arguments, {"num_warps": 4}))
    launch, counts, lists = rule_launch(
        rule, band, batch=batch, heads=heads, kv_heads=kv_heads, q_block=q_block, kv_block=kv_block, scores=scores,
        allowed=allowed, dial=dial, q_unlike=q_unlike, k_unlike=k_unlike, counter=counter, like=q,
    )  # fmt: skip
    launches.append(launch)
    return launches, counts, lists
