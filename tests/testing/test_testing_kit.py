"""The public kernel test kit: it passes right kernels, finds each wrong one, and says what it did not try."""

from __future__ import annotations

import warnings
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsepass import testing
from sparsepass.errors import KernelInputError
from sparsepass.functional import from_block_mask, sparse_attention
from sparsepass.kernels.attend.cpu.launch import block_sparse_attention_cpu
from sparsepass.kernels.scores import Scores
from sparsepass.testing import Case, cases, check_attention, check_case, corner_cases, poisoned_empty
from tests.testing.faulty_kernel import FAULTS, tiled

SMALL: dict[str, Any] = {"head_dims": (16,), "blocks": (16, 32), "max_len": 80}
PLAIN = Case(
    batch=2, kv_heads=2, group=2, q_len=41, kv_len=41, head_dim=16, v_head_dim=16, dtype=torch.float32, q_block=16,
    kv_block=16, left=-1, right=0, offset=0, scale=0.25, layout="bshd", segments="none", lists="random",
    shared_lists="none", bad=0, seed=7,
)  # fmt: skip


def faulty(fault: str) -> Any:
    return update_wrapper(partial(tiled, fault=fault), tiled)


def causal_only(q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, *, causal: bool) -> Tensor:
    """One fixed block size, nothing but causality."""
    right = 0 if causal else -1
    out, _ = tiled(
        q, k, v, kv_num_blocks, kv_indices, scale=q.shape[-1] ** -0.5, left=-1, right=right, offset=0,
        q_segments=None, kv_segments=None, q_block=16, kv_block=16,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_right_kernel_passes(dtype: torch.dtype) -> None:
    checked = check_attention(
        tiled, dtypes=(dtype, torch.float64), equal_v_dim=False, nonfinite=True, examples=10, **SMALL
    )
    assert checked.left_out == ()
    assert checked.examples == 20
    assert "tiled: passed" in str(checked)


def test_our_kernel_passes() -> None:
    check_attention(
        block_sparse_attention_cpu, dtypes=(torch.bfloat16,), head_dims=(32,), blocks=(64,), max_len=150, examples=10,
        nonfinite=True,
    )  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault: str) -> None:
    with pytest.raises(AssertionError, match="tiled") as found:
        check_attention(faulty(fault), **SMALL)
    assert "raised" not in str(found.value)  # found by its results


@pytest.mark.parametrize("fault", ["reads past kv_len", "stale output memory", "missing diagonal mask"])
def test_drawn_cases_find_faults_too(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fixed cases taken away the property-based half has to find it, and shrinks it."""
    monkeypatch.setattr("sparsepass.testing.check.corner_cases", lambda kinds: {"plain": PLAIN})
    monkeypatch.setattr("sparsepass.testing.check._check_repeated", lambda *args: None)
    monkeypatch.setattr("sparsepass.testing.check._named", _unless_plain)
    with pytest.raises(AssertionError, match="'drawn'") as found:
        check_attention(faulty(fault), **SMALL)
    assert "batch=1, kv_heads=1, group=1" in str(found.value)


def _unless_plain(call: Any, name: str, case: Case, device: str) -> None:
    if name == "drawn":
        try:
            testing.check._check(call, case, device)
        except AssertionError as error:
            raise AssertionError(f"{name!r} {case}") from error


def test_the_error_names_the_case_and_it_replays() -> None:
    with pytest.raises(AssertionError) as found:
        check_attention(faulty("padding ignored"), **SMALL)
    first, second = str(found.value).splitlines()[:2]
    assert first.startswith("tiled, case 'segments: left_pad': ")
    case = eval(second.split("tiled, ", 1)[1].removesuffix(")"), {"Case": Case, "torch": torch})
    with pytest.raises(AssertionError, match=r"see no key|float64"):
        check_case(faulty("padding ignored"), case)
    check_case(tiled, case)


def test_an_exception_counts_as_a_failure_of_the_case() -> None:
    def refuses(q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
        raise NotImplementedError("no such tile")

    with pytest.raises(AssertionError, match="case 'plain': raised NotImplementedError: no such tile"):
        check_attention(refuses, head_dims=(16,), blocks=(16,))


def test_what_a_kernel_does_not_take_is_not_tried() -> None:
    checked = check_attention(causal_only, head_dims=(16,), blocks=(16,), max_len=50, examples=5)
    assert checked.kinds["bands_of"] == ("full", "causal")
    assert checked.kinds["segments"] == ("none",)
    assert checked.kinds["same_length"]
    assert checked.kinds["scales"] is None
    report = str(checked)
    for text in ("no argument kv_segments", "no argument offset", "no argument scale", "window", "nonfinite=True"):
        assert text in report
    with pytest.raises(KernelInputError, match="Name one size"):
        check_attention(causal_only, blocks=(16, 32))


def test_a_kernel_of_block_masks() -> None:
    """FlexAttention's form: lists and mask in one object. ``flex_attention`` itself passes the fixed cases."""
    from torch.nn.attention.flex_attention import flex_attention

    def flex(q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_mask: Any) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)

    def ours(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, block_mask: Any) -> Any:
        return sparse_attention(q, k, v, block_mask, scale=scale, causal=causal)

    some: dict[str, Any] = {"head_dims": (16,), "blocks": (64,), "max_len": 150, "examples": 3}
    check_attention(ours, bands=("causal", "full"), offsets=False, segments=("none",), **some)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager flex_attention says at every call that it is slow
        for lists in ("sparse", "empty_rows"):
            check_case(flex, Case(**{**vars(PLAIN), "lists": lists, "segments": "packed", "left": 9}))


