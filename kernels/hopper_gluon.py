"""Block-sparse attention for Hopper GPUs in Gluon: the device code. ``kernels/attend_hopper.py`` launches it.

FlashAttention-3's division of labor (arXiv 2407.08608) over block lists. One warp loads: the TMA engine copies listed
key and value blocks into a ring of shared memory. Two warpgroups compute 64 query rows each: asynchronous ``wgmma``,
with the weights kept in registers, the next Q.K product issued together with the current P.V. The grid is persistent.

Slot j of the ring holds the keys of the j-th listed block and the values of the one before it, so that both products
of a step wait for one barrier. The first step is peeled: it has no values yet. Blocks that need a mask come first in
the lists (``kernels/lists_triton.py``), so the main loop, which does nearly all of the work, has none.

Conventions of shapes, bands, segments and lists: ``kernels/reference.py``.
"""

# Written for the API of triton 3.6 and 3.7; ``attend_hopper.why_not`` tests that what is used here exists.
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsepass.kernels.launch import VARYING

synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
"""All threads of one partition meet; the name changed in triton 3.7."""


@gluon.jit
def _next_slot(slot, phase, SLOTS: gl.constexpr):
    following = slot + 1
    wraps = following == SLOTS
    return gl.where(wraps, 0, following), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _tile_of_round(turn, programs):
    """This program's tile in one round. Rounds run forth and back over the programs: long and short even out."""
    place = gl.program_id(0)
    count = gl.num_programs(0)
    place = gl.where((turn & 1) == 1, count - 1 - place, place)
    tile = turn * count + place
    return tile < programs, gl.minimum(tile, programs - 1)


