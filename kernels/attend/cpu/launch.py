"""Block-sparse attention and block selection on the CPU: the entry points.

Attention has two implementations of the same meaning: a C++ kernel (``kernels/attend/cpu/attend.cpp``, built at first
use with the compiler that Inductor needs too) and gathered blocks in torch operations, for machines or types without
the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.kernels.attend.cpu import gather as cpu_gather
from sparsepass.kernels.attend.cpu import native as cpu_native
from sparsepass.kernels.attend.cpu.block_map import block_map_cpu
from sparsepass.kernels.attend.cpu.visible import Visibility
from sparsepass.kernels.scores import Scores, check_blocks, check_scores, without_hidden


@torch.no_grad()
def block_sparse_attention_cpu(
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
    scores: Scores | None = None,
    blocks: Tensor | None = None,
    skip: float = 0.0,
    return_lse: bool = False,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the listed key blocks of every query block.

    Args:
        q: [B, H, Sq, D], fp16, bf16, fp32 or fp64, any strides.
        k: [B, Hkv, Skv, D], v: [B, Hkv, Skv, Dv]; query head h reads key/value head ``h // (H // Hkv)``.
        kv_num_blocks: int32 [B or 1, H or 1, q_blocks], listed blocks per query block.
        kv_indices: int32 [B or 1, H or 1, q_blocks, width]; the first ``kv_num_blocks`` entries of a row are valid,
            unique and ascending, the rest is ignored. These are the fields of FlexAttention's ``BlockMask``.
        scale: factor of the scores.
        left, right, offset: the band, in tokens: query i at position i + offset sees keys position - left to
            position + right; -1 lifts a side.
        q_segments, kv_segments: int32 [B, Sq] and [B, Skv] or None; a key is visible to queries of its own segment
            only, and to none if that is -1. ``q_segments=None`` beside ``kv_segments``: all queries are of segment 0.
        q_block, kv_block: tokens per block of the lists.
        scores: what happens to the scaled scores before the softmax.
        blocks: a block map [B or 1, H or 1, q_blocks, kv_blocks] as ``block_map_cpu`` makes it, which is done here if
            it is None and the scores hide pairs; listed blocks for which it has 0 are skipped.
        skip: of listed blocks, as ``BlockLists.skip``; gathered blocks are all computed.
        return_lse: whether to return the log-sum-exp.
        counter: int64 [3]; [0] += 1, [1] += blocks attended to, over batch, heads and rows.

    Returns:
        out [B, H, Sq, Dv] of q's dtype, laid out [B, Sq, H, Dv]; and the natural log-sum-exp of the scaled scores,
        float32 [B, H, Sq], or None. Queries that see no key give 0 and -inf.

    Raises:
        IndexError: a listed block is outside the keys.
        KernelInputError: ``scores`` or ``blocks`` do not fit.
    """
    scores = check_scores(scores, q, k) or Scores()
    batch, heads, q_len, _ = q.shape
    mask = Visibility(q_len, k.shape[2], q_block, kv_block, left, right, offset, q_segments, kv_segments)
    blocks = check_blocks(blocks, q, k, q_block, kv_block)
    if blocks is None and scores.hides:
        size = {"q_len": q_len, "kv_len": k.shape[2], "q_block": q_block, "kv_block": kv_block}
        band = {"left": left, "right": right, "offset": offset}
        blocks = block_map_cpu(scores, **band, **size, batch=batch, q_segments=q_segments, kv_segments=kv_segments)
    if blocks is not None:
        kv_num_blocks, kv_indices = without_hidden(kv_num_blocks, kv_indices, blocks)
    counts = kv_num_blocks.expand(batch, heads, -1)
    indices = kv_indices.expand(batch, heads, -1, -1)
    if cpu_native.available(q.dtype):
        out, lse = cpu_native.attend(q, k, v, counts, indices, mask, scale, return_lse, scores, blocks, skip)
    else:
        out, lse = cpu_gather.attend(q, k, v, counts, indices, mask, scale, return_lse, scores, blocks)
    if counter is not None:
        counter[0] += 1
        counter[1] += counts.sum()
    return out, lse
