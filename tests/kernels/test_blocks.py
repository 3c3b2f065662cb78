"""Block arithmetic against counting on the full mask."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.kernels.attend.reference import block_scores_reference, select_blocks_reference
from sparsepass.kernels.blocks import blocks_per_row, cumulative_kept_blocks, list_width, visible_block_counts
from sparsepass.testing import bands

SHAPES = st.integers(1, 90).flatmap(
    lambda q_len: st.integers(1, 90).flatmap(
        lambda kv_len: st.tuples(
            st.just(q_len), st.just(kv_len), bands(q_len, kv_len), st.sampled_from([7, 16]), st.sampled_from([8, 16])
        )
    )
)


def counted(q_len: int, kv_len: int, band: tuple[int, int, int], q_block: int, kv_block: int) -> list[int]:
    left, right, offset = band
    x = torch.zeros(1, 1, max(q_len, kv_len), 1)
    _, allowed, _ = block_scores_reference(
        x[:, :, :q_len],
        x[:, :, :kv_len],
        scale=1.0,
        left=left,
        right=right,
        offset=offset,
        q_segments=None,
        kv_segments=None,
        q_block=q_block,
        kv_block=kv_block,
    )
    counts: list[int] = allowed[0, 0].sum(-1).tolist()
    return counts


@given(SHAPES)
def test_visible_blocks_are_those_of_the_full_mask(shape: tuple[int, int, tuple[int, int, int], int, int]) -> None:
    q_len, kv_len, band, q_block, kv_block = shape
    assert list(visible_block_counts(q_len, kv_len, *band, q_block, kv_block)) == counted(*shape)


@given(SHAPES, st.floats(0, 1.2))
def test_budget_is_the_smallest_that_reaches_the_density(
    shape: tuple[int, int, tuple[int, int, int], int, int], density: float
) -> None:
    q_len, kv_len, band, q_block, kv_block = shape
    counts = counted(*shape)
    budget = blocks_per_row(q_len, kv_len, *band, q_block, kv_block, density)
    wanted = min(density, 1.0) * sum(counts)
    assert sum(min(budget, n) for n in counts) >= wanted
    assert budget == 0 or sum(min(budget - 1, n) for n in counts) < wanted
    kept = cumulative_kept_blocks(q_len, kv_len, *band, q_block, kv_block)
    assert kept[budget] == sum(min(budget, n) for n in counts)
    assert budget <= list_width(kv_len, kv_block, budget) <= max(1, -(-kv_len // kv_block))


def test_causal_128k_budget_in_numbers() -> None:
    # 1024 rows, row i sees i + 1 blocks: 26 a row is the first budget over a twentieth of 524800.
    assert blocks_per_row(2**17, 2**17, -1, 0, 0, 128, 128, 0.05) == 26
    assert 1024 * 26 - 26 * 25 // 2 >= 0.05 * 524800 > 1024 * 25 - 25 * 24 // 2


def test_reference_selection_keeps_sink_and_diagonal_first() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 160, 8), torch.randn(1, 1, 160, 8)
    count, indices = select_blocks_reference(
        q,
        k,
        scale=1.0,
        left=-1,
        right=0,
        offset=0,
        q_segments=None,
        kv_segments=None,
        q_block=16,
        kv_block=16,
        density=0.01,
    )
    assert count[0, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    assert indices[0, 0, 7].tolist() == [0, 6, 7]
