"""Skip-softmax in the plain Triton kernel against the eager reference: on a GPU, else under the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.testing import Case, Inputs, cases, poisoned_empty
from tests.kernels.attend.skip_checks import SKIPS, check_bound, check_skipped, with_levels
from tests.kernels.device import DEVICE, EXAMPLES, GPU, pytestmark

pytest.importorskip("triton", reason="Triton is not installed")

from sparsepass.kernels.attend.hopper import launch as attend_hopper
from sparsepass.kernels.attend.reference import listed_blocks, visible_pairs
from sparsepass.kernels.attend.triton.launch import block_sparse_attention_cuda
from sparsepass.kernels.spec import attend_tile, capability_of

DRAWN: dict[str, Any] = {"max_len": 64, "equal_v_dim": True}
if GPU:
    DRAWN |= {"dtypes": (torch.bfloat16, torch.float32), "blocks": (64, 128), "head_dims": (64, 128), "max_len": 500}
    DRAWN |= {"max_batch": 1, "layouts": ("bshd", "strided_dim")}


FEWER = EXAMPLES if GPU else 4
pytestmark = [
    *pytestmark,
    pytest.mark.skipif(GPU and torch.cuda.get_device_capability()[0] >= 10, reason="nothing is skipped on this GPU"),
]


def runner(inputs: Inputs) -> Callable[[float], tuple[Tensor, Tensor | None]]:
    def run(skip: float) -> tuple[Tensor, Tensor | None]:
        given = (inputs.q, inputs.k, inputs.v, inputs.kv_num_blocks, inputs.kv_indices)
        with poisoned_empty():
            return block_sparse_attention_cuda(*given, **inputs.mask, return_lse=True, skip=skip)

    return run


def sides(inputs: Inputs) -> tuple[int, int]:
    """Rows and keys of the kernel's tiles."""
    tile = attend_tile(inputs.q.dtype, inputs.q.shape[3], capability_of(inputs.q.device), terms=2)
    return min(tile.block_m, inputs.mask["q_block"]), min(tile.block_n, inputs.mask["kv_block"])


def order_of(inputs: Inputs, rows: int, keys: int) -> Callable[[int, int, int], Sequence[tuple[int, bool]]]:
    """Blocks that need a mask come first and are all computed, the others follow from the last to the first."""
    q_block, kv_block = inputs.mask["q_block"], inputs.mask["kv_block"]
    batch, heads, q_len, _ = inputs.q.shape
    kv_len = inputs.k.shape[2]
    named = listed_blocks(inputs.kv_num_blocks, inputs.kv_indices, -(-kv_len // kv_block)).cpu()
    named = named.expand(batch, heads, -1, -1)
    band = {name: inputs.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
    seen = visible_pairs(q_len, kv_len, batch=batch, device=inputs.q.device, **band).cpu()

    def order(item: int, head: int, tile: int) -> list[tuple[int, bool]]:
        row = tile * rows // q_block
        listed: list[int] = named[item, head, row].nonzero().flatten().tolist()

        def whole(block: int) -> bool:
            part = seen[item, row * q_block : (row + 1) * q_block, block * kv_block : (block + 1) * kv_block]
            return bool(part.all()) and (block + 1) * kv_block <= kv_len

        edges, inner = [b for b in listed if not whole(b)], [b for b in reversed(listed) if whole(b)]
        per = kv_block // keys
        return [(b * per + i, b in inner) for b in edges + inner for i in range(per)]

    return order


@settings(max_examples=FEWER)
@given(cases(**DRAWN, segments=("none",)), st.sampled_from(SKIPS))
def test_skips_what_the_reference_skips(case: Case, skip: float) -> None:
    inputs = case.tensors(DEVICE)
    rows, keys = sides(inputs)
    check_skipped(inputs, runner(inputs), order_of(inputs, rows, keys), rows, keys, skip)


@settings(max_examples=FEWER)
@given(cases(**DRAWN), st.sampled_from([1e-6, 1e-3]))
def test_what_is_lost_is_bounded(case: Case, skip: float) -> None:
    inputs = case.tensors(DEVICE)
    check_bound(inputs, runner(inputs), skip)


def test_the_edge_is_at_the_logarithm() -> None:
    size = 128 if GPU else 32
    case = Case(
        batch=1, kv_heads=1, group=2, q_len=4 * size, kv_len=4 * size, head_dim=64 if GPU else 16,
        v_head_dim=64 if GPU else 16, dtype=torch.float32, q_block=size, kv_block=size, left=-1, right=0, offset=0,
        scale=0.2, layout="bshd", segments="none", lists="full", shared_lists="both", bad=0, seed=3,
    )  # fmt: skip
    inputs = with_levels(case.tensors(DEVICE), [-1.0, -2.6, -2.0, 0.0])  # log(0.1) is -2.3
    rows, keys = sides(inputs)
    assert check_skipped(inputs, runner(inputs), order_of(inputs, rows, keys), rows, keys, 0.1)
    assert not torch.equal(runner(inputs)(0.1)[0], runner(inputs)(0.0)[0])


def test_the_hopper_kernel_refuses() -> None:
    q = torch.empty(1, 1, 128, 64, dtype=torch.bfloat16)
    reason = attend_hopper.why_not(q, q, q, scale=0.1, q_block=128, kv_block=128, skip=0.1)
    assert reason == "It skips no listed block."