def test_refusals() -> None:
    def odd(
        q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, *, temperature: float
    ) -> Tensor:
        return q

    with pytest.raises(KernelInputError, match="needs temperature, which the checks do not give"):
        check_attention(odd)
    with pytest.raises(KernelInputError, match="takes 1 positional arguments"):
        check_attention(lambda q: q)
    with pytest.raises(KernelInputError, match="sideways: accepted bands are causal"):
        check_attention(tiled, bands=("sideways",))
    with pytest.raises(AssertionError, match="returned str"):
        check_attention(lambda *args: "done")


def test_fixed_cases_respect_the_limits() -> None:
    kinds = check_attention(causal_only, head_dims=(16,), blocks=(16,), max_len=50, examples=1).kinds
    for case in corner_cases(kinds).values():
        assert case.q_len == case.kv_len <= 50
        assert (case.left, case.offset, case.segments, case.scale) == (-1, 0, "none", 0.25)
        assert case.q_block == case.kv_block == 16


@given(case=cases())
def test_cases_replay_from_their_repr(case: Case) -> None:
    again = eval(repr(case), {"Case": Case, "torch": torch})
    one, other = case.tensors(), again.tensors()
    assert torch.equal(one.q, other.q)
    assert torch.equal(one.kv_indices, other.kv_indices)
    assert one.q.stride() == other.q.stride()


@given(lists=testing.block_lists(2, 3, 4, 5))
def test_block_lists_are_valid_and_their_rest_is_junk(lists: tuple[Tensor, Tensor]) -> None:
    num, indices = lists
    assert num.dtype == indices.dtype == torch.int32
    testing.listed_blocks(num, indices, 5)  # raises on a malformed list
    assert num.shape[0] in (1, 2)
    assert num.shape[1] in (1, 3)


@given(block_mask=testing.block_masks(1, 2, 70, 90))
def test_block_masks_are_read_back_as_lists(block_mask: Any) -> None:
    lists = from_block_mask(block_mask)
    q_block, kv_block = block_mask.BLOCK_SIZE
    pairs = torch.stack([_pairs(block_mask, head, 70, 90) for head in range(2)])[None]
    named = testing.listed_blocks(lists.kv_num_blocks, lists.kv_indices, -(-90 // kv_block))
    expected = torch.zeros_like(named)
    for row in range(named.shape[2]):
        for column in range(named.shape[3]):
            rows = slice(row * q_block, (row + 1) * q_block)
            part = pairs[:, :, rows, column * kv_block : (column + 1) * kv_block]
            expected[:, :, row, column] = part.flatten(2).any(-1)
    assert torch.equal(named, expected)


def _pairs(block_mask: Any, head: int, q_len: int, kv_len: int) -> Tensor:
    q_index, kv_index = torch.meshgrid(torch.arange(q_len), torch.arange(kv_len), indexing="ij")
    pairs: Tensor = block_mask.mask_mod(torch.tensor(0), torch.tensor(head), q_index, kv_index)
    return pairs


@given(budget=testing.budgets(2, 3), x=testing.tensors((2, 3, 5, 8)), data=st.data())
def test_budgets_tensors_and_bands(budget: float | Tensor, x: Tensor, data: st.DataObject) -> None:
    if isinstance(budget, Tensor):
        assert budget.dtype == torch.float32
        assert tuple(budget.shape) in ((1, 3), (2, 3))
    assert 0 <= torch.as_tensor(budget).min() <= torch.as_tensor(budget).max() <= 1.1
    assert tuple(x.shape) == (2, 3, 5, 8)
    assert x.isfinite().all()
    left, right, offset = data.draw(testing.bands(7, 9, ("window",), offsets=False))
    assert (left >= 0, right, offset) == (True, 0, 0)


def test_poisoned_memory_shows_what_was_not_written() -> None:
    original = torch.empty
    with poisoned_empty():
        for made in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(3)):
            assert made.isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == -123).all()
    assert torch.empty is original
    guarded = testing.laid_out((1, 2, 5, 8), "guarded", torch.float16, torch.Generator().manual_seed(0))
    behind = guarded.as_strided((1, 2, 6, 8), guarded.stride())
    assert behind[:, :, :5].isfinite().all()
    assert behind[:, :, 5].isnan().all()
    with pytest.raises(ValueError, match="accepted are bhsd"):
        testing.laid_out((1, 1, 1, 1), "diagonal", torch.float16, torch.Generator())


def test_every_public_name_is_there() -> None:
    assert all(getattr(testing, name) is not None for name in testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = testing.nothing


def test_terms_that_a_kernel_takes_are_tried() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor, num: Tensor, lists: Tensor, *, softcap: Any = None, **mask: Any) -> Any:
        return block_sparse_attention_cpu(q, k, v, num, lists, **mask, scores=Scores(softcap=softcap))

    checked = check_attention(capped, **SMALL, examples=5)
    assert "scores: softcap" in checked.corners

    def forgets(
        q: Tensor, k: Tensor, v: Tensor, num: Tensor, lists: Tensor, *, softcap: Any = None, **mask: Any
    ) -> Any:
        return block_sparse_attention_cpu(q, k, v, num, lists, **mask)

    with pytest.raises(AssertionError, match="scores: softcap"):
        check_attention(forgets, **SMALL, examples=5)
