"""The kept attention mass of sampled rows, from its definition, and the check of an implementation against it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.attend.reference import listed_blocks, visible_pairs
from sparsepass.kernels.mass.api import kept_mass
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing import Case


def rows_of(q_len: int, count: int) -> list[int]:
    """By hand: one row in each of ``count`` stretches, at a place that a Weyl sequence picks; the last is the last."""
    fractions = [(number * 40503 % 65536) / 65536 for number in range(count)]
    rows = [int((number + fraction) * q_len / count) for number, fraction in enumerate(fractions)]
    return [*rows[:-1], q_len - 1]


def kept_reference(q: Tensor, k: Tensor, listed: Tensor, mask: dict, rows: list[int]) -> Tensor:  # type: ignore[type-arg]
    """Float64 [B, H, R]: the softmax weights of the listed pairs, summed; NaN where a row sees nothing."""
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    band = {name: mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
    seen = visible_pairs(q_len, kv_len, batch=batch, device=q.device, **band)[:, None]
    keys = k.double().repeat_interleave(heads // k.shape[1], 1)
    scores = (q.double() @ keys.transpose(2, 3) * mask["scale"]).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(3)  # NaN where nothing is seen
    pairs = listed.repeat_interleave(mask["q_block"], 2)[:, :, :q_len]
    pairs = pairs.repeat_interleave(mask["kv_block"], 3)[..., :kv_len].expand(batch, heads, -1, -1)
    return torch.where(pairs, weights, 0.0 * weights).sum(3)[:, :, rows]


def check_kept(case: Case, count: int, device: str) -> None:
    """The attention's own log-sum-exp and ``kept_mass`` together give the definition's share."""
    inputs = case.tensors(device)
    q, k, mask = inputs.q, inputs.k, inputs.mask
    visible = Visible(*(mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")))
    lists = BlockLists(inputs.kv_num_blocks, inputs.kv_indices, mask["q_block"], mask["kv_block"])
    _, lse = block_sparse_attention(q, k, inputs.v, lists, scale=mask["scale"], visible=visible, return_lse=True)
    assert lse is not None
    kept = kept_mass(q, k, lse, count=count, scale=mask["scale"], visible=visible)
    listed = listed_blocks(inputs.kv_num_blocks, inputs.kv_indices, -(-k.shape[2] // mask["kv_block"]))
    wanted = kept_reference(q, k, listed, mask, rows_of(q.shape[2], count))
    assert kept.shape == wanted.shape
    assert kept.dtype == torch.float32
    assert torch.equal(kept.isnan(), wanted.isnan())
    close = 2e-2 if q.dtype in (torch.bfloat16, torch.float16) else 2e-4
    assert (kept.double() - wanted).abs().nan_to_num(0.0).max() <= close
