"""Catch a wrong hint: a monitor measures the attention mass that a budget keeps, and raises the hint under a floor.

python examples/watch_hints.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import sparsepass
from sparsepass.measure.models import ModelShape, build_random_model
from sparsepass.warmup import random_inputs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="prompt tokens (default: 16384)")
    parser.add_argument("--floor", type=float, default=0.6, help="least share of the mass a layer keeps (default: 0.6)")
    parser.add_argument("--always-sparse", action="store_true", help="sparse even where dense is faster")
    args = parser.parse_args(argv)

    # Random weights spread their attention over everything, as aggregation does: "single_qa" is the wrong hint.
    shape = ModelShape(layers=2, max_length=args.length)
    model = build_random_model("llama", shape, attn="sdpa", dtype=torch.float32, device="cpu")
    options = {"sparsepass.always_sparse": True} if args.always_sparse else None
    model.compile(backend=sparsepass.backend, options=options)
    inputs: dict[str, Any] = random_inputs(model, length=args.length, batch=1) | {"logits_to_keep": 1}

    with torch.no_grad():
        with sparsepass.task("dense"):
            wanted = model(**inputs).logits
        with sparsepass.monitor(floor=args.floor) as watched, sparsepass.task("single_qa"):
            for request in range(1, 6):
                error = (model(**inputs).logits - wanted).norm() / wanted.norm()
                print(f"request {request}: logits differ from dense by {error:.4f}")
        print(watched.report())
        print("single_qa now runs as:", watched.raised.get(sparsepass.TaskClass.SINGLE_QA, "single_qa"))


if __name__ == "__main__":
    main()
