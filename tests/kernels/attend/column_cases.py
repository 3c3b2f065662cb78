"""Cases of attention over listed blocks and columns: ``strategies.Case`` with columns drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.kernels.attend.columns.reference import column_attention_reference, listed_pairs
from sparsepass.testing import Case, Inputs, cases

SHARES = ("none", "few", "some", "all")
"""How many of the keys are columns: of every row none, a few, a third, all (then many lie inside listed blocks)."""


@dataclass(frozen=True)
class ColumnCase:
    """A case, how many columns it has, and which of (batch, head, row) share them."""

    case: Case
    share: str
    shared: tuple[bool, bool, bool]

    def tensors(self, device: torch.device | str = "cpu") -> ColumnInputs:
        inputs = self.case.tensors(device)
        generator = torch.Generator().manual_seed(self.case.seed + 1)
        rows = -(-self.case.q_len // self.case.q_block)
        sizes = (self.case.batch, self.case.heads, rows)
        shape = [1 if shared else size for shared, size in zip(self.shared, sizes, strict=True)]
        kv_len = self.case.kv_len
        chance = {"none": 0.0, "few": 3 / kv_len, "some": 0.3, "all": 1.0}[self.share]
        named = torch.rand(*shape, kv_len, generator=generator) < chance
        num = named.sum(-1).int()
        width = max(1, int(num.max()))
        order = torch.where(named, 0, kv_len) + torch.arange(kv_len)
        indices = order.argsort(-1).int()[..., :width]
        junk = torch.randint(-(2**31), 2**31 - 1, indices.shape, generator=generator).int()
        indices = torch.where(torch.arange(width) < num[..., None], indices, junk)
        return ColumnInputs(inputs, num.to(device), indices.to(device))


@dataclass(frozen=True)
class ColumnInputs:
    """Tensors of one case."""

    inputs: Inputs
    num: Tensor
    indices: Tensor

    def reference(self) -> tuple[Tensor, Tensor]:
        wide = self.inputs.to64()
        return column_attention_reference(
            wide.q, wide.k, wide.v, wide.kv_num_blocks, wide.kv_indices, self.num, self.indices, **wide.mask
        )

    def visible(self) -> Tensor:
        """Bool [B, H, Sq, Skv]: pairs listed or in a column, and seen."""
        whole = self.inputs
        batch, heads, q_len, _ = whole.q.shape
        q_block, kv_block = whole.mask["q_block"], whole.mask["kv_block"]
        columns = -(-whole.k.shape[2] // kv_block)
        everything = torch.arange(columns, dtype=torch.int32, device=whole.q.device).expand(
            1, 1, -(-q_len // q_block), -1
        )
        count = torch.full(everything.shape[:3], columns, dtype=torch.int32, device=whole.q.device)
        seen = Inputs(whole.q, whole.k, whole.v, count, everything, whole.mask).visible()
        return seen & listed_pairs(
            q_len,
            whole.k.shape[2],
            whole.kv_num_blocks,
            whole.kv_indices,
            self.num,
            self.indices,
            batch=batch,
            heads=heads,
            q_block=q_block,
            kv_block=kv_block,
        )


def assert_as_accurate_as_dense(out: Tensor, columns: ColumnInputs) -> None:
    """``out`` errs at most twice as much as dense SDPA in the same dtype, plus one rounding of the largest value."""
    reference, _ = columns.reference()
    visible, inputs = columns.visible(), columns.inputs
    rows = visible.any(-1)
    assert torch.equal(out[~rows], torch.zeros_like(out[~rows])), "a row that sees nothing must be 0"
    k, v = (x.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], dim=1) for x in (inputs.k, inputs.v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.q, k, v, attn_mask=visible, scale=inputs.mask["scale"]
    )
    errors = (dense.double() - reference).abs()[rows]
    rounding = torch.finfo(out.dtype).eps * float(inputs.v.abs().max())
    allowed = 2 * (float(errors.max()) if errors.numel() else 0.0) + rounding
    error = float((out.double() - reference).abs().max())
    assert error <= allowed, f"error {error:.3g} against float64; dense SDPA allows {allowed:.3g}"


def column_cases(**drawn: Any) -> st.SearchStrategy[ColumnCase]:
    """Cases as ``strategies.cases`` draws them, with columns."""
    flags = st.tuples(st.booleans(), st.booleans(), st.booleans())
    return st.builds(ColumnCase, cases(**drawn), st.sampled_from(SHARES), flags)
