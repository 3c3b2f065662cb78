"""Block-sparse attention for Hopper GPUs in Gluon: the device code. ``kernels/attend/hopper/launch.py`` launches it.

FlashAttention-3's division of labor (arXiv 2407.08608) over block lists. One warp loads: the TMA engine copies listed
key and value blocks into a ring of shared memory. Two warpgroups compute 64 query rows each: asynchronous ``wgmma``,
with the weights kept in registers, the next Q.K product issued together with the current P.V. The grid is persistent.

Slot j of the ring holds the keys of the j-th listed block and the values of the one before it, so that both products
of a step wait for one barrier. The first step is peeled: it has no values yet. Blocks that need a mask come first in
the lists (``kernels/attend/triton/lists.py``), so the main loop, which does nearly all of the work, has none.

Conventions of shapes, bands, segments and lists: ``kernels/attend/reference.py``.
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

from sparsepass.kernels.runtime.launch import VARYING

synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
"""All threads of one partition meet; the name changed in triton 3.7."""


@gluon.jit
def _next_slot(slot, phase, SLOTS: gl.constexpr):
    following = slot + 1
    wraps = following == SLOTS
    return gl.where(wraps, 0, following), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _place(tile, tiles, kv_heads, GROUP: gl.constexpr):
    """(batch item, KV head, query head, row of tiles): query heads of one KV head side by side, long rows first."""
    row = tiles - 1 - (tile // GROUP) % tiles
    kv_head = (tile // (GROUP * tiles)) % kv_heads
    item = tile // (GROUP * tiles * kv_heads)
    return item, kv_head, kv_head * GROUP + tile % GROUP, row


@gluon.jit
def _first_of_list(
    tile, spans_ptr, parted_ptr, span_stride_b, span_stride_h, tiles, width, kv_heads,
    GROUP: gl.constexpr, PER_ROW: gl.constexpr,
):  # fmt: skip
    """A tile's first listed block, how many there are, and how many of them need a mask."""
    item, _, head, row = _place(tile, tiles, kv_heads, GROUP)
    place = item.to(gl.int64) * span_stride_b + head.to(gl.int64) * span_stride_h + row // PER_ROW
    return gl.load(parted_ptr + place * width), gl.load(spans_ptr + 2 * place), gl.load(spans_ptr + 2 * place + 1)


