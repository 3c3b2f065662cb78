"""Answer several kinds of request in one batch: a hint per row, one compiled graph for all mixes under one cap.

python examples/mixed_batch.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import sparsepass
from sparsepass.graph import torch_private
from sparsepass.measure.models import ModelShape, build_random_model
from sparsepass.rewriting import counters
from sparsepass.warmup import random_inputs

BATCHES = (
    ("single_qa", "multi_qa", "single_qa"),
    ("multi_qa", "single_qa", "single_qa"),  # other places
    ("multi_qa", "single_qa", "multi_qa"),  # another mix
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="prompt tokens (default: 16384)")
    parser.add_argument("--always-sparse", action="store_true", help="sparse even where dense is faster")
    args = parser.parse_args(argv)

    shape = ModelShape(layers=2, max_length=args.length)
    model = build_random_model("llama", shape, attn="sdpa", dtype=torch.float32, device="cpu")
    options = {"sparsepass.always_sparse": True} if args.always_sparse else None
    model.compile(backend=sparsepass.backend, options=options)
    rows = len(BATCHES[0])
    inputs: dict[str, Any] = random_inputs(model, length=args.length, batch=rows) | {"logits_to_keep": 1}

    # One of the mixes is enough. The batch gets the size it will have: Dynamo first compiles for that size alone.
    for result in sparsepass.warmup(
        model, [args.length], [BATCHES[0]], make_inputs=lambda length: inputs, dynamic=False
    ):
        print(f"warm-up: {result.seconds:.1f} s, {result.graphs} graphs")

    answers = []
    for batch in BATCHES:
        before, graphs = counters.total(), torch_private.compile_count()
        with sparsepass.task(list(batch)), torch.no_grad():
            answers.append(model(**inputs).logits)
        ran, new = counters.total() - before, torch_private.compile_count() - graphs
        density = f"density {ran.density:.3f}" if ran.density is not None else "dense"
        print(f"{', '.join(batch)}: {ran.computed} blocks computed, {density}; {new} new graphs")

    with sparsepass.task(BATCHES[0][0]), torch.no_grad():
        alone = model(**{name: held[:1] if isinstance(held, torch.Tensor) else held for name, held in inputs.items()})
    same = torch.allclose(answers[0][:1], alone.logits, atol=1e-4)
    print(f"the first row is that of its own hint alone: {same}")

    try:
        with sparsepass.task(["single_qa"] * (rows + 1)), torch.no_grad():
            model(**inputs)
    except sparsepass.HintError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
