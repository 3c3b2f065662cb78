"""What is measured: causal attention of one shape, its inputs, and what its work amounts to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import OptionError, close_names
from sparsepass.kernels.blocks import visible_block_counts
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.testing.inputs import CONCENTRATED, structured_inputs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAUSAL = Visible(right=0)

INPUTS = ("random", "structured", "concentrated")
"""Normal; as real attention is; the same with attention on fewer blocks (``testing.CONCENTRATED``)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One size of causal self-attention: ``length`` queries on as many keys, in tokens."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: str
    """``bf16``, ``fp16`` or ``fp32``."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def pair_flops(self) -> float:
        """Floating-point operations for one visible pair of a query and a key: two products of ``head_dim``."""
        return 4.0 * self.head_dim

    @property
    def dense_flops(self) -> float:
        """Operations of causal dense attention: only the visible pairs count."""
        return self.batch * self.heads * self.pair_flops * self.length * (self.length + 1) / 2

    def fields(self) -> dict[str, Any]:
        """The shape as a record has it."""
        return {name: getattr(self, name) for name in ("batch", "heads", "kv_heads", "length", "head_dim", "dtype")}

    def __str__(self) -> str:
        sizes = f"batch {self.batch}, heads {self.heads}/{self.kv_heads}, {self.length} tokens"
        return f"{sizes}, head size {self.head_dim}, {self.dtype}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Tensors of one shape: query [B, H, S, D], key and value [B, Hkv, S, D], laid out [B, S, H, D] as models do."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def visible(self) -> Visible:
        return CAUSAL

    @property
    def device(self) -> torch.device:
        return self.query.device

    def repeated(self) -> tuple[Tensor, Tensor]:
        """Key and value with one head per query head, for implementations without grouped queries."""
        times = self.shape.heads // self.shape.kv_heads
        return self.key.repeat_interleave(times, 1), self.value.repeat_interleave(times, 1)


def make_problem(shape: Shape, device: torch.device, seed: int, inputs: str = "random") -> Problem:
    """Inputs of a shape, one of ``INPUTS``. Raises ``OptionError``."""
    if inputs not in INPUTS:
        raise OptionError(f"Unknown inputs {inputs!r}. {close_names(inputs, INPUTS)}")
    if inputs != "random":
        query, key, value = _structured(shape, device, seed, CONCENTRATED if inputs == "concentrated" else {})
        return Problem(shape, query, key, value)
    generator = torch.Generator(device=device).manual_seed(seed)

    def tokens(heads: int) -> Tensor:
        size = (shape.batch, shape.length, heads, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=shape.torch_dtype).transpose(1, 2)

    return Problem(shape, tokens(shape.heads), tokens(shape.kv_heads), tokens(shape.kv_heads))


def _structured(
    shape: Shape, device: torch.device, seed: int, structure: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    made = structured_inputs(**{**shape.fields(), "dtype": shape.torch_dtype, **structure}, device=device, seed=seed)
    return made.query, made.key, made.value


def listed_blocks(lists: BlockLists, batch: int, heads: int) -> int:
    """Blocks in the lists over batch and heads. Waits for the device."""
    counts = lists.kv_num_blocks
    return int(counts.sum(dtype=torch.int64)) * (batch // counts.shape[0]) * (heads // counts.shape[1])


def visible_blocks(shape: Shape, block: int) -> int:
    """Blocks with a visible pair, over batch and heads."""
    counts = visible_block_counts(shape.length, shape.length, -1, 0, 0, block, block)
    return sum(counts) * shape.batch * shape.heads


def listed_flops(shape: Shape, lists: BlockLists) -> tuple[float, float]:
    """Operations of the listed blocks: counted whole, as every kernel computes them, and of their visible pairs alone.

    The two differ by the upper half of the diagonal blocks.
    """
    block = lists.kv_block
    rows = lists.kv_num_blocks.shape[2]
    width = lists.kv_indices.shape[3]
    entry = torch.arange(width, device=lists.kv_indices.device)
    row = torch.arange(rows, device=lists.kv_indices.device)[:, None]
    times = shape.batch // lists.kv_num_blocks.shape[0] * (shape.heads // lists.kv_num_blocks.shape[1])
    diagonal = 0
    for one in range(lists.kv_num_blocks.shape[0]):  # by slice: the comparison takes room
        used = entry < lists.kv_num_blocks[one][..., None]
        diagonal += int((used & (lists.kv_indices[one] == row)).sum()) * times
    whole = float(listed_blocks(lists, shape.batch, shape.heads)) * lists.q_block * block
    hidden = diagonal * block * (block - 1) / 2.0
    return whole * shape.pair_flops, (whole - hidden) * shape.pair_flops
