"""Block-sparse attention in Triton: FlashAttention-2's online softmax (arXiv 2307.08691) over listed key blocks.

Three launches. The first orders every row's list: blocks that need a mask (at the edge of the band, of a segment, of
the keys), then those whose every pair is visible. The second is the attention; its main loop, which does nearly all of
the work, has no mask at all. The third brings inf and NaN values from masked blocks to the rows that see them, and
finds nothing to do unless there are any. Conventions of shapes, bands, segments and lists: ``kernels/reference.py``.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsepass.kernels import launch as host
from sparsepass.kernels.blocks import ceil_div, tile_side
from sparsepass.kernels.launch import VARYING, Launch
from sparsepass.kernels.lists_triton import partition_launches
from sparsepass.kernels.prepared import run_prepared
from sparsepass.kernels.spec import AttendTile, refuse_unsupported
from sparsepass.kernels.tuned import tile_for
from sparsepass.kernels.visible_triton import add_nonfinite_values, program_place, visible_pairs

LOG2E = 1.4426950408889634


@triton.jit
def _fold_block(
    q,
    acc,
    total,
    top,
    flag,
    k_tile,
    v_tile,
    k_stride_s,
    v_stride_s,
    start,
    position,
    q_segment,
    kv_segments_ptr,
    kv_segments_stride,
    kv_len,
    left,
    right,
    log2_scale,
    inside,
    v_dim_mask,
    q_stride_d,
    k_stride_d,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    EVEN_DV: tl.constexpr,
    SIGN: tl.constexpr,
    MASKED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: folds the keys ``start .. start + KEYS`` into (acc, total, top, flag).

    ``top`` is the running maximum of the raw scores; ``flag`` turns 1 at a masked block with a non-finite value.
    """
    k_ptrs = k_tile + start.to(tl.int64) * k_stride_s
    v_ptrs = v_tile + start.to(tl.int64) * v_stride_s
    if MASKED:
        visible, there = visible_pairs(
            start, position, q_segment, kv_segments_ptr, kv_segments_stride, kv_len, left, right, KEYS, SEGMENTS
        )
    else:
        there = tl.full([KEYS], 1, tl.int1)

    if DIM_STEP == BLOCK_D:
        if MASKED or HEAD_DIM != BLOCK_D:
            k = tl.load(k_ptrs, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[:, None] & there[None, :], other=0.0)
        else:
            k = tl.load(k_ptrs)
        scores = tl.dot(q, k, input_precision=PRECISION)
    else:  # q is then a tile of pointers
        scores = tl.zeros([q.shape[0], KEYS], tl.float32)
        for begin in tl.static_range(0, BLOCK_D, DIM_STEP):
            here = begin + tl.arange(0, DIM_STEP) < HEAD_DIM
            step = tl.full([], begin, tl.int64)
            q_part = tl.load(q + step * q_stride_d, mask=inside[:, None] & here[None, :], other=0.0)
            k_part = tl.load(k_ptrs + step * k_stride_d, mask=here[:, None] & there[None, :], other=0.0)
            scores += tl.dot(q_part, k_part, input_precision=PRECISION)
    if SIGN != 1:
        scores = scores * SIGN
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has top -inf, and -inf - -inf is NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) * log2_scale
    weights = tl.math.exp2(scores * log2_scale - base[:, None])
    decay = tl.math.exp2(top * log2_scale - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    if MASKED:
        v = tl.load(v_ptrs, mask=v_dim_mask[None, :] & there[:, None], other=0.0)
        # A weight of 0 times a hidden inf or NaN is NaN, so such values wait for add_nonfinite_values.
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        flag = tl.maximum(flag, tl.max((finite == 0).to(tl.int32)))
        acc = tl.dot(weights.to(v.dtype), tl.where(finite, v, 0.0), acc, input_precision=PRECISION)
    else:
        v = tl.load(v_ptrs) if EVEN_DV else tl.load(v_ptrs, mask=v_dim_mask[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top, flag


@triton.jit(do_not_specialize=VARYING)
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    flags_ptr,
    counts_ptr,
    edge_counts_ptr,
    parted_ptr,
    q_segments_ptr,
    kv_segments_ptr,
    log2_scale,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    v_stride_d,
    q_segments_stride_b,
    q_segments_stride_s,
    kv_segments_stride_b,
    kv_segments_stride_s,
    count_stride_b,
    count_stride_h,
    count_stride_r,
    edge_stride_b,
    edge_stride_h,
    q_len,
    kv_len,
    left,
    right,
    offset,
    tiles,
    width,
    kv_heads,
    group,
    SIGN: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIM_STEP: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_Q_SEGMENTS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of BLOCK_M query rows of one head against its listed blocks. Grid: 1-D, batch * heads * tiles."""
    program = tl.program_id(0)
    item, kv_head, head, tile = program_place(program, tiles, kv_heads, group)
    row = tile * BLOCK_M // Q_BLOCK

    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < q_len
    v_dim = tl.arange(0, BLOCK_DV)
    v_dim_mask = v_dim < V_HEAD_DIM
    item64 = item.to(tl.int64)
    token64 = token.to(tl.int64)

    dim = tl.arange(0, DIM_STEP).to(tl.int64)
    q_base = q_ptr + item64 * q_stride_b + head.to(tl.int64) * q_stride_h
    q = q_base + token64[:, None] * q_stride_s + dim[None, :] * q_stride_d
    if DIM_STEP == BLOCK_D:
        q = tl.load(q, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    k_base = k_ptr + item64 * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_base = v_ptr + item64 * v_stride_b + kv_head.to(tl.int64) * v_stride_h
    edge_key = tl.arange(0, EDGE_N).to(tl.int64)
    k_edge = k_base + dim[:, None] * k_stride_d + edge_key[None, :] * k_stride_s
    v_edge = v_base + edge_key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d
    key = tl.arange(0, BLOCK_N).to(tl.int64)
    k_tile = k_base + dim[:, None] * k_stride_d + key[None, :] * k_stride_s
    v_tile = v_base + key[:, None] * v_stride_s + v_dim.to(tl.int64)[None, :] * v_stride_d

    kv_segments = kv_segments_ptr
    q_segment = tl.zeros([BLOCK_M], tl.int32)
    if HAS_SEGMENTS:
        kv_segments = kv_segments_ptr + item64 * kv_segments_stride_b
        if HAS_Q_SEGMENTS:
            q_segments = q_segments_ptr + item64 * q_segments_stride_b
            q_segment = tl.load(q_segments + token64 * q_segments_stride_s, mask=inside, other=-1)
    position = token + offset

    list_ptr = counts_ptr + item64 * count_stride_b + head.to(tl.int64) * count_stride_h
    count = tl.load(list_ptr + row.to(tl.int64) * count_stride_r)
    place = item64 * edge_stride_b + head.to(tl.int64) * edge_stride_h + row
    edges = tl.load(edge_counts_ptr + place)
    blocks = parted_ptr + place * width
    PER_EDGE: tl.constexpr = KV_BLOCK // EDGE_N
    PER_BLOCK: tl.constexpr = KV_BLOCK // BLOCK_N
    EVEN_DV: tl.constexpr = V_HEAD_DIM == BLOCK_DV

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    flag = 0
    for step in tl.range(0, edges * PER_EDGE, num_stages=EDGE_STAGES):
        start = tl.load(blocks + step // PER_EDGE) * KV_BLOCK + step % PER_EDGE * EDGE_N
        acc, total, top, flag = _fold_block(
            q, acc, total, top, flag, k_edge, v_edge, k_stride_s, v_stride_s, start, position, q_segment,
            kv_segments, kv_segments_stride_s, kv_len, left, right, log2_scale, inside, v_dim_mask,
            q_stride_d, k_stride_d, EDGE_N, HEAD_DIM, BLOCK_D, DIM_STEP, EVEN_DV, SIGN, True, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip
    for step in range(edges * PER_BLOCK, count * PER_BLOCK):
        start = tl.load(blocks + step // PER_BLOCK) * KV_BLOCK + step % PER_BLOCK * BLOCK_N
        acc, total, top, flag = _fold_block(
            q, acc, total, top, flag, k_tile, v_tile, k_stride_s, v_stride_s, start, position, q_segment,
            kv_segments, kv_segments_stride_s, kv_len, left, right, log2_scale, inside, v_dim_mask,
            q_stride_d, k_stride_d, BLOCK_N, HEAD_DIM, BLOCK_D, DIM_STEP, EVEN_DV, SIGN, False, HAS_SEGMENTS, PRECISION,
        )  # fmt: skip

    tl.store(flags_ptr + program, flag)

    # total is 0 only for rows that saw nothing: their acc is 0 and their log-sum-exp -inf.
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = kv_heads * group
    out_row = (item64 * q_len + token64) * heads + head
    tl.store(
        out_ptr + out_row[:, None] * V_HEAD_DIM + v_dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & v_dim_mask[None, :],
    )
    if RETURN_LSE:
        lse = (tl.where(total == 0.0, 0.0, top) * log2_scale + tl.math.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (item64 * heads + head) * q_len + token, lse, mask=inside)


def block_sparse_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None = None,
    kv_segments: Tensor | None = None,
    q_block: int,
    kv_block: int,
    return_lse: bool = False,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the listed key blocks, in fp16, bf16 or fp32 with float32 accumulation.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv], one dtype, any strides.
        kv_num_blocks, kv_indices: int32 block lists as in FlexAttention's ``BlockMask``; see ``kernels/reference.py``.
        scale: factor on the scores before the softmax.
        left, right, offset: band, in tokens; -1 lifts a side.
        q_segments, kv_segments: int32 [B, Sq] and [B, Skv], or None.
        q_block, kv_block: tokens per list block, powers of two from 16 up.
        return_lse: also return the log-sum-exp.
        counter: int64 [3] on the device; [0] += 1, [1] += blocks computed over all (batch, head, row).

    Returns:
        out [B, H, Sq, Dv] (laid out [B, Sq, H, Dv]), and float32 [B, H, Sq] log-sum-exp (natural log) or None. Rows
        that see nothing are 0 and -inf. Nothing synchronizes with the host.

    Raises:
        KernelInputError: shapes, dtypes, devices or sizes that the kernel does not take.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "left": left,
        "right": right,
        "offset": offset,
        "q_block": q_block,
        "kv_block": kv_block,
        "return_lse": return_lse,
    }

    def build() -> tuple[list[Launch], tuple[Tensor | None, ...]]:
        launches, *outputs = attend_launches(
            q,
            k,
            v,
            kv_num_blocks,
            kv_indices,
            q_segments=q_segments,
            kv_segments=kv_segments,
            counter=counter,
            **options,
        )
        return launches, tuple(outputs)

    inputs = (q, k, v, kv_num_blocks, kv_indices, q_segments, kv_segments, counter)
    out, lse = run_prepared(q.device, ("attend", *options.values()), inputs, build)
    return cast(Tensor, out), lse


def attend_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    scale: float,
    left: int,
    right: int,
    offset: int,
    q_segments: Tensor | None,
    kv_segments: Tensor | None,
    q_block: int,
    kv_block: int,
    return_lse: bool,
    counter: Tensor | None,
    tile: AttendTile | None = None,
) -> tuple[list[Launch], Tensor, Tensor | None]:
    """The launches of ``block_sparse_attention_cuda`` and the tensors they fill. ``tile`` overrides the tuned one."""
    host.check_shapes(q, k, v, offset, q_block, kv_block)
    host.check_lists(kv_num_blocks, kv_indices, q, q_block)
    host.check_counter(counter, q)
    q_segments, kv_segments = host.check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("block_sparse_attention_cuda", q, v.shape[3])
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_head_dim = k.shape[1], k.shape[2], v.shape[3]
    if tile is None:
        tile = tile_for(q.device, q.dtype, max(head_dim, v_head_dim))
    out = q.new_empty(batch, q_len, heads, v_head_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32) if return_lse else None

    launches, parted, edge_counts = partition_launches(
        kv_num_blocks,
        kv_indices,
        q_len=q_len,
        kv_len=kv_len,
        batch=batch,
        heads=heads,
        left=left,
        right=right,
        offset=offset,
        q_segments=q_segments,
        kv_segments=kv_segments,
        q_block=q_block,
        kv_block=kv_block,
        counter=counter,
    )
    unused = edge_counts  # a pointer for what is not there; never read
    block_m, block_n = min(tile.block_m, q_block), min(tile.block_n, kv_block)
    tiles = ceil_div(q_len, block_m)
    block_d = tile_side(head_dim)
    programs = batch * heads * tiles
    flags = edge_counts.new_empty(programs)
    common: dict[str, Any] = {
        "v_ptr": v,
        "out_ptr": out,
        "flags_ptr": flags,
        "edge_counts_ptr": edge_counts,
        "parted_ptr": parted,
        "q_segments_ptr": unused if q_segments is None else q_segments,
        "kv_segments_ptr": unused if kv_segments is None else kv_segments,
        **dict(zip(("v_stride_b", "v_stride_h", "v_stride_s", "v_stride_d"), v.stride(), strict=True)),
        "q_segments_stride_b": 0 if q_segments is None else q_segments.stride(0),
        "q_segments_stride_s": 1 if q_segments is None else q_segments.stride(1),
        "kv_segments_stride_b": 0 if kv_segments is None else kv_segments.stride(0),
        "kv_segments_stride_s": 1 if kv_segments is None else kv_segments.stride(1),
        "edge_stride_b": edge_counts.stride(0) if edge_counts.shape[0] > 1 else 0,
        "edge_stride_h": edge_counts.stride(1) if edge_counts.shape[1] > 1 else 0,
        "q_len": q_len,
        "kv_len": kv_len,
        "left": host.side(left),
        "right": host.side(right),
        "offset": offset,
        "tiles": tiles,
        "width": kv_indices.shape[3],
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "Q_BLOCK": q_block,
        "KV_BLOCK": kv_block,
        "BLOCK_M": block_m,
        "V_HEAD_DIM": v_head_dim,
        "BLOCK_DV": tile_side(v_head_dim),
        "HAS_SEGMENTS": kv_segments is not None,
        "HAS_Q_SEGMENTS": q_segments is not None,
    }
    arguments = {
        **common,
        "q_ptr": q,
        "k_ptr": k,
        "lse_ptr": out if lse is None else lse,
        "counts_ptr": kv_num_blocks,
        "log2_scale": abs(scale) * LOG2E if scale else 1.0,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_s", "k_stride_d"), k.stride(), strict=True)),
        "count_stride_b": kv_num_blocks.stride(0) if kv_num_blocks.shape[0] > 1 else 0,
        "count_stride_h": kv_num_blocks.stride(1) if kv_num_blocks.shape[1] > 1 else 0,
        "count_stride_r": kv_num_blocks.stride(2),
        "SIGN": int(math.copysign(1, scale)) if scale else 0,
        "BLOCK_N": block_n,
        "EDGE_N": min(tile.edge_n, kv_block),
        "EDGE_STAGES": tile.edge_stages,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "DIM_STEP": min(tile.dim_step, block_d),
        "RETURN_LSE": return_lse,
        "PRECISION": tile.precision,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    launches.append(Launch(_attend, (programs,), arguments, options))
    arguments = {**common, "programs": programs, "STEP": 16, "FLAGS": 64}
    warps = 4 if 64 < v.shape[3] <= 128 else 8  # neither count keeps every size in registers
    launches.append(
        Launch(add_nonfinite_values, (ceil_div(programs, 64),), arguments, {"num_warps": warps, "num_stages": 1})
    )
    return launches, out, lse