@gluon.jit
def _write(note, number):
    note.store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _read(note):
    return gl.max(note.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _load_blocks(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, notes, q_full, q_empty, full, empty,
    spans_ptr, parted_ptr, redo_ptr, ticket_ptr, span_stride_b, span_stride_h,
    kv_len, tiles, width, kv_heads, programs,
    GROUP: gl.constexpr, PER_ROW: gl.constexpr, PER_BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: for every tile a note of what it is, its queries, and its blocks as slots become free.

    A slot is full once both its parts, keys and values, have arrived; each announces itself. Tiles are drawn from a
    ticket counter, so that programs with short rows take more of them. A note of tile -1 ends the computing warpgroups.
    """
    BYTES: gl.constexpr = KEYS * DIM * 2
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    slot = 0
    phase = 1
    turn = 0
    tile = gl.program_id(0)
    mbarrier.arrive(full.index(0), count=1)  # the first slot has no values
    listed, count, edge_count = _first_of_list(
        tile, spans_ptr, parted_ptr, span_stride_b, span_stride_h, tiles, width, kv_heads, GROUP, PER_ROW
    )
    while tile < programs:
        item, kv_head, head, row = _place(tile, tiles, kv_heads, GROUP)
        place = item.to(gl.int64) * span_stride_b + head.to(gl.int64) * span_stride_h + row // PER_ROW
        blocks = parted_ptr + place * width
        # A row without blocks computes one past the last key, of which all is hidden.
        key = gl.where(count > 0, listed * (KEYS * PER_BLOCK), kv_len)
        steps = gl.maximum(count * PER_BLOCK, 1)
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        tma.async_copy_global_to_shared(k_desc, [item, kv_head, key, 0], full.index(slot), k_smem.index(slot))
        slot, phase = _next_slot(slot, phase, SLOTS)

        q_slot = turn % Q_SLOTS
        for half in gl.static_range(2):
            mbarrier.wait(q_empty.index(2 * q_slot + half), (turn // Q_SLOTS & 1) ^ 1)
        note = 8 * q_slot
        _write(notes.index(note), tile)
        _write(notes.index(note + 1), steps)
        _write(notes.index(note + 2), edge_count * PER_BLOCK)
        _write(notes.index(note + 3), key)
        _write(notes.index(note + 4), item)
        _write(notes.index(note + 5), head)
        _write(notes.index(note + 6), row)
        _write(notes.index(note + 7), 2 * q_slot)
        gl.store(redo_ptr + tile, 0)
        synchronize()
        for half in gl.static_range(2):
            mbarrier.expect(q_full.index(2 * q_slot + half), 64 * DIM * 2)
            tma.async_copy_global_to_shared(
                q_desc, [item, head, row * 128 + half * 64, 0], q_full.index(2 * q_slot + half),
                q_smem.index(2 * q_slot + half),
            )  # fmt: skip
        turn += 1
        # Asked for now, needed at the end: as a vector it stays in registers, and nothing waits for it before.
        ticket = gl.atomic_add(ticket_ptr + lane * 0, lane * 0 + 1, mask=lane == 0, sem="relaxed")

        for step in range(1, steps):
            following = gl.load(blocks + step // PER_BLOCK) * (KEYS * PER_BLOCK) + step % PER_BLOCK * KEYS
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), BYTES)
            tma.async_copy_global_to_shared(k_desc, [item, kv_head, following, 0], full.index(slot), k_smem.index(slot))
            mbarrier.expect(full.index(slot), BYTES)
            tma.async_copy_global_to_shared(v_desc, [item, kv_head, key, 0], full.index(slot), v_smem.index(slot))
            key = following
            slot, phase = _next_slot(slot, phase, SLOTS)
        tile = gl.num_programs(0) + gl.max(gl.where(lane == 0, ticket, 0), 0)
        # Loaded while the slot of the last values is awaited.
        listed, count, edge_count = _first_of_list(
            gl.minimum(tile, programs - 1), spans_ptr, parted_ptr, span_stride_b, span_stride_h,
            tiles, width, kv_heads, GROUP, PER_ROW,
        )  # fmt: skip
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        tma.async_copy_global_to_shared(v_desc, [item, kv_head, key, 0], full.index(slot), v_smem.index(slot))
    mbarrier.arrive(full.index(slot), count=1)  # the last slot has no keys
    q_slot = turn % Q_SLOTS
    for half in gl.static_range(2):
        mbarrier.wait(q_empty.index(2 * q_slot + half), (turn // Q_SLOTS & 1) ^ 1)
    _write(notes.index(8 * q_slot), -1)
    synchronize()
    for half in gl.static_range(2):
        mbarrier.arrive(q_full.index(2 * q_slot + half), count=1)


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
def _pack(weights, DTYPE: gl.constexpr, PACKED: gl.constexpr):
    """Weights float32 [64, KEYS] in pairs of DTYPE as int32 [64, KEYS / 2], where PACKED, else in DTYPE.

    Carried from step to step as 16-bit values, each takes a register, and two instructions to split and join.
    """
    if PACKED:
        low, high = weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]).split()
        CONVERT: gl.constexpr = "cvt.rn.bf16x2.f32" if gl.bfloat16 == DTYPE else "cvt.rn.f16x2.f32"
        return gl.inline_asm_elementwise(CONVERT + " $0, $2, $1;", "=r,r,r", [low, high], gl.int32, True, 1)
    else:
        return weights.to(DTYPE)


@gluon.jit
def _unpack(packed, DTYPE: gl.constexpr, PACKED: gl.constexpr):
    """The weights of ``_pack``: DTYPE [64, KEYS]."""
    if PACKED:
        SPLIT: gl.constexpr = "mov.b32 {$0, $1}, $2;"
        low, high = gl.inline_asm_elementwise(SPLIT, "=h,=h,r", [packed], (gl.int16, gl.int16), True, 1)
        pairs = gl.join(low, high).reshape([packed.shape[0], packed.shape[1] * 2])
        return pairs.to(DTYPE, bitcast=True)
    else:
        return packed


@gluon.jit
def _compute_rows(
    o_desc, q_smem, o_smem, k_smem, v_smem, notes, q_full, q_empty, full, empty,
    parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr, log2_scale, span_stride_b, span_stride_h,
    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
    q_len, kv_len, left, right, offset, width, heads,
    HALF: gl.constexpr, PER_ROW: gl.constexpr, PER_BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr, DTYPE: gl.constexpr, HAS_SEGMENTS: gl.constexpr,
    HAS_Q_SEGMENTS: gl.constexpr, RETURN_LSE: gl.constexpr,
):  # fmt: skip
    """One computing warpgroup: rows HALF * 64 to HALF * 64 + 63 of every tile.

    With two slots for queries, the last P.V of a tile and the first Q.K of the next are issued together.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    OVERLAP: gl.constexpr = Q_SLOTS == 2
    PACKED: gl.constexpr = DIM <= 128  # at 256 the registers are better used otherwise
    zero = gl.zeros([64, KEYS], gl.float32, SCORES)
    slot = 0
    phase = 0
    turn = 0
    mbarrier.wait(q_full.index(HALF), 0)
    tile = _read(notes.index(0))
    mbarrier.wait(full.index(slot), phase)
    scores = warpgroup_mma(
        q_smem.index(HALF).reshape([64, DIM]), k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0)), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
    synchronize()
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = _next_slot(slot, phase, SLOTS)
    while tile >= 0:
        q_slot = turn % Q_SLOTS
        q = q_smem.index(2 * q_slot + HALF).reshape([64, DIM])
        steps = _read(notes.index(8 * q_slot + 1))
        edges = _read(notes.index(8 * q_slot + 2))
        start = _read(notes.index(8 * q_slot + 3))
        item = _read(notes.index(8 * q_slot + 4))
        head = _read(notes.index(8 * q_slot + 5))
        row = _read(notes.index(8 * q_slot + 6))
        first = row * 128 + HALF * 64
        token = first + gl.arange(0, 64, layout=ROW)
        position = token + offset
        kv_segments = kv_segments_ptr
        q_segment = gl.zeros([64], gl.int32, ROW)
        if HAS_SEGMENTS:
            kv_segments = kv_segments_ptr + item.to(gl.int64) * kv_segments_stride_b
            if HAS_Q_SEGMENTS:
                q_segments = q_segments_ptr + item.to(gl.int64) * q_segments_stride_b
                q_segment = gl.load(q_segments + token.to(gl.int64) * q_segments_stride_s, mask=token < q_len, other=-1)
        scores = _hide(
            scores, start, position, q_segment, kv_segments, kv_segments_stride_s, kv_len, left, right,
            KEYS, SCORES, HAS_SEGMENTS,
        )  # fmt: skip
        top = gl.max(scores, 1) * log2_scale
        # A row that has seen nothing yet has top -inf, and -inf - -inf is NaN.
        base = gl.where(top == float("-inf"), 0.0, top)
        weights = gl.exp2(scores * log2_scale - base[:, None])
        total = gl.sum(weights, 1)
        packed = _pack(weights, DTYPE, PACKED)
        acc = gl.zeros([64, DIM], gl.float32, OUT)
        for step in range(1, edges):
            place = item.to(gl.int64) * span_stride_b + head.to(gl.int64) * span_stride_h + row // PER_ROW
            start = gl.load(parted_ptr + place * width + step // PER_BLOCK) * (KEYS * PER_BLOCK)
            start += step % PER_BLOCK * KEYS
            mbarrier.wait(full.index(slot), phase)
            keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
            operand = gl.convert_layout(_unpack(packed, DTYPE, PACKED), WEIGHTS)
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
            packed = _pack(weights, DTYPE, PACKED)
        if PACKED:
            # The place of the queries, read anew: if both loops share one, ptxas 12.8 computes its descriptors before
            # the first loop alone, and the second reads what is not set where the first is skipped
            # (``kernels/attend/hopper/sass.py``).
            q = q_smem.index(_read(notes.index(8 * q_slot + 7)) + HALF).reshape([64, DIM])
        for _ in range(gl.maximum(edges, 1), steps):
            mbarrier.wait(full.index(slot), phase)
            keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
            operand = gl.convert_layout(_unpack(packed, DTYPE, PACKED), WEIGHTS)
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
            packed = _pack(weights, DTYPE, PACKED)
            slot, phase = _next_slot(slot, phase, SLOTS)

        turn += 1
        next_slot = turn % Q_SLOTS
        next_q = q_smem.index(2 * next_slot + HALF).reshape([64, DIM])
        if OVERLAP:
            mbarrier.arrive(q_empty.index(2 * q_slot + HALF), count=1)  # every warp passed a barrier after its last Q.K
            mbarrier.wait(q_full.index(2 * next_slot + HALF), turn // Q_SLOTS & 1)
            mbarrier.wait(full.index(slot), phase)
            keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
            operand = gl.convert_layout(_unpack(packed, DTYPE, PACKED), WEIGHTS)
            scores = warpgroup_mma(next_q, keys, zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(operand, v_smem.index(slot).reshape([KEYS, DIM]), acc, is_async=True)
            scores, acc = warpgroup_mma_wait(num_outstanding=0, deps=(scores, acc))
            synchronize()
            mbarrier.arrive(empty.index(slot), count=1)
            staged = o_smem.index(HALF)
        else:
            mbarrier.wait(full.index(slot), phase)
            operand = gl.convert_layout(_unpack(packed, DTYPE, PACKED), WEIGHTS)
            acc = warpgroup_mma(operand, v_smem.index(slot).reshape([KEYS, DIM]), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            staged = q_smem.index(HALF)  # shared memory has no room for both
        # total is 0 only for rows that saw nothing: their out is 0 and their log-sum-exp -inf.
        share = gl.where(total == 0.0, 0.0, 1.0 / total)
        acc = acc * gl.convert_layout(share, OUT_ROW)[:, None]
        # 0 times a hidden inf or NaN is NaN: such tiles are computed once more, by a kernel that takes care.
        odd = gl.sum(acc * 0.0, 1)
        out_token = first + gl.arange(0, 64, layout=OUT_ROW)
        gl.store(redo_ptr + tile + out_token * 0, out_token * 0 + 1, mask=(odd != odd) & (out_token < q_len))
        if RETURN_LSE:
            lse = (top + gl.log2(total)) * 0.6931471805599453
            plane = item.to(gl.int64) * heads + head
            gl.store(lse_ptr + plane * q_len + token, lse, mask=token < q_len)
        tma.store_wait(0)  # the staging rows of the tile before have been read
        synchronize()
        staged.reshape([64, DIM]).store(acc.to(DTYPE))
        fence_async_shared()
        synchronize()
        tma.async_copy_shared_to_global(o_desc, [item, head, first, 0], staged)
        if not OVERLAP:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(HALF), count=1)
            mbarrier.wait(q_full.index(HALF), turn & 1)
            keys = k_smem.index(slot).reshape([KEYS, DIM]).permute((1, 0))
            scores = warpgroup_mma(next_q, keys, zero, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
            synchronize()
            mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _next_slot(slot, phase, SLOTS)
        tile = _read(notes.index(8 * next_slot))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=VARYING)
def attend_hopper(
    q_desc, k_desc, v_desc, o_desc,
    spans_ptr, parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr, ticket_ptr, log2_scale,
    span_stride_b, span_stride_h,
    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
    q_len, kv_len, left, right, offset, tiles, width, kv_heads, programs,
    GROUP: gl.constexpr, PER_ROW: gl.constexpr, PER_BLOCK: gl.constexpr, KEYS: gl.constexpr, DIM: gl.constexpr,
    SLOTS: gl.constexpr, Q_SLOTS: gl.constexpr, HAS_SEGMENTS: gl.constexpr, HAS_Q_SEGMENTS: gl.constexpr,
    RETURN_LSE: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 128 query rows per tile. Grid: up to one program per multiprocessor; ``ticket_ptr`` is 0 before."""
    DTYPE: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(DTYPE, [2 * Q_SLOTS, 1, 1, 64, DIM], q_desc.layout)
    o_smem = q_smem
    if Q_SLOTS == 2:
        o_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, DIM], o_desc.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, KEYS, DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [SLOTS, 1, 1, KEYS, DIM], v_desc.layout)
    notes = gl.allocate_shared_memory(gl.int32, [8 * Q_SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2 * Q_SLOTS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * Q_SLOTS, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for part in gl.static_range(2 * Q_SLOTS):
        mbarrier.init(q_full.index(part), count=1)
        mbarrier.init(q_empty.index(part), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=2)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _compute_rows,
                (
                    o_desc, q_smem, o_smem, k_smem, v_smem, notes, q_full, q_empty, full, empty,
                    parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr,
                    log2_scale, span_stride_b, span_stride_h,
                    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
                    q_len, kv_len, left, right, offset, width, kv_heads * GROUP,
                    0, PER_ROW, PER_BLOCK, KEYS, DIM, SLOTS, Q_SLOTS, DTYPE, HAS_SEGMENTS, HAS_Q_SEGMENTS, RETURN_LSE,
                ),
            ),
            (
                _compute_rows,
                (
                    o_desc, q_smem, o_smem, k_smem, v_smem, notes, q_full, q_empty, full, empty,
                    parted_ptr, q_segments_ptr, kv_segments_ptr, lse_ptr, redo_ptr,
                    log2_scale, span_stride_b, span_stride_h,
                    q_segments_stride_b, q_segments_stride_s, kv_segments_stride_b, kv_segments_stride_s,
                    q_len, kv_len, left, right, offset, width, kv_heads * GROUP,
                    1, PER_ROW, PER_BLOCK, KEYS, DIM, SLOTS, Q_SLOTS, DTYPE, HAS_SEGMENTS, HAS_Q_SEGMENTS, RETURN_LSE,
                ),
            ),
            (
                _load_blocks,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, notes, q_full, q_empty, full, empty,
                    spans_ptr, parted_ptr, redo_ptr, ticket_ptr,
                    span_stride_b, span_stride_h, kv_len, tiles, width, kv_heads, programs,
                    GROUP, PER_ROW, PER_BLOCK, KEYS, DIM, SLOTS, Q_SLOTS,
                ),
            ),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