@gluon.jit
def _place(tile, tiles, kv_heads, group):
    """(batch item, KV head, query head, row of tiles): query heads of one KV head side by side, long rows first."""
    row = tiles - 1 - (tile // group) % tiles
    kv_head = (tile // (group * tiles)) % kv_heads
    item = tile // (group * tiles * kv_heads)
    return item, kv_head, kv_head * group + tile % group, row


@gluon.jit
def _load_blocks(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    spans_ptr, parted_ptr, redo_ptr, span_stride_b, span_stride_h,
    tiles, width, kv_heads, group, programs, turns,
    PER_ROW: gl.constexpr, PER_BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: for every tile its queries, then its listed blocks, as slots of the ring become free."""
    BYTES: gl.constexpr = KEYS * DIM * 2
    slot = 0
    phase = 1
    for turn in range(turns):
        live, tile = _tile_of_round(turn, programs)
        if live:
            item, kv_head, head, row = _place(tile, tiles, kv_heads, group)
            listed = row // PER_ROW
            place = item.to(gl.int64) * span_stride_b + head.to(gl.int64) * span_stride_h + listed
            count = gl.load(spans_ptr + 2 * place)
            gl.store(redo_ptr + tile, 0)
            steps = count * PER_BLOCK
            blocks = parted_ptr + place * width
            key = 0
            if steps > 0:
                key = gl.load(blocks) * (KEYS * PER_BLOCK)
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(full.index(slot), BYTES)
                tma.async_copy_global_to_shared(k_desc, [item, kv_head, key, 0], full.index(slot), k_smem.index(slot))
                slot, phase = _next_slot(slot, phase, SLOTS)
            for half in gl.static_range(2):
                mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(half), 64 * DIM * 2)
                tma.async_copy_global_to_shared(
                    q_desc, [item, head, row * 128 + half * 64, 0], q_full.index(half), q_smem.index(half)
                )
            if steps > 0:
                for step in range(1, steps):
                    following = gl.load(blocks + step // PER_BLOCK) * (KEYS * PER_BLOCK) + step % PER_BLOCK * KEYS
                    mbarrier.wait(empty.index(slot), phase)
                    mbarrier.expect(full.index(slot), 2 * BYTES)
                    tma.async_copy_global_to_shared(
                        k_desc, [item, kv_head, following, 0], full.index(slot), k_smem.index(slot)
                    )
                    tma.async_copy_global_to_shared(
                        v_desc, [item, kv_head, key, 0], full.index(slot), v_smem.index(slot)
                    )
                    key = following
                    slot, phase = _next_slot(slot, phase, SLOTS)
                mbarrier.wait(empty.index(slot), phase)
                mbarrier.expect(full.index(slot), BYTES)
                tma.async_copy_global_to_shared(v_desc, [item, kv_head, key, 0], full.index(slot), v_smem.index(slot))
                slot, phase = _next_slot(slot, phase, SLOTS)


@gluon.jit
def _hide(
    scores, start, position, q_segment, kv_segments_ptr, kv_segments_stride, kv_len, left, right,
    KEYS: gl.constexpr, LAYOUT: gl.constexpr, HAS_SEGMENTS: gl.constexpr,
):  # fmt: skip
    """Scores [64, KEYS] of the keys from ``start`` on, with -inf where the pair is not visible."""
    key = start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT))
    low = (position - left)[:, None]
    high = gl.minimum(position + right, kv_len - 1)[:, None]
    visible = (key[None, :] >= low) & (key[None, :] <= high)
    if HAS_SEGMENTS:
        segment = gl.load(kv_segments_ptr + key.to(gl.int64) * kv_segments_stride, mask=key < kv_len, other=-1)
        visible = visible & (segment != -1)[None, :] & (segment[None, :] == q_segment[:, None])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _compute_rows(
    o_desc, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, full, empty,
    spans_ptr, parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr, log2_scale,
    span_stride_b, span_stride_h,
    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
    q_len, kv_len, left, right, offset, tiles, width, kv_heads, group, programs, turns,
    HALF: gl.constexpr, PER_ROW: gl.constexpr, PER_BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    SLOTS: gl.constexpr, DTYPE: gl.constexpr, HAS_SEGMENTS: gl.constexpr, HAS_Q_SEGMENTS: gl.constexpr,
    RETURN_LSE: gl.constexpr,
):  # fmt: skip
    """One computing warpgroup: rows HALF * 64 to HALF * 64 + 63 of every tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    q = q_smem.index(HALF).reshape([64, DIM])
    STAGE_IN_Q: gl.constexpr = DIM > 128  # o_smem is then q_smem
    staged = o_smem.index(HALF)
    zero = gl.zeros([64, KEYS], gl.float32, SCORES)
    slot = 0
    phase = 0
    for turn in range(turns):
        live, tile = _tile_of_round(turn, programs)
        if live:
            item, _, head, row = _place(tile, tiles, kv_heads, group)
            listed = row // PER_ROW
            place = item.to(gl.int64) * span_stride_b + head.to(gl.int64) * span_stride_h + listed
            count = gl.load(spans_ptr + 2 * place)
            edges = gl.load(spans_ptr + 2 * place + 1)
            blocks = parted_ptr + place * width
            steps = count * PER_BLOCK
            edge_steps = edges * PER_BLOCK
            first = row * 128 + HALF * 64
            token = first + gl.arange(0, 64, layout=ROW)
            position = token + offset
            acc = gl.zeros([64, DIM], gl.float32, OUT)
            top = gl.full([64], float("-inf"), gl.float32, ROW)
            total = gl.zeros([64], gl.float32, ROW)
            mbarrier.wait(q_full.index(HALF), turn & 1)
            if steps > 0:
                start = gl.load(blocks) * (KEYS * PER_BLOCK)
                kv_segments = kv_segments_ptr
                q_segment = gl.zeros([64], gl.int32, ROW)
                if HAS_SEGMENTS:
                    kv_segments = kv_segments_ptr + item.to(gl.int64) * kv_segments_stride_b
                    if HAS_Q_SEGMENTS:
                        q_segments = q_segments_ptr + item.to(gl.int64) * q_segments_stride_b
                        q_segment = gl.load(
                            q_segments + token.to(gl.int64) * q_segments_stride_s, mask=token < q_len, other=-1
                        )
                mbarrier.wait(full.index(slot), phase)
                keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
                scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
                synchronize()
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = _next_slot(slot, phase, SLOTS)
                scores = _hide(
                    scores, start, position, q_segment, kv_segments, kv_segments_stride_s, kv_len, left, right,
                    KEYS, SCORES, HAS_SEGMENTS,
                )  # fmt: skip
                top = gl.max(scores, 1) * log2_scale
                # A row that has seen nothing yet has top -inf, and -inf - -inf is NaN.
                base = gl.where(top == float("-inf"), 0.0, top)
                weights = gl.exp2(scores * log2_scale - base[:, None])
                total = gl.sum(weights, 1)
                operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
                for step in range(1, edge_steps):
                    start = gl.load(blocks + step // PER_BLOCK) * (KEYS * PER_BLOCK) + step % PER_BLOCK * KEYS
                    mbarrier.wait(full.index(slot), phase)
                    keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
                    scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
                    acc = warpgroup_mma(operand, v_smem.index(slot).reshape([KEYS, DIM]), acc, is_async=True)
                    scores, acc = warpgroup_mma_wait(num_outstanding=0, deps=(scores, acc))
                    synchronize()
                    mbarrier.arrive(empty.index(slot), count=1)
                    slot, phase = _next_slot(slot, phase, SLOTS)
                    scores = _hide(
                        scores, start, position, q_segment, kv_segments, kv_segments_stride_s, kv_len, left, right,
                        KEYS, SCORES, HAS_SEGMENTS,
                    )  # fmt: skip
                    new_top = gl.maximum(top, gl.max(scores, 1) * log2_scale)
                    base = gl.where(new_top == float("-inf"), 0.0, new_top)
                    decay = gl.exp2(top - base)
                    weights = gl.exp2(scores * log2_scale - base[:, None])
                    total = total * decay + gl.sum(weights, 1)
                    top = new_top
                    acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None]
                    operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
                for _ in range(gl.maximum(edge_steps, 1), steps):
                    mbarrier.wait(full.index(slot), phase)
                    keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
                    scores = warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)
                    acc = warpgroup_mma(operand, v_smem.index(slot).reshape([KEYS, DIM]), acc, is_async=True)
                    scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
                    new_top = gl.maximum(top, gl.max(scores, 1) * log2_scale)
                    decay = gl.exp2(top - new_top)
                    weights = gl.exp2(scores * log2_scale - new_top[:, None])
                    total = total * decay + gl.sum(weights, 1)
                    top = new_top
                    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
                    synchronize()
                    mbarrier.arrive(empty.index(slot), count=1)
                    acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None]
                    operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
                    slot, phase = _next_slot(slot, phase, SLOTS)
                if not STAGE_IN_Q:
                    mbarrier.arrive(q_empty.index(HALF), count=1)  # every warp passed a barrier after its last Q.K
                mbarrier.wait(full.index(slot), phase)
                acc = warpgroup_mma(operand, v_smem.index(slot).reshape([KEYS, DIM]), acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
                synchronize()
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = _next_slot(slot, phase, SLOTS)
            elif not STAGE_IN_Q:
                mbarrier.arrive(q_empty.index(HALF), count=1)
            # total is 0 only for rows that saw nothing: their out is 0 and their log-sum-exp -inf.
            share = gl.where(total == 0.0, 0.0, 1.0 / total)
            acc = acc * gl.convert_layout(share, OUT_ROW)[:, None]
            # 0 times a hidden inf or NaN is NaN: such tiles are computed once more, by a kernel that takes care.
            odd = gl.sum(acc * 0.0, 1)
            out_token = first + gl.arange(0, 64, layout=OUT_ROW)
            gl.store(redo_ptr + tile + out_token * 0, out_token * 0 + 1, mask=(odd != odd) & (out_token < q_len))
            if RETURN_LSE:
                lse = (top + gl.log2(total)) * 0.6931471805599453
                plane = item.to(gl.int64) * (kv_heads * group) + head
                gl.store(lse_ptr + plane * q_len + token, lse, mask=token < q_len)
            tma.store_wait(0)  # the staging rows of the tile before have been read
            synchronize()
            staged.reshape([64, DIM]).store(acc.to(DTYPE))
            fence_async_shared()
            synchronize()
            tma.async_copy_shared_to_global(o_desc, [item, head, first, 0], staged)
            if STAGE_IN_Q:
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(HALF), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=VARYING)
def attend_hopper(
    q_desc, k_desc, v_desc, o_desc,
    spans_ptr, parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr, log2_scale,
    span_stride_b, span_stride_h,
    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
    q_len, kv_len, left, right, offset, tiles, width, kv_heads, group, programs, turns,
    PER_ROW: gl.constexpr, PER_BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr, SLOTS: gl.constexpr,
    HAS_SEGMENTS: gl.constexpr, HAS_Q_SEGMENTS: gl.constexpr, RETURN_LSE: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 128 query rows per tile. Grid: one program per multiprocessor, each taking ``turns`` tiles."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], q_desc.layout)
    o_smem = q_smem  # shared memory has no room for both at 256
    if DIM <= 128:
        o_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], o_desc.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, KEYS, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, KEYS, DIM], v_desc.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for half in gl.static_range(2):
        mbarrier.init(q_full.index(half), count=1)
        mbarrier.init(q_empty.index(half), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _compute_rows,
                (
                    o_desc, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, full, empty,
                    spans_ptr, parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr,
                    log2_scale, span_stride_b, span_stride_h,
                    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
                    q_len, kv_len, left, right, offset, tiles, width, kv_heads, group, programs, turns,
                    0, PER_ROW, PER_BLOCK, KEYS, DIM, SLOTS, DTYPE, HAS_SEGMENTS, HAS_Q_SEGMENTS, RETURN_LSE,
                ),
            ),
            (
                _compute_rows,
                (
                    o_desc, q_smem, o_smem, k_smem, v_smem, q_full, q_empty, full, empty,
                    spans_ptr, parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr,
                    log2_scale, span_stride_b, span_stride_h,
                    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
                    q_len, kv_len, left, right, offset, tiles, width, kv_heads, group, programs, turns,
                    1, PER_ROW, PER_BLOCK, KEYS, DIM, SLOTS, DTYPE, HAS_SEGMENTS, HAS_Q_SEGMENTS, RETURN_LSE,
                ),
            ),
            (
                _load_blocks,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, full, empty,
                    spans_ptr, parted_ptr, redo_ptr,
                    span_stride_b, span_stride_h, tiles, width, kv_heads, group, programs, turns,
                    PER_ROW, PER_BLOCK, KEYS, DIM, SLOTS,
                ),
            ),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
