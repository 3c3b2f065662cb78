"""The fixed part of the matrix: one small problem for each mistake that kernels are known to make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sparsepass.testing.problem import Case

Named = Iterator[tuple[str, Case]]


def corner_cases(draw: Mapping[str, Any]) -> dict[str, Case]:
    """Cases by name, of the kinds that ``draw`` allows: the keyword arguments of ``strategies.cases``, all given."""
    base = _plain(draw)
    named: dict[str, Case] = {"plain": base}
    for part in (_scales, _lengths, _lists, _bands, _segments, _tensors):
        named.update(part(base, draw))
    return named


def _plain(draw: Mapping[str, Any]) -> Case:
    """Two and a half blocks, so that the last one is ragged; causal where that is allowed."""
    block = draw["blocks"][0]
    length = min(draw["max_len"], 2 * block + block // 2 + 1)
    head_dim = draw["head_dims"][0]
    return Case(
        batch=min(2, draw["max_batch"]),
        kv_heads=min(2, draw["max_kv_heads"]),
        group=2 if 2 in draw["groups"] else draw["groups"][0],
        q_len=length,
        kv_len=length,
        head_dim=head_dim,
        v_head_dim=head_dim,
        dtype=draw["dtypes"][0],
        q_block=block,
        kv_block=block,
        left=-1,
        right=0 if "causal" in draw["bands_of"] else -1,
        offset=0,
        scale=head_dim**-0.5,
        layout="bshd" if "bshd" in draw["layouts"] else draw["layouts"][0],
        segments="none",
        lists="full" if "full" in draw["lists"] else draw["lists"][0],
        shared_lists="none" if "none" in draw["shared_lists"] else draw["shared_lists"][0],
        bad=0,
        seed=20,
    )


def _lengths(base: Case, draw: Mapping[str, Any]) -> Named:
    block = base.q_block
    for name, length in (("one token", 1), ("one whole block", block), ("one token over a block", block + 1)):
        if length <= draw["max_len"]:
            yield name, replace(base, q_len=length, kv_len=length)
    if not draw["same_length"]:
        apart = replace(base, right=-1 if "full" in draw["bands_of"] else base.right)
        short = max(1, base.kv_len // 2 - 1)
        yield "fewer queries than keys", replace(apart, q_len=short)
        yield "more queries than keys", replace(apart, kv_len=short)
    for block in draw["blocks"]:
        length = min(draw["max_len"], 2 * block + block // 2 + 1)
        yield f"blocks of {block}", replace(base, q_block=block, kv_block=block, q_len=length, kv_len=length)
        if not draw["square_blocks"]:
            yield f"blocks of {base.q_block} queries by {block} keys", replace(base, kv_block=block)


def _lists(base: Case, draw: Mapping[str, Any]) -> Named:
    whole = replace(base, right=-1) if "full" in draw["bands_of"] else base
    for kind in draw["lists"]:
        yield f"lists: {kind}", replace(base, lists=kind)
        yield f"lists: {kind}, no causal mask", replace(whole, lists=kind)
    some = "random" if "random" in draw["lists"] else base.lists
    for kind in draw["shared_lists"]:
        yield f"lists shared: {kind}", replace(base, lists=some, shared_lists=kind)


def _bands(base: Case, draw: Mapping[str, Any]) -> Named:
    kinds, block = set(draw["bands_of"]), base.kv_block
    if "full" in kinds:
        yield "every key visible", replace(base, right=-1)
    if kinds & {"window", "any"}:
        for left in (0, 1, block - 1, block):
            yield f"causal window of {left + 1} keys", replace(base, left=left, right=0)
    if kinds & {"band", "any"}:
        yield "window to both sides", replace(base, left=block // 2, right=3)
        yield "keys to the left are hidden", replace(base, left=0, right=-1)
    if "any" in kinds and draw["offsets"]:
        yield "queries ahead of every key", replace(base, left=2, right=0, offset=base.kv_len + 1)
    if draw["offsets"] and "causal" in kinds:
        late = max(1, base.q_len // 3)
        yield "chunked prefill", replace(base, q_len=late, offset=base.kv_len - late)
        yield "one query at the end", replace(base, q_len=1, offset=base.kv_len - 1)
        yield "queries before the first key", replace(base, offset=-(base.q_len // 2))


def _tensors(base: Case, draw: Mapping[str, Any]) -> Named:
    for layout in draw["layouts"]:
        yield f"layout: {layout}", replace(base, layout=layout)
    for dtype in draw["dtypes"]:
        for size in draw["head_dims"]:
            yield f"{dtype}, head size {size}", replace(base, dtype=dtype, head_dim=size, v_head_dim=size)
        if not draw["equal_v_dim"] and len(draw["head_dims"]) > 1:
            yield f"{dtype}, another size of values", replace(base, dtype=dtype, v_head_dim=draw["head_dims"][-1])
    for group in draw["groups"]:
        yield f"{group} query heads to a KV head", replace(base, group=group)


def _segments(base: Case, draw: Mapping[str, Any]) -> Named:
    for kind in draw["segments"]:
        if kind != "none":
            yield f"segments: {kind}", replace(base, segments=kind)
            if "full" in draw["bands_of"]:
                yield f"segments: {kind}, no causal mask", replace(base, segments=kind, right=-1)


def _scales(base: Case, draw: Mapping[str, Any]) -> Named:
    if draw["scales"] is None:
        return
    # Trained models have scores in the hundreds: their exponentials overflow, and rounding to bf16 is a factor of e.
    for scale in (32.0, 1.0, 0.02, 0.0, -0.25):
        yield f"scale {scale}", replace(base, scale=scale)
