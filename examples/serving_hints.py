"""Serve requests of several kinds at once, each with its own hint: from threads, then from asyncio.

python examples/serving_hints.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import sparsepass
from sparsepass.measure.models import ModelShape, build_random_model
from sparsepass.rewriting import counters
from sparsepass.warmup import random_inputs

REQUESTS = ("single_qa", "multi_qa", "single_qa", None, "multi_qa", "dense")

Answer = Callable[[], torch.Tensor]


def serve_threads(answer: Answer, requests: Sequence[str | None]) -> list[torch.Tensor]:
    """One request per call in a pool; a thread starts without a hint, so each call sets its own."""

    def handle(hint: str | None) -> torch.Tensor:
        with sparsepass.task(hint):
            return answer()

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(handle, requests))


async def serve_asyncio(answer: Answer, requests: Sequence[str | None]) -> list[torch.Tensor]:
    """One asyncio task per request: no hint leaks to another across ``await``, and ``to_thread`` takes it along."""

    async def handle(hint: str | None) -> torch.Tensor:
        with sparsepass.task(hint):
            await asyncio.sleep(0.01)  # other requests run meanwhile, with hints of their own
            return await asyncio.to_thread(answer)

    return list(await asyncio.gather(*(handle(hint) for hint in requests)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="prompt tokens (default: 16384)")
    parser.add_argument("--always-sparse", action="store_true", help="sparse even where dense is faster")
    args = parser.parse_args(argv)

    shape = ModelShape(layers=2, max_length=args.length)
    model = build_random_model("llama", shape, attn="sdpa", dtype=torch.float32, device="cpu")
    options = {"sparsepass.always_sparse": True} if args.always_sparse else None
    model.compile(backend=sparsepass.backend, options=options)
    inputs: dict[str, Any] = random_inputs(model, length=args.length, batch=1) | {"logits_to_keep": 1}

    hints = list(dict.fromkeys(REQUESTS))
    # Compile before the first request: one graph per distinct plan.
    for result in sparsepass.warmup(model, [args.length], hints, make_inputs=lambda length: inputs, dynamic=False):
        print(f"warm-up {result.hint or 'no hint':10} {result.seconds:6.1f} s, {result.graphs} graphs")

    def answer() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(**inputs).logits
        return logits

    alone, blocks = {}, {}
    for hint in hints:
        before = counters.total()
        with sparsepass.task(hint):
            alone[hint] = answer()
        ran = counters.total() - before
        blocks[hint] = ran.computed
        density = f"density {ran.density:.3f}" if ran.density is not None else "dense"
        print(f"alone   {hint or 'no hint':10} {ran.computed:8} blocks computed, {density}")

    for name in ("threads", "asyncio"):
        before = counters.total()
        by_thread = name == "threads"
        answers = serve_threads(answer, REQUESTS) if by_thread else asyncio.run(serve_asyncio(answer, REQUESTS))
        ran = counters.total() - before
        expected = sum(blocks[hint] for hint in REQUESTS)
        same = all(torch.allclose(got, alone[hint], atol=1e-5) for got, hint in zip(answers, REQUESTS, strict=True))
        print(f"{name}: {len(answers)} requests, {ran.computed} blocks computed, {expected} expected; ", end="")
        print(f"every answer is that of its own hint: {same}")


if __name__ == "__main__":
    main()
