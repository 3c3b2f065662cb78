"""``check_attention``: every check of this kit on a kernel of yours, as one call in one test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from torch import Tensor

from sparsepass.errors import KernelInputError
from sparsepass.testing.accuracy import assert_as_accurate_as_dense, assert_lse, assert_nonfinite_reach
from sparsepass.testing.calling import Kernel, Signature
from sparsepass.testing.corners import corner_cases
from sparsepass.testing.memory import LAYOUTS, leave_stale, poisoned_empty
from sparsepass.testing.problem import LISTS, SEGMENTS, SHARED_LISTS, Case, Inputs
from sparsepass.testing.strategies import BANDS, cases
from sparsepass.testing.terms import TERMS

PADDING = ("none", "left_pad", "right_pad", "all_padding")
"""The kinds of segments that need no ``q_segments``."""


@dataclass(frozen=True)
class Checked:
    """What a kernel passed. ``str()`` of it is a few lines for the log."""

    kernel: str
    corners: tuple[str, ...]
    examples: int
    kinds: dict[str, Any]
    """What cases were drawn from: keyword arguments of ``strategies.cases``."""
    left_out: tuple[str, ...]
    """What was not tried, each with the reason."""

    def __str__(self) -> str:
        lines = [f"{self.kernel}: passed {len(self.corners)} fixed cases and {self.examples} drawn ones"]
        return "\n  not tried: ".join([*lines, *self.left_out])


def check_attention(
    kernel: Kernel,
    *,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    head_dims: Sequence[int] = (64,),
    blocks: Sequence[int] = (64,),
    max_len: int = 300,
    max_batch: int = 2,
    groups: Sequence[int] = (1, 2, 3),
    bands: Sequence[str] | None = None,
    offsets: bool | None = None,
    layouts: Sequence[str] = LAYOUTS,
    segments: Sequence[str] | None = None,
    lists: Sequence[str] = LISTS,
    shared_lists: Sequence[str] = SHARED_LISTS,
    equal_v_dim: bool = True,
    nonfinite: bool = False,
    examples: int = 25,
) -> Checked:
    """Check a block-sparse attention kernel against float64, over every kind of input it says it takes.

    ``kernel(q, k, v, kv_num_blocks, kv_indices, *, ...)``, tensors as in ``Inputs``, or ``kernel(q, k, v, *,
    block_mask)``, returning the output [B, H, Sq, Dv], or it and the log-sum-exp. The names of its other arguments say
    what it can do (``calling.ACCEPTED``): without ``kv_segments`` no padding is tried, without ``left`` no window,
    without ``offset`` as many queries as keys; with one of ``TERMS`` scores are changed too. The limits
    narrow it further: ``bands`` of ``strategies.BANDS``; ``layouts``, ``segments``, ``lists`` and ``shared_lists`` of
    the constants of those names; ``offsets=False`` for queries that start at key 0. ``nonfinite`` demands that infinite
    and NaN tokens reach only the rows that see them, which many kernels in use do not keep.

    Checked for each case: error at most twice that of dense attention in the same dtype (plus one rounding), 0 where
    nothing is visible, the log-sum-exp where there is one, outputs written whole, inputs left alone, nothing kept from
    one call in the next. First a fixed set of cases, then ``examples`` drawn by hypothesis, the same ones each time.
    Raises ``AssertionError`` that names the case; ``check_case`` replays it. ``KernelInputError`` for wrong arguments.
    """
    call = Signature(kernel)
    kinds, left_out = _kinds(call, blocks, bands, offsets, segments)
    kinds |= {
        "dtypes": tuple(dtypes),
        "head_dims": tuple(head_dims),
        "blocks": tuple(blocks),
        "max_len": max_len,
        "max_batch": max_batch,
        "max_kv_heads": 2,
        "groups": tuple(groups),
        "layouts": tuple(layouts),
        "lists": tuple(lists),
        "shared_lists": tuple(shared_lists),
        "equal_v_dim": equal_v_dim,
    }
    if not nonfinite:
        left_out = (*left_out, "non-finite inputs (nonfinite=True tries them)")
    corners = corner_cases(kinds)
    corners |= {f"scores: {name}": replace(corners["plain"], terms=(name,)) for name in TERMS if name in call.takes}
    if nonfinite:
        solid = [name for name in layouts if name != "expanded_batch"]
        corners |= {
            f"non-finite inputs, {name}": replace(case, bad=3, layout=solid[0])
            for name, case in list(corners.items())
            if solid and not name.startswith(("layout", "scale"))
        }
    _check_repeated(call, corners["plain"], device)
    for name, case in corners.items():
        _named(call, name, case, device)

    quiet = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )

    def drawn(case: Case) -> None:
        _named(call, "drawn", case, device)

    terms = tuple(name for name in TERMS if name in call.takes)
    runs = [(some, bad) for bad in (False, True)[: 1 + nonfinite] for some in ((), terms)[: 1 + bool(terms)]]
    for some, bad in runs:
        quiet(given(case=cases(**kinds, terms=some, bad=bad))(drawn))()
    return Checked(call.name, tuple(corners), examples * len(runs), kinds, left_out)


def check_case(kernel: Kernel, case: Case, *, device: torch.device | str = "cpu") -> None:
    """The checks of ``check_attention`` on one case, for instance the one that an error names."""
    _check(Signature(kernel), case, device)


def _named(call: Signature, name: str, case: Case, device: torch.device | str) -> None:
    try:
        _check(call, case, device)
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"raised {type(error).__name__}: "
        raise AssertionError(
            f"{call.name}, case {name!r}: {kind}{error}\nTo replay: sparsepass.testing.check_case({call.name}, {case})"
        ) from error


def _check(call: Signature, case: Case, device: torch.device | str) -> Tensor:
    inputs = case.tensors(device)
    before = _contents(inputs)
    leave_stale(inputs.q)
    with poisoned_empty():
        out, lse = call(inputs)
    q, v = inputs.q, inputs.v
    expected = (*q.shape[:3], v.shape[3])
    if tuple(out.shape) != expected or out.dtype != q.dtype or out.device != q.device:
        raise AssertionError(
            f"the output is {tuple(out.shape)}, {out.dtype} on {out.device}; "
            f"expected {expected}, {q.dtype} on {q.device}"
        )
    changed = [name for name, kept in before.items() if not _same(kept, _contents(inputs)[name])]
    if changed:
        raise AssertionError(f"the kernel wrote into its inputs: {', '.join(changed)}")
    if case.bad:
        assert_nonfinite_reach(out, inputs)
        return out
    assert_as_accurate_as_dense(out, inputs)
    if lse is not None:
        assert_lse(lse, inputs)
    return out


def _contents(inputs: Inputs) -> dict[str, Tensor]:
    names = ("q", "k", "v", "kv_num_blocks", "kv_indices")
    kept = {name: getattr(inputs, name).clone() for name in names}
    kept |= {name: x.clone() for name, x in inputs.mask.items() if isinstance(x, Tensor)}
    given = {name: getattr(inputs.scores, name, None) for name in TERMS}
    return kept | {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num()) if one.is_floating_point() else torch.equal(one, other)


def _check_repeated(call: Signature, case: Case, device: torch.device | str) -> None:
    """A second call on other data neither changes the first output nor sees what the first call left."""
    _named(call, "plain", case, device)
    first_inputs = case.tensors(device)
    first, _ = call(first_inputs)
    _named(call, "a second call", replace(case, seed=case.seed + 1, lists="empty_rows"), device)
    try:
        assert_as_accurate_as_dense(first, first_inputs)
    except AssertionError as error:
        raise AssertionError(f"{call.name}: a second call changed the output of the first: {error}") from error


def _kinds(
    call: Signature,
    blocks: Sequence[int],
    bands: Sequence[str] | None,
    offsets: bool | None,
    segments: Sequence[str] | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the arguments of a kernel let it be asked, as arguments of ``cases``; and what they rule out, and why."""
    takes = call.takes
    by_mask = "block_mask" in takes
    left_out: list[str] = []
    if bands is None:
        bands = ["full"]
        if by_mask or takes & {"causal", "right"}:
            bands += ["causal"]
        if by_mask or ("left" in takes and takes & {"causal", "right"}):
            bands += ["window"]
        if by_mask or {"left", "right"} <= takes:
            bands += ["band", "any"]
        missing = [kind for kind in BANDS if kind not in bands]
        if missing:
            left_out.append(f"bands {', '.join(missing)} (no argument left, right or causal to say so)")
    if segments is None:
        segments = SEGMENTS if by_mask or {"q_segments", "kv_segments"} <= takes else PADDING
        if not (by_mask or "kv_segments" in takes):
            segments = ("none",)
            left_out.append("padding and packing (no argument kv_segments)")
        elif segments is PADDING:
            left_out.append("packing (no argument q_segments)")
    unknown = {*bands} - {*BANDS} | {*segments} - {*SEGMENTS}
    if unknown:
        raise KernelInputError(
            f"{', '.join(sorted(unknown))}: accepted bands are {', '.join(BANDS)}; segments {', '.join(SEGMENTS)}."
        )
    if offsets is None:
        offsets = by_mask or "offset" in takes
        if not offsets:
            left_out.append("queries at another place than their keys (no argument offset)")
    same_length = not offsets and set(bands) != {"full"}
    if "scale" not in takes:
        left_out.append("scales but head_dim^-0.5 (no argument scale)")
    sides = {"q_block", "kv_block"} <= takes or by_mask
    if not sides and "block" not in takes and len(blocks) > 1:
        raise KernelInputError(
            f"blocks is {tuple(blocks)}, but {call.name} is told no block size: it takes neither q_block and kv_block "
            "nor block. Name one size, the one it has."
        )
    kinds: dict[str, Any] = {
        "bands_of": tuple(bands),
        "segments": tuple(segments),
        "offsets": offsets,
        "same_length": same_length,
        "scales": (1.0, 0.1) if "scale" in takes else None,
        "square_blocks": not sides,
    }
    return kinds, tuple(left_out)
