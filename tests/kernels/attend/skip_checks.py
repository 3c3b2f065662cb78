"""How skip-softmax is held against the eager reference, on any device."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import torch
from torch import Tensor

from sparsepass.kernels.attend.reference import changed_scores
from sparsepass.kernels.attend.reference_skip import Order, skipped_reference
from sparsepass.testing import Inputs

SKIPS = (1e-3, 0.1, 0.5, 0.9)


def logits_of(inputs: Inputs) -> Tensor:
    """Scores before the softmax, float64 [B, H, Sq, Skv]; -inf where nothing is listed or seen."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    keys = inputs.k.double().repeat_interleave(group, 1)
    raw = inputs.q.double() @ keys.transpose(-1, -2) * inputs.mask["scale"]
    return changed_scores(raw, inputs.scores, inputs.mask["offset"]).masked_fill(~inputs.visible(), -torch.inf).cpu()


def expected(inputs: Inputs, skipped: Tensor) -> tuple[Tensor, Tensor]:
    """Out and log-sum-exp in float64 without the skipped pairs."""
    logits = logits_of(inputs).masked_fill(skipped, -torch.inf)
    values = inputs.v.double().cpu().repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1)
    if inputs.scores is not None and inputs.scores.sinks is not None:
        sinks = inputs.scores.sinks.double().cpu()[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
        values = torch.cat([values, torch.zeros_like(values[:, :, :1])], 2)
    return logits.softmax(-1).nan_to_num(nan=0.0) @ values, logits.logsumexp(-1)


def check_skipped(
    inputs: Inputs,
    run: Callable[[float], tuple[Tensor, Tensor | None]],
    order: Order,
    rows: int,
    keys: int,
    skip: float,
) -> bool:
    """``run(skip)`` is attention without what the reference skips; returns whether it skips anything."""
    sinks = None if inputs.scores is None else inputs.scores.sinks
    logits = logits_of(inputs)
    skipped, margin = skipped_reference(logits, order, rows=rows, keys=keys, skip=skip, sinks=sinks)
    # Rounding decides where a tile's best score is right at the edge.
    size = float(logits[logits.isfinite()].abs().max()) if logits.isfinite().any() else 0.0
    eps = 3e-4 if inputs.q.dtype == torch.float32 else 3e-3  # tf32 products, or a bf16 soft cap
    near = margin <= eps * (1 + size)
    if near and hypothesis.currently_in_test_context():
        hypothesis.reject()
    assert not near
    out, lse = run(skip)
    wanted, wanted_lse = expected(inputs, skipped)
    loose = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[inputs.q.dtype]
    spread = 1 + float(inputs.v.double().abs().max())
    assert lse is not None
    torch.testing.assert_close(out.cpu().double(), wanted, atol=loose * spread, rtol=0)
    torch.testing.assert_close(lse.cpu().double(), wanted_lse, atol=2e-3, rtol=1e-3)
    return bool((skipped & (logits > -torch.inf)).any())


def check_bound(inputs: Inputs, run: Callable[[float], tuple[Tensor, Tensor | None]], skip: float) -> None:
    """Whatever is skipped has weights of less than ``skip`` times the row's greatest: so much may be missing."""
    out, lse = run(skip)
    wanted, wanted_lse = (x.cpu() for x in inputs.reference())
    assert lse is not None
    lost = inputs.visible().sum(-1).cpu() * skip  # of a mass of at least 1, in units of the greatest weight
    blind = wanted_lse == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, blind)
    assert (lse.cpu().double() <= wanted_lse + 5e-3)[~blind].all()
    assert (lse.cpu().double() >= wanted_lse - lost.double().log1p() - 5e-3)[~blind].all()
    most = float(inputs.v.double().abs().max()) if inputs.v.numel() else 0.0
    gap = (out.cpu().double() - wanted).abs().amax(-1)
    assert (gap <= 2 * lost * most + 0.02 * (1 + most)).all()


def with_levels(inputs: Inputs, levels: list[float]) -> Inputs:
    """The inputs with scores that are equal within a block of keys: ``levels``, in the order of the blocks."""
    scores = torch.tensor(levels, device=inputs.q.device).repeat_interleave(inputs.mask["kv_block"])
    inputs.q.zero_()[..., 0] = 1 / inputs.mask["scale"]
    inputs.k.zero_()[..., 0] = scores[: inputs.k.shape[2]]
    return inputs
