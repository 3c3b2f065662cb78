"""How close a result must be: a multiple of the error that the dense kernel itself makes against float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparsepass.kernels.attend.reference import changed_scores
from sparsepass.testing.problem import Inputs

TIMES_DENSE = 2.0
"""A kernel may err this many times as much as dense attention in the same dtype."""

LSE_TOLERANCE = (2e-3, 1e-3)
"""Absolute and relative tolerance of the log-sum-exp, whose scores are sums of products in float32."""


def dense_error(inputs: Inputs, reference: Tensor) -> float:
    """Largest error against float64 that dense SDPA makes at the inputs' own precision, over rows that see anything.

    Where scores are changed, as SDPA cannot, it is eager attention: scores and softmax in float32, weights rounded. A
    float64 reference errs as much as what is of its own precision, and by chance in the same way: of float64 inputs the
    error in float32 is taken, times the ratio of the two roundings.
    """
    if inputs.q.dtype == torch.float64:
        single = replace(inputs, q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
        ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return dense_error(single, single.reference()[0]) * ratio
    visible = inputs.visible()
    heads, kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (inputs.k, inputs.v))
    if inputs.scores is None:
        dense = torch.nn.functional.scaled_dot_product_attention(
            inputs.q, k, v, attn_mask=visible, scale=inputs.mask["scale"]
        )
    else:
        work = torch.promote_types(inputs.q.dtype, torch.float32)
        scores = inputs.q.to(work) @ k.to(work).mT * inputs.mask["scale"]
        scores = changed_scores(scores, inputs.scores, inputs.mask["offset"]).masked_fill(~visible, -torch.inf)
        if inputs.scores.sinks is not None:
            sinks = inputs.scores.sinks.to(work)
            sinks = (sinks[..., None] if sinks.dim() == 3 else sinks[:, None, None]).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : visible.shape[-1]].nan_to_num(nan=0.0).to(v.dtype)
        dense = weights @ v
    rows = visible.any(-1)
    error = (dense.double() - reference).abs()[rows]
    return float(error.max()) if error.numel() else 0.0


def assert_as_accurate_as_dense(out: Tensor, inputs: Inputs) -> None:
    """``out`` errs at most twice as much as dense SDPA in the same dtype, plus one rounding of the largest value.

    Against float64, over all rows; a row that sees nothing must be exactly 0. Raises ``AssertionError``.
    """
    reference, _ = inputs.reference()
    blind = ~inputs.visible().any(-1)
    if out[blind].ne(0).any():  # NaN is not 0 either
        raise AssertionError(f"{int(blind.sum())} rows see no key and must be 0; some hold other values")
    rounding = torch.finfo(out.dtype).eps * float(inputs.v.abs().max())
    error = float((out.double() - reference).abs().max()) if out.numel() else 0.0
    allowed = TIMES_DENSE * dense_error(inputs, reference) + rounding
    if not error <= allowed:  # NaN fails too
        raise AssertionError(f"largest error against float64 is {error:.3g}; dense SDPA's own allows {allowed:.3g}")


def assert_lse(lse: Tensor, inputs: Inputs) -> None:
    """``lse`` [B, H, Sq] is the natural log of the sum of exp(scores), -inf where a row sees nothing."""
    _, expected = inputs.reference()
    if lse.shape != expected.shape:
        raise AssertionError(f"the log-sum-exp has shape {tuple(lse.shape)}; expected {tuple(expected.shape)}")
    absolute, relative = LSE_TOLERANCE
    try:
        torch.testing.assert_close(lse.double(), expected, atol=absolute, rtol=relative)
    except AssertionError as error:
        raise AssertionError(f"log-sum-exp: {error}") from None


def assert_nonfinite_reach(out: Tensor, inputs: Inputs) -> None:
    """Infinite and NaN inputs make non-finite exactly those outputs that see them; the others stay accurate."""
    reference, _ = inputs.reference()
    finite = reference.isfinite()
    if not torch.equal(out.isfinite(), finite):
        leaked, hidden = int((finite & ~out.isfinite()).sum()), int((~finite & out.isfinite()).sum())
        raise AssertionError(
            f"non-finite inputs: {leaked} outputs that see none are not finite, and {hidden} that see one are finite"
        )
    values = inputs.v[inputs.v.isfinite()].abs()
    allowed = 16 * torch.finfo(out.dtype).eps * (float(values.max()) if values.numel() else 0.0)
    error = float((out.double() - reference).abs()[finite].max()) if finite.any() else 0.0
    if not error <= allowed:
        raise AssertionError(f"beside non-finite inputs the error is {error:.3g}; allowed is {allowed:.3g}")
