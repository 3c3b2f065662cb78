"""Kept attention mass of sampled rows in Triton: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.attend.reference import listed_blocks
from sparsepass.kernels.mass.api import kept_mass
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing import Case, cases, poisoned_empty
from tests.kernels.device import DEVICE, EXAMPLES, GPU, pytestmark  # noqa: F401
from tests.kernels.mass.sampled_cases import kept_reference, rows_of

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels.mass.triton import sampled_launches
from sparsepass.kernels.runtime.launch import run_all

DRAWN: dict[str, Any] = {"equal_v_dim": True, "max_len": 56}
if GPU:
    DRAWN |= {
        "dtypes": (torch.bfloat16, torch.float16, torch.float32),
        "blocks": (64, 128),
        "head_dims": (64, 80, 256),
        "max_len": 900,
    }


@settings(max_examples=EXAMPLES)
@given(cases(**DRAWN), st.sampled_from([1, 5, 32]))
def test_kept_mass(case: Case, count: int) -> None:
    inputs = case.tensors(DEVICE)
    q, k, mask = inputs.q, inputs.k, inputs.mask
    band = {name: mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
    visible = Visible(**band)
    lists = BlockLists(inputs.kv_num_blocks, inputs.kv_indices, mask["q_block"], mask["kv_block"])
    _, lse = block_sparse_attention(q, k, inputs.v, lists, scale=mask["scale"], visible=visible, return_lse=True)
    assert lse is not None
    with poisoned_empty():
        launches, kept = sampled_launches(q, k, lse, count=count, scale=mask["scale"], **band)
        run_all(launches, q.device)
    listed = listed_blocks(inputs.kv_num_blocks, inputs.kv_indices, -(-k.shape[2] // mask["kv_block"]))
    wanted = kept_reference(q, k, listed, mask, rows_of(q.shape[2], count))
    assert torch.equal(kept.isnan(), wanted.isnan())
    close = 2e-2 if q.dtype in (torch.bfloat16, torch.float16) else 2e-4
    assert (kept.double() - wanted).abs().nan_to_num(0.0).max() <= close


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_captured_and_replayed() -> None:
    """In a CUDA graph the figures follow the inputs, and equal the torch definition."""
    q = torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 2, 4096, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    visible = Visible(right=0)
    num = torch.full((1, 1, 32), 1, dtype=torch.int32, device="cuda")
    index = torch.arange(32, dtype=torch.int32, device="cuda").view(1, 1, 32, 1)
    lists = BlockLists(num, index, 128, 128)

    def run() -> torch.Tensor:
        _, lse = block_sparse_attention(q, k, v, lists, scale=0.1, visible=visible, return_lse=True)
        assert lse is not None
        return kept_mass(q, k, lse, count=32, scale=0.1, visible=visible)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    q.copy_(torch.randn_like(q) * 3)
    graph.replay()
    torch.testing.assert_close(kept, run())
