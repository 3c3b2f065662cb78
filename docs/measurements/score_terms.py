"""Times attention with changed scores on a GPU against masked SDPA and FlexAttention, after checking it against fp64.

    python docs/measurements/score_terms.py [--out FILE] [--quick]

Causal, batch 1, 32 query heads, 8 KV heads, bf16, blocks of 128, at 8K and 32K, density 0.1, 0.25 and 1. Each line is
one term; times are medians of the whole call, with the lists given and the block map of mask and bias found anew in
each call. FlexAttention gets the same scores as a ``score_mod`` and the same blocks as a ``BlockMask``. SDPA takes the
terms that fit into a float mask of Sq x Skv, over all visible keys: soft caps and sinks it cannot do at all. No time is
printed where the error against fp64 is more than twice that of eager attention in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsepass.functional import to_block_mask
from sparsepass.kernels.attend.api import block_sparse_attention, kernel_name
from sparsepass.kernels.attend.reference import changed_scores, shown_by_scores
from sparsepass.kernels.scores import Scores
from sparsepass.kernels.select.api import select_pooled_topk
from sparsepass.kernels.types import BlockLists, Visible

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128
LENGTHS, DENSITIES = (8192, 32768), (0.1, 0.25, 1.0)
TERMS = ("none", "softcap", "slopes", "sinks", "mask", "bias", "head_bias", "192/128", "576/512")
CHECK_LENGTH, REPEATS = 1024, 20


def tensors(term: str, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Scores]:
    """Query, key, value and what changes their scores."""
    sizes = [int(size) for size in term.split("/")] if "/" in term else [DIM, DIM]
    made = [
        torch.randn(1, length, heads, size, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for heads, size in ((HEADS, sizes[0]), (KV_HEADS, sizes[0]), (KV_HEADS, sizes[1]))
    ]
    place = torch.arange(length, device="cuda")
    scores = Scores()
    if term == "softcap":
        scores = Scores(softcap=50.0)
    elif term == "slopes":
        scores = Scores(slopes=2.0 ** (-8 * (torch.arange(HEADS, device="cuda") + 1) / HEADS))
    elif term == "sinks":
        scores = Scores(sinks=torch.randn(HEADS, device="cuda", generator=generator))
    elif term == "mask":  # documents of a quarter of the length
        scores = Scores(mask=(place[None] // (length // 4) == place[:, None] // (length // 4))[None, None])
    elif term in ("bias", "head_bias"):
        heads = HEADS if term == "head_bias" else 1
        distance = (place[:, None] - place[None]).abs()
        of_bucket = torch.randn(32, heads, device="cuda", generator=generator, dtype=torch.bfloat16)
        bucket = distance.float().clamp(min=1).log2().mul(2).long().clamp(max=31)
        scores = Scores(bias=of_bucket.T[None, :, bucket])
    return made[0], made[1], made[2], scores


def checked_error(term: str) -> tuple[float, float]:
    """Largest error against fp64 of the kernel over half the blocks, and of eager attention in bf16 over the same."""
    q, k, v, scores = tensors(term, CHECK_LENGTH, torch.Generator("cuda").manual_seed(1))
    scale = q.shape[-1] ** -0.5
    visible = Visible(right=0)
    lists = select_pooled_topk(q[..., :DIM], k[..., :DIM], scale=scale, visible=visible, density=0.5, block=BLOCK)
    out, _ = block_sparse_attention(q, k, v, lists, scale=scale, visible=visible, scores=scores)
    named = to_block_mask(lists, CHECK_LENGTH, CHECK_LENGTH).to_dense().bool()
    pairs = named.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
    place = torch.arange(CHECK_LENGTH, device="cuda")
    pairs = pairs & (place[None] <= place[:, None]) & shown_by_scores(scores).to("cuda")

    def eager(work: torch.dtype) -> Tensor:
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        found = changed_scores(q.to(work) @ keys.to(work).mT * scale, scores, 0).to(work)
        found = found.masked_fill(~pairs, -math.inf)
        if scores.sinks is not None:
            found = torch.cat([found, scores.sinks.to(work)[:, None, None].expand(*found.shape[:3], 1)], -1)
        wide = torch.promote_types(work, torch.float32)
        weights = found.to(wide).softmax(-1)[..., :CHECK_LENGTH].to(work)
        return (weights.nan_to_num(0.0) @ values.to(work)).double()

    exact = eager(torch.float64)
    return float((out.double() - exact).abs().max()), float((eager(torch.bfloat16) - exact).abs().max())


def median_ms(run: Callable[[], Any]) -> float | None:
    """Median time in ms; None where it does not run (no memory, not supported)."""
    try:
        for _ in range(3):
            run()
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times)[len(times) // 2]
    except Exception as error:  # a compiler that was never tried with this may fail in any way
        print(f"  not timed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        torch.cuda.empty_cache()
        return None


def sdpa_ms(q: Tensor, k: Tensor, v: Tensor, scores: Scores, scale: float) -> float | None:
    """Dense SDPA over everything visible, with the terms in a mask tensor; None where SDPA cannot."""
    if scores.softcap is not None or scores.sinks is not None:
        return None
    length = q.shape[2]
    if not scores.given:
        run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)  # noqa: E731
        return median_ms(run)
    place = torch.arange(length, device="cuda")
    causal = place[None] <= place[:, None]
    try:
        if scores.mask is not None:
            mask = causal & scores.mask
        else:
            given = scores.bias
            if scores.slopes is not None:
                given = scores.slopes[None, :, None, None] * (place[None] - place[:, None])
            assert given is not None
            mask = given.to(q.dtype).masked_fill(~causal, -math.inf)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return median_ms(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True))


def flex_ms(q: Tensor, k: Tensor, v: Tensor, scores: Scores, lists: BlockLists, scale: float) -> float | None:
    """FlexAttention, compiled, over the same blocks with the same scores; None for sinks, which need a second step."""
    if scores.sinks is not None:
        return None
    from torch.nn.attention.flex_attention import flex_attention

    softcap, slopes, bias, mask = scores.softcap, scores.slopes, scores.bias, scores.mask

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score + slopes[h] * (j - i)
        if bias is not None:
            score = score + (bias[0, h, i, j] if bias.shape[1] > 1 else bias[0, 0, i, j])
        return score

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) if mask is None else (i >= j) & mask[0, 0, i, j]

    block_mask = to_block_mask(lists, q.shape[2], k.shape[2], mask_mod)
    changes = softcap is not None or slopes is not None or bias is not None
    compiled = torch.compile(flex_attention, dynamic=False)
    options: dict[str, Any] = {"block_mask": block_mask, "scale": scale, "enable_gqa": True}
    if changes:
        options["score_mod"] = score_mod
    return median_ms(lambda: compiled(q, k, v, **options))


def measure(term: str, length: int, densities: tuple[float, ...]) -> list[dict[str, Any]]:
    q, k, v, scores = tensors(term, length, torch.Generator("cuda").manual_seed(2))
    scale, visible = q.shape[-1] ** -0.5, Visible(right=0)
    dense = sdpa_ms(q, k, v, scores, scale)
    found = []
    for density in densities:
        lists = select_pooled_topk(q[..., :DIM], k[..., :DIM], scale=scale, visible=visible, density=density)
        counter = torch.zeros(3, dtype=torch.int64, device="cuda")
        block_sparse_attention(q, k, v, lists, scale=scale, visible=visible, scores=scores, counter=counter)
        ours = median_ms(
            lambda: block_sparse_attention(q, k, v, lists, scale=scale, visible=visible, scores=scores)  # noqa: B023
        )
        found.append(
            {
                "term": term,
                "length": length,
                "density": density,
                "computed_blocks": int(counter[1]),
                "kernel": kernel_name(q, k, v, lists, scale=scale, scores=scores),
                "ours_ms": ours,
                "sdpa_ms": dense,
                "flex_ms": flex_ms(q, k, v, scores, lists, scale),
            }
        )
        torch._dynamo.reset()
    return found


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("score_terms.json"))
    parser.add_argument("--quick", action="store_true", help="8K and density 0.1 alone")
    parser.add_argument("--terms", default=",".join(TERMS))
    options = parser.parse_args()
    lengths = LENGTHS[:1] if options.quick else LENGTHS
    densities = DENSITIES[:1] if options.quick else DENSITIES
    errors, rows = {}, []
    for term in options.terms.split(","):
        ours, eager = checked_error(term)
        errors[term] = {"ours": ours, "eager_bf16": eager}
        print(f"{term}: error {ours:.2e} against fp64, eager bf16 {eager:.2e}", flush=True)
        if ours > 2 * eager:
            print("  that is more than twice eager's: not timed")
            continue
        for length in lengths:
            if term == "head_bias" and length > 8192:
                continue  # 64 GB of bias
            rows += measure(term, length, densities)
            torch.cuda.empty_cache()
            result = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "errors": errors,
                "rows": rows,
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'term':>10} {'length':>7} {'density':>7} {'kernel':>7} {'ours ms':>8} {'SDPA':>8} {'Flex':>8}")
    for row in rows:
        times = (number(row[name]) for name in ("ours_ms", "sdpa_ms", "flex_ms"))
        print(
            f"{row['term']:>10} {row['length']:>7} {row['density']:>7} {row['kernel']:>7} "
            + " ".join(f"{time:>8}" for time in times)
        )


if __name__ == "__main__":
    main()
