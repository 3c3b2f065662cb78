"""Launches block-sparse attention on CUDA devices.

First every row's list is ordered: blocks that need a mask (at the edge of the band, of a segment, of the keys), then
those whose every pair is visible. Then comes the attention; its main loop, which does nearly all of the work, has no
mask at all. There are two implementations of it: ``hopper`` (Gluon, ``kernels/attend/hopper/launch.py``) and ``triton``
for all other GPUs and for the inputs that the first does not take. Last, inf and NaN values from masked blocks are
brought to the rows that see them; that finds nothing to do unless there are any. Conventions of shapes, bands, segments
and lists: ``kernels/attend/reference.py``.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.kernels.arguments import check_counter, check_lists, check_segments
from sparsepass.kernels.attend.hopper import launch as attend_hopper
from sparsepass.kernels.attend.triton.block_map import block_map_cuda, in_kernel_form, pair_arguments, term_arguments
from sparsepass.kernels.attend.triton.kernel import attend, attend_again
from sparsepass.kernels.attend.triton.lists import partition_launches
from sparsepass.kernels.attend.triton.visible import add_nonfinite_values
from sparsepass.kernels.blocks import ceil_div, split_head, tile_side
from sparsepass.kernels.runtime import launch as host
from sparsepass.kernels.runtime.launch import Launch
from sparsepass.kernels.runtime.prepared import run_prepared
from sparsepass.kernels.runtime.tuned import tile_for
from sparsepass.kernels.scores import Scores, check_blocks, check_scores
from sparsepass.kernels.spec import AttendTile, attend_tile, capability_of, refuse_unsupported

LOG2E = 1.4426950408889634

IMPLEMENTATIONS = ("auto", "hopper", "triton")
"""``auto`` is ``hopper`` wherever it takes the inputs. One asked for by name never falls back."""


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
    scores: Scores | None = None,
    blocks: Tensor | None = None,
    skip: float = 0.0,
    return_lse: bool = False,
    counter: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention over the listed key blocks, in fp16, bf16 or fp32 with float32 accumulation.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv], one dtype, any strides.
        kv_num_blocks, kv_indices: int32 block lists as in FlexAttention's ``BlockMask``; see
        ``kernels/attend/reference.py``.
        scale: factor on the scores before the softmax.
        left, right, offset: band, in tokens; -1 lifts a side.
        q_segments, kv_segments: int32 [B, Sq] and [B, Skv], or None.
        q_block, kv_block: tokens per list block, powers of two from 16 up.
        scores: what happens to the scaled scores before the softmax.
        blocks: a block map [B or 1, H or 1, nq, nkv] as ``block_map_cuda`` makes it, which is done here if it is None
            and the scores hide pairs; listed blocks for which it has 0 are skipped.
        skip: of listed blocks, as ``BlockLists.skip``; those that need a mask come first and are all computed, and
            on GPUs of compute capability 10 all are.
        return_lse: also return the log-sum-exp.
        counter: int64 [3] on the device; [0] += 1, [1] += blocks computed over all (batch, head, row).
        implementation: ``hopper``, ``triton``, or ``auto`` for the first that takes the inputs.

    Returns:
        out [B, H, Sq, Dv] (laid out [B, Sq, H, Dv]), and float32 [B, H, Sq] log-sum-exp (natural log) or None. Rows
        that see nothing are 0 and -inf. Nothing synchronizes with the host.

    Raises:
        KernelInputError: shapes, dtypes, devices or sizes that the kernel does not take.
    """
    scores = in_kernel_form(check_scores(scores, q, k))
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    blocks = None if blocks is None else blocks.contiguous()
    if blocks is None and scores.hides:
        host.check_shapes(q, k, v, offset, q_block, kv_block)
        sizes: dict[str, Any] = {"q_len": q.shape[2], "kv_len": k.shape[2], "q_block": q_block, "kv_block": kv_block}
        segments: dict[str, Any] = dict(zip(("q_segments", "kv_segments"), (q_segments, kv_segments), strict=True))
        blocks = block_map_cuda(scores, left=left, right=right, offset=offset, batch=q.shape[0], **segments, **sizes)
    options: dict[str, Any] = {
        "scale": scale,
        "left": left,
        "right": right,
        "offset": offset,
        "q_block": q_block,
        "kv_block": kv_block,
        "return_lse": return_lse,
        "implementation": implementation,
        "skip": skip,
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
            scores=scores,
            blocks=blocks,
            **options,
        )
        return launches, tuple(outputs)

    inputs = (q, k, v, kv_num_blocks, kv_indices, q_segments, kv_segments, counter, *scores.tensors, blocks)
    out, lse = run_prepared(q.device, ("attend", scores.softcap, *options.values()), inputs, build)
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
    hopper_tile: attend_hopper.HopperTile | None = None,
    implementation: str = "auto",
    scores: Scores | None = None,
    blocks: Tensor | None = None,
    skip: float = 0.0,
) -> tuple[list[Launch], Tensor, Tensor | None]:
    """The launches of ``block_sparse_attention_cuda`` and the tensors they fill. The tiles override the tuned ones.

    ``scores``: in the form of ``in_kernel_form``; ``blocks``: their map where they hide pairs.
    """
    scores = Scores() if scores is None else scores
    host.check_shapes(q, k, v, offset, q_block, kv_block)
    check_lists(kv_num_blocks, kv_indices, q, q_block)
    check_counter(counter, q)
    q_segments, kv_segments = check_segments(q, k, q_segments, kv_segments)
    refuse_unsupported("block_sparse_attention_cuda", q, v.shape[3])
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, v_head_dim = k.shape[1], k.shape[2], v.shape[3]
    host.require(
        implementation in IMPLEMENTATIONS,
        lambda: f"implementation is {implementation!r}; accepted are {', '.join(IMPLEMENTATIONS)}.",
    )
    # Triton 3.7 fails to compile a product under a condition for newer GPUs: everything is computed there.
    skips = skip > 0 and capability_of(q.device)[0] < 10
    if tile is None:
        if head_dim == v_head_dim and not scores.given and not skips:
            tile = tile_for(q.device, q.dtype, head_dim)
        else:  # what was tuned was neither
            both = scores.bias is not None and scores.mask is not None
            added = skips or scores.slopes is not None or scores.bias is not None
            terms = 3 if both else 2 if added else int(scores.given)
            tile = attend_tile(q.dtype, head_dim, capability_of(q.device), v_head_dim=v_head_dim, terms=terms)
    out = q.new_empty(batch, q_len, heads, v_head_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32) if return_lse else None

    launches, parted, spans, ticket = partition_launches(
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
        blocks=blocks,
    )
    unused = spans  # a pointer for what is not there; never read
    block_m, block_n = min(tile.block_m, q_block), min(tile.block_n, kv_block)
    tiles = ceil_div(q_len, block_m)
    block_d, tail = split_head(head_dim, tile.dim_step)
    programs = batch * heads * tiles
    flags = spans.new_empty(programs)
    common: dict[str, Any] = {
        "v_ptr": v,
        "out_ptr": out,
        "flags_ptr": flags,
        "spans_ptr": spans,
        "parted_ptr": parted,
        "q_segments_ptr": unused if q_segments is None else q_segments,
        "kv_segments_ptr": unused if kv_segments is None else kv_segments,
        **dict(zip(("v_stride_b", "v_stride_h", "v_stride_s", "v_stride_d"), v.stride(), strict=True)),
        "q_segments_stride_b": 0 if q_segments is None else q_segments.stride(0),
        "q_segments_stride_s": 1 if q_segments is None else q_segments.stride(1),
        "kv_segments_stride_b": 0 if kv_segments is None else kv_segments.stride(0),
        "kv_segments_stride_s": 1 if kv_segments is None else kv_segments.stride(1),
        "span_stride_b": parted.shape[1] * parted.shape[2] if parted.shape[0] > 1 else 0,
        "span_stride_h": parted.shape[2] if parted.shape[1] > 1 else 0,
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
        "log2_scale": abs(scale) * LOG2E if scale else 1.0,
        **dict(zip(("q_stride_b", "q_stride_h", "q_stride_s", "q_stride_d"), q.stride(), strict=True)),
        **dict(zip(("k_stride_b", "k_stride_h", "k_stride_s", "k_stride_d"), k.stride(), strict=True)),
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
    fast = None
    if implementation != "triton":
        redo = spans.new_empty(programs)
        fast = attend_hopper.launch(
            q,
            k,
            v,
            out,
            lse,
            parted,
            spans,
            redo,
            ticket,
            common,
            scale=scale,
            q_block=q_block,
            kv_block=kv_block,
            tile=hopper_tile,
            scores=scores,
            skip=skip,
        )
    if isinstance(fast, Launch):
        launches.append(fast)
        arguments |= {"redo_ptr": redo, "programs": programs, "REDO": 64}
        launches.append(Launch(attend_again, (ceil_div(programs, 64),), arguments, options))
    elif implementation == "hopper":
        raise KernelInputError(f"The hopper kernel was asked for: {fast}")
    else:
        arguments |= {"TAIL": tail, "skip": math.log2(skip) if skips else None, **term_arguments(scores, scale)}
        launches.append(Launch(attend, (programs,), arguments, options))
    arguments = {**common, **pair_arguments(scores), "programs": programs, "STEP": 16, "FLAGS": 64}
    # Neither count keeps every size in registers; Triton 3.8 spills fp32 of up to 64 dimensions for sm_100 with 8.
    single = v.dtype == torch.float32 and v.shape[3] <= 64 and capability_of(v.device)[0] >= 10
    warps = 4 if single or 64 < v.shape[3] <= 128 else 8
    launches.append(
        Launch(add_nonfinite_values, (ceil_div(programs, 64),), arguments, {"num_warps": warps, "num_stages": 1})
    )
    return launches, out, lse
