"""Hypothesis strategies: whole attention problems (``cases``), and their parts for properties of your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.testing.lists import block_mask_of
from sparsepass.testing.memory import LAYOUTS, laid_out
from sparsepass.testing.problem import LISTS, SEGMENTS, SHARED_LISTS, Case, draw_lists
from sparsepass.testing.terms import TERMS

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BANDS = ("causal", "full", "window", "band", "any")
"""Kinds of band: causal; every key; causal window; window to both sides; any two limits at any offset."""

_SEEDS = st.integers(0, 2**31 - 1)


def bands(
    q_len: int, kv_len: int, kinds: Sequence[str] = BANDS, *, offsets: bool = True
) -> st.SearchStrategy[tuple[int, int, int]]:
    """(left, right, offset) of the given ``BANDS``. Without ``offsets`` query row 0 stands at key 0."""
    usual = {0, kv_len - q_len, kv_len // 2, -(q_len // 2)} if offsets else {0}
    offset = st.sampled_from(sorted(usual))
    window = st.integers(0, kv_len)
    edge = st.sampled_from([-1, 0, 5])
    anywhere = st.integers(-q_len, kv_len) if offsets else st.just(0)
    every = {
        "causal": st.tuples(st.just(-1), st.just(0), offset),
        "full": st.tuples(st.just(-1), st.just(-1), offset),
        "window": st.tuples(window, st.just(0), offset),
        "band": st.tuples(window, window, offset),
        "any": st.tuples(edge, edge, anywhere),
    }
    return st.one_of(*(every[kind] for kind in kinds))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16),
    blocks: Sequence[int] = (16, 32),
    head_dims: Sequence[int] = (16, 24, 32),
    max_len: int = 100,
    max_batch: int = 2,
    max_kv_heads: int = 2,
    groups: Sequence[int] = (1, 2, 3),
    bands_of: Sequence[str] = BANDS,
    offsets: bool = True,
    same_length: bool = False,
    scales: Sequence[float] | None = (1.0, 0.1),
    layouts: Sequence[str] = LAYOUTS,
    segments: Sequence[str] = SEGMENTS,
    lists: Sequence[str] = LISTS,
    shared_lists: Sequence[str] = SHARED_LISTS,
    square_blocks: bool = False,
    equal_v_dim: bool = False,
    bad: bool = False,
    terms: Sequence[str] = (),
) -> Case:
    """A ``Case`` of at most ``max_len`` tokens a side, of the given kinds.

    ``scales`` are drawn beside head_dim^-0.5; None for that one alone. ``same_length``: as many queries as keys.
    ``square_blocks``: blocks of as many queries as keys. ``bad`` plants infinite and NaN entries.
    ``terms``: any of these change the scores, one at least if any is named (``TERMS`` has all).
    """
    q_len = draw(st.integers(1, max_len))
    longer = st.integers(q_len, max(q_len, max_len))
    kv_len = q_len if same_length else draw(st.one_of(st.just(q_len), longer, st.integers(1, max_len)))
    left, right, offset = draw(bands(q_len, kv_len, bands_of, offsets=offsets))
    head_dim = draw(st.sampled_from(head_dims))
    layout = draw(st.sampled_from([name for name in layouts if not bad or name != "expanded_batch"] or ["bshd"]))
    q_block = draw(st.sampled_from(blocks))
    return Case(
        batch=draw(st.integers(1, max_batch)),
        kv_heads=draw(st.integers(1, max_kv_heads)),
        group=draw(st.sampled_from(groups)),
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_head_dim=head_dim if equal_v_dim else draw(st.sampled_from([head_dim, *head_dims])),
        dtype=draw(st.sampled_from(dtypes)),
        q_block=q_block,
        kv_block=q_block if square_blocks else draw(st.sampled_from(blocks)),
        left=left,
        right=right,
        offset=offset,
        scale=draw(st.sampled_from([head_dim**-0.5, *(scales or ())])),
        layout=layout,
        segments=draw(st.sampled_from(segments)),
        lists=draw(st.sampled_from(lists)),
        shared_lists=draw(st.sampled_from(shared_lists)),
        bad=draw(st.integers(1, 4)) if bad else 0,
        seed=draw(_SEEDS),
        terms=tuple(sorted(draw(st.sets(st.sampled_from(terms), min_size=1)), key=TERMS.index)) if terms else (),
    )


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: tuple[int, int, int, int],
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    layouts: Sequence[str] = LAYOUTS,
) -> Tensor:
    """A tensor [B, H, S, D] of normal random values on the CPU, under one of the given strides."""
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    return laid_out(shape, draw(st.sampled_from(layouts)), draw(st.sampled_from(dtypes)), generator)


@st.composite
def block_lists(
    draw: st.DrawFn,
    batch: int,
    heads: int,
    q_blocks: int,
    kv_blocks: int,
    *,
    kinds: Sequence[str] = LISTS,
    shared: bool = True,
) -> tuple[Tensor, Tensor]:
    """``kv_num_blocks`` int32 [B, H, nq] and ``kv_indices`` int32 [B, H, nq, nkv], with junk past a row's count.

    With ``shared``, batch or heads may come out as 1, to be broadcast.
    """
    sizes = [draw(st.sampled_from([1, size])) if shared else size for size in (batch, heads)]
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    return draw_lists(draw(st.sampled_from(kinds)), (sizes[0], sizes[1], q_blocks, kv_blocks), generator)


@st.composite
def block_masks(
    draw: st.DrawFn, batch: int, heads: int, q_len: int, kv_len: int, *, blocks: Sequence[int] = (16, 32)
) -> BlockMask:
    """A FlexAttention ``BlockMask``: random blocks of a random band, some of them full blocks, some rows empty."""
    left, right, offset = draw(bands(q_len, kv_len))
    q_block, kv_block = draw(st.sampled_from(blocks)), draw(st.sampled_from(blocks))
    place = torch.arange(q_len)[:, None] + offset
    keys = torch.arange(kv_len)
    seen = (left < 0) | (keys >= place - left)
    seen = seen & ((right < 0) | (keys <= place + right))
    generator = torch.Generator().manual_seed(draw(_SEEDS))
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    named = torch.rand(batch, heads, -(-q_len // q_block), -(-kv_len // kv_block), generator=generator) < share
    wide = named.repeat_interleave(q_block, 2)[:, :, :q_len].repeat_interleave(kv_block, 3)[..., :kv_len]
    return block_mask_of(wide & seen, q_block, kv_block)


def budgets(batch: int, heads: int) -> st.SearchStrategy[float | Tensor]:
    """Shares of the visible blocks to compute: a number from 0 to past 1, or float32 [B or 1, H], one per head."""
    one = st.one_of(st.sampled_from([0.0, 1.0, 1.1]), st.floats(0, 1))

    def each(rows: int) -> st.SearchStrategy[Tensor]:
        row = st.lists(st.floats(0, 1, width=32), min_size=heads, max_size=heads)
        return st.lists(row, min_size=rows, max_size=rows).map(torch.tensor)

    return st.one_of(one, st.sampled_from([1, batch]).flatmap(each))
