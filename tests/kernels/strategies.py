"""Hypothesis strategies for attention over block lists, shared by every kernel's tests.

A drawn ``Case`` is plain data (its repr replays it); ``Case.tensors`` builds the inputs from its seed. Helpers below it
say how close a result must be, and rewrite lists as masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsepass.kernels.reference import block_sparse_attention_reference, listed_blocks, visible_pairs

LAYOUTS = ("bhsd", "bshd", "packed", "strided_dim", "misaligned", "expanded_batch")
SEGMENTS = ("none", "left_pad", "right_pad", "packed", "packed_pad", "interleaved", "all_padding")
LISTS = ("full", "random", "sparse", "empty_rows", "single")


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case, and ``mask``: the keyword arguments that every launcher and reference takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    mask: dict[str, Any]

    def to64(self) -> Inputs:
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double())

    def reference(self) -> tuple[Tensor, Tensor]:
        """Out and log-sum-exp in float64."""
        wide = self.to64()
        return block_sparse_attention_reference(
            wide.q, wide.k, wide.v, self.kv_num_blocks, self.kv_indices, **self.mask
        )

    def visible(self) -> Tensor:
        """Bool [B, H, Sq, Skv]: pairs that are listed and visible."""
        batch, heads, q_len, _ = self.q.shape
        kv_len = self.k.shape[2]
        q_block, kv_block = self.mask["q_block"], self.mask["kv_block"]
        named = listed_blocks(self.kv_num_blocks, self.kv_indices, -(-kv_len // kv_block))
        named = named.repeat_interleave(q_block, 2)[:, :, :q_len].repeat_interleave(kv_block, 3)[..., :kv_len]
        keep = {name: self.mask[name] for name in ("left", "right", "offset", "q_segments", "kv_segments")}
        seen = visible_pairs(q_len, kv_len, batch=batch, device=self.q.device, **keep)
        return (named & seen[:, None]).expand(batch, heads, q_len, kv_len)


@dataclass(frozen=True)
class Case:
    """One attention problem. Lengths and blocks in tokens; ``bad`` plants that many non-finite tokens in q, k and v."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    q_block: int
    kv_block: int
    left: int
    right: int
    offset: int
    scale: float
    layout: str
    segments: str
    lists: str
    shared_lists: str
    bad: int
    seed: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def tensors(self, device: torch.device | str = "cpu") -> Inputs:
        """Inputs drawn from the seed on the CPU, then moved, so that a case is the same everywhere."""
        generator = torch.Generator().manual_seed(self.seed)
        q = self._laid_out((self.batch, self.heads, self.q_len, self.head_dim), generator)
        k = self._laid_out((self.batch, self.kv_heads, self.kv_len, self.head_dim), generator)
        v = self._laid_out((self.batch, self.kv_heads, self.kv_len, self.v_head_dim), generator)
        for x in (q, k, v):
            for _ in range(self.bad):
                head, token, dim = (int(torch.randint(n, (1,), generator=generator)) for n in x.shape[1:])
                value = (float("nan"), float("inf"), float("-inf"))[int(torch.randint(3, (1,), generator=generator))]
                x[0, head, token, dim] = value
        q_segments, kv_segments = self._segments(generator)
        kv_num_blocks, kv_indices = self._lists(generator)
        mask = {
            "scale": self.scale,
            "left": self.left,
            "right": self.right,
            "offset": self.offset,
            "q_segments": None if q_segments is None else q_segments.to(device),
            "kv_segments": None if kv_segments is None else kv_segments.to(device),
            "q_block": self.q_block,
            "kv_block": self.kv_block,
        }
        q, k, v = (_moved(x, device) for x in (q, k, v))
        return Inputs(q, k, v, kv_num_blocks.to(device), kv_indices.to(device), mask)

    def _laid_out(self, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Random values of ``shape`` under this case's strides."""
        b, h, s, d = shape
        if self.layout == "bhsd":
            return torch.randn(shape, generator=generator).to(self.dtype)
        if self.layout == "bshd":
            return torch.randn((b, s, h, d), generator=generator).to(self.dtype).transpose(1, 2)
        if self.layout == "packed":
            return torch.randn((b, s, 3, h, d), generator=generator).to(self.dtype)[:, :, 1].transpose(1, 2)
        if self.layout == "strided_dim":
            return torch.randn((b, h, s, 2 * d), generator=generator).to(self.dtype)[..., ::2]
        if self.layout == "misaligned":
            return torch.randn((b, h, s, d + 3), generator=generator).to(self.dtype)[..., 1 : d + 1]
        return torch.randn((1, h, s, d), generator=generator).to(self.dtype).expand(b, h, s, d)

    def _segments(self, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """(q_segments, kv_segments) int32; queries sit at the band's positions, so they take those keys' segments."""
        if self.segments == "none":
            return None, None
        kv = torch.zeros(self.batch, self.kv_len, dtype=torch.int32)
        token = torch.arange(self.kv_len)
        for row in kv:
            cut = int(torch.randint(self.kv_len + 1, (1,), generator=generator))
            if self.segments == "left_pad":
                row[token < cut] = -1
            elif self.segments == "right_pad":
                row[token >= cut] = -1
            elif self.segments == "all_padding":
                row[:] = -1
            elif self.segments == "interleaved":
                row[:] = torch.randint(-1, 3, (self.kv_len,), generator=generator).int()
            else:
                edges = torch.randint(self.kv_len + 1, (3,), generator=generator)
                row[:] = (token[:, None] >= edges[None]).sum(1).int()
                if self.segments == "packed_pad":
                    row[row == 3] = -1
        if self.segments in ("left_pad", "right_pad", "all_padding"):
            return None, kv
        position = (torch.arange(self.q_len) + self.offset).clamp(0, self.kv_len - 1)
        return kv[:, position].contiguous(), kv

    def _lists(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = 1 if self.shared_lists in ("batch", "both") else self.batch
        heads = 1 if self.shared_lists in ("head", "both") else self.heads
        rows, columns = -(-self.q_len // self.q_block), -(-self.kv_len // self.kv_block)
        share = {"full": 1.0, "random": 0.6, "sparse": 0.25, "empty_rows": 0.6, "single": 0.0}[self.lists]
        named = torch.rand(batch, heads, rows, columns, generator=generator) < share
        if self.lists == "empty_rows":
            named &= torch.rand(batch, heads, rows, 1, generator=generator) < 0.5
        if self.lists == "single":
            only = torch.randint(columns, (batch, heads, rows, 1), generator=generator)
            named = named.scatter(-1, only, True)
        return lists_from_mask(named, generator)


def _moved(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on ``device`` with the strides and the storage offset it has."""
    if torch.device(device).type == "cpu":
        return x
    span = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
    storage = torch.as_strided(x, (x.storage_offset() + span,), (1,), 0).to(device)
    return torch.as_strided(storage, x.shape, x.stride(), x.storage_offset())


def lists_from_mask(named: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Block lists for a bool mask [B, H, nq, nkv]; unused entries hold junk, as nobody may read them."""
    columns = named.shape[-1]
    count = named.sum(-1).int()
    order = torch.where(named, 0, columns) + torch.arange(columns)
    indices = order.argsort(-1).int()
    junk = torch.randint(-(2**31), 2**31 - 1, indices.shape, generator=generator).int()
    return count, torch.where(torch.arange(columns) < count[..., None], indices, junk)


def dense_error(inputs: Inputs, reference: Tensor) -> float:
    """Largest error against float64 that dense SDPA makes at the inputs' own precision, over rows that see anything."""
    visible = inputs.visible()
    heads, kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (inputs.k, inputs.v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        inputs.q, k, v, attn_mask=visible, scale=inputs.mask["scale"]
    )
    rows = visible.any(-1)
    error = (dense.double() - reference).abs()[rows]
    return float(error.max()) if error.numel() else 0.0


def assert_as_accurate_as_dense(out: Tensor, inputs: Inputs) -> None:
    """``out`` errs at most twice as much as dense SDPA in the same dtype, plus one rounding of the largest value."""
    reference, _ = inputs.reference()
    rows = inputs.visible().any(-1)
    assert torch.equal(out[~rows], torch.zeros_like(out[~rows])), "a row that sees nothing must be 0"
    rounding = torch.finfo(out.dtype).eps * float(inputs.v.abs().max())
    error = float((out.double() - reference).abs().max()) if out.numel() else 0.0
    allowed = 2 * dense_error(inputs, reference) + rounding
    assert error <= allowed, f"error {error:.3g} against float64; dense SDPA allows {allowed:.3g}"


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Every floating tensor that ``torch.empty`` and its relatives return is full of NaN, every integer one of junk."""
    places = [(torch, name) for name in ("empty", "empty_like", "empty_strided")] + [(Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in places]

    def poisoning(original: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = original(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(-123 if tensor.dtype.is_signed else 77)

        return filled

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def bands(q_len: int, kv_len: int) -> st.SearchStrategy[tuple[int, int, int]]:
    """(left, right, offset): the bands that models use, and any other."""
    offset = st.sampled_from(sorted({0, kv_len - q_len, kv_len // 2, -(q_len // 2)}))
    window = st.integers(0, kv_len)
    return st.one_of(
        st.tuples(st.just(-1), st.just(0), offset),
        st.tuples(st.just(-1), st.just(-1), offset),
        st.tuples(window, st.just(0), offset),
        st.tuples(window, window, offset),
        st.tuples(st.sampled_from([-1, 0, 5]), st.sampled_from([-1, 0, 5]), st.integers(-q_len, kv_len)),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float16),
    blocks: Sequence[int] = (16, 32),
    head_dims: Sequence[int] = (16, 24, 32),
    max_len: int = 100,
    max_batch: int = 2,
    layouts: Sequence[str] = LAYOUTS,
    segments: Sequence[str] = SEGMENTS,
    lists: Sequence[str] = LISTS,
    bad: bool = False,
    equal_v_dim: bool = False,
) -> Case:
    """A ``Case`` of at most ``max_len`` tokens a side. ``bad`` plants non-finite tokens."""
    q_len = draw(st.integers(1, max_len))
    kv_len = draw(st.one_of(st.just(q_len), st.integers(q_len, max(q_len, max_len)), st.integers(1, max_len)))
    left, right, offset = draw(bands(q_len, kv_len))
    head_dim = draw(st.sampled_from(head_dims))
    layout = draw(st.sampled_from(layouts))
    return Case(
        batch=draw(st.integers(1, max_batch)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_head_dim=head_dim if equal_v_dim else draw(st.sampled_from([head_dim, *head_dims])),
        dtype=draw(st.sampled_from(dtypes)),
        q_block=draw(st.sampled_from(blocks)),
        kv_block=draw(st.sampled_from(blocks)),
        left=left,
        right=right,
        offset=offset,
        scale=draw(st.sampled_from([head_dim**-0.5, 1.0, 0.1])),
        layout="bshd" if bad and layout == "expanded_batch" else layout,
        segments=draw(st.sampled_from(segments)),
        lists=draw(st.sampled_from(lists)),
        shared_lists=draw(st.sampled_from(["none", "batch", "head", "both"])),
        bad=draw(st.integers(1, 4)) if bad else 0,
        seed=draw(st.integers(0, 2**31 - 1)),
    )
