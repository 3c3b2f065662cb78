"""Compile a model with sparsepass, generate under a task hint, and see what happened.

python examples/quickstart.py
"""

from __future__ import annotations

import argparse

import torch

import sparsepass
from sparsepass.measure.models import ModelShape, build_random_model
from sparsepass.warmup import random_inputs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="prompt tokens (default: 16384)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--always-sparse", action="store_true", help="sparse even where dense is faster")
    args = parser.parse_args(argv)

    # Any transformers model will do; this one has a Llama's architecture and random weights.
    shape = ModelShape(layers=args.layers, max_length=args.length + args.new_tokens)
    model = build_random_model("llama", shape, attn="sdpa", dtype=torch.float32, device="cpu")
    prompt = random_inputs(model, length=args.length, batch=1)["input_ids"]

    # In place, so that generate() enters the compiled forward; torch.compile(model).generate() would compile nothing.
    # Installed by pip, backend="sparsepass" means the same.
    options = {"sparsepass.always_sparse": True} if args.always_sparse else None
    model.compile(backend=sparsepass.backend, dynamic=True, options=options)

    report = sparsepass.explain(
        model.generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=args.new_tokens,
        do_sample=False,
        task="single_qa",
    )
    print(report)

    # The same hint again: the graphs are there already, nothing is compiled.
    with sparsepass.task("single_qa"):
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.new_tokens, do_sample=False
        )
    print(f"\n{tokens.shape[1] - args.length} new tokens: {tokens[0, args.length :].tolist()}")


if __name__ == "__main__":
    main()
