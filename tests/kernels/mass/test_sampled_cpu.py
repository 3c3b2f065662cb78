"""Kept attention mass of sampled rows on the CPU, against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.kernels.mass import api as sampled
from sparsepass.kernels.types import Visible
from sparsepass.testing import Case, cases
from tests.kernels.mass.sampled_cases import check_kept, rows_of


@given(cases(dtypes=(torch.float32, torch.bfloat16), equal_v_dim=True), st.sampled_from([1, 3, 32]))
def test_kept_mass(case: Case, count: int) -> None:
    check_kept(case, count, "cpu")


@given(cases(dtypes=(torch.float32,), equal_v_dim=True))
def test_keys_in_parts_give_the_same(case: Case) -> None:
    inputs = case.tensors()
    visible = Visible(*(inputs.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")))
    rows = sampled.sampled_rows(case.q_len, 5, torch.device("cpu"))
    whole = sampled.exact_lse(inputs.q, inputs.k, rows, scale=case.scale, visible=visible)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled, "_CHUNK_BYTES", {"cpu": 1})
        patch.setattr(sampled, "LEAST_KEYS", 7)
        parts = sampled.exact_lse(inputs.q, inputs.k, rows, scale=case.scale, visible=visible)
    torch.testing.assert_close(parts, whole)


@given(st.integers(1, 1 << 21), st.integers(1, 64))
def test_rows_are_spread(q_len: int, count: int) -> None:
    rows = sampled.sampled_rows(q_len, count, torch.device("cpu")).tolist()
    assert rows == sorted(rows)
    assert rows[-1] == q_len - 1
    assert all(number * q_len // count <= row for number, row in enumerate(rows[:-1]))
    assert all(row <= (number + 1) * q_len // count for number, row in enumerate(rows[:-1]))
    assert rows == rows_of(q_len, count)


def test_rows_are_at_all_places_of_a_block() -> None:
    """A row at a block's start has seen little of the block that is always kept, one at its end all of it."""
    places = [row % 128 for row in sampled.sampled_rows(16384, 64, torch.device("cpu")).tolist()]
    quarters = [sum(place // 32 == quarter for place in places) for quarter in range(4)]
    assert min(quarters) >= 8
