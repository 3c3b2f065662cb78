"""What a prefill costs: operations and bytes, counted from sizes and from the attention blocks that were computed."""

from __future__ import annotations

from dataclasses import dataclass

from sparsepass.measure.testbed.sizes import TestbedSize

BLOCK = 64
"""Tokens per block of the lists."""

NUMBER = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True)
class Cost:
    """Of one request. ``flops``: multiplications and additions; ``bytes``: read from memory at least, see ``cost``."""

    flops: float
    bytes: float


def layer_weights(size: TestbedSize) -> int:
    """Entries of the matrices of all layers."""
    heads = (2 * size.heads + 2 * size.kv_heads) * size.head_dim  # queries, keys, values, output
    return size.layers * size.hidden * (heads + 3 * size.intermediate)


def parameters(size: TestbedSize) -> int:
    """Entries of all matrices; the embedding is also the output layer."""
    return layer_weights(size) + size.vocabulary * size.hidden


def visible_blocks(length: int, size: TestbedSize) -> int:
    """Blocks of one request that causal attention sees, over layers and query heads."""
    rows = -(-length // BLOCK)
    return size.layers * size.heads * rows * (rows + 1) // 2


def cost(size: TestbedSize, length: int, blocks: float, *, pooled: bool, answer: int) -> Cost:
    """A prefill of ``length`` tokens that computes ``blocks`` blocks of attention, over layers and query heads.

    Operations: the linear layers, two products per computed block, the estimate of pooled keys if ``pooled``, and the
    output layer for ``answer`` tokens. Bytes: every weight once, and the keys and values of each computed block once
    per query head, which is what a kernel with query blocks of that size reads.
    """
    rows = -(-length // BLOCK)
    linear = 2.0 * layer_weights(size) * length + 2.0 * size.vocabulary * size.hidden * answer
    attention = 4.0 * BLOCK * BLOCK * size.head_dim * blocks
    estimate = 2.0 * size.head_dim * size.layers * size.heads * rows * rows if pooled else 0.0
    read = NUMBER * parameters(size) + 2.0 * NUMBER * BLOCK * size.head_dim * blocks
    return Cost(linear + attention + estimate, read)
