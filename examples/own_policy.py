"""Write a policy file, check it, and compile with it.

python examples/own_policy.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import sparsepass
from sparsepass.measure.models import ModelShape, build_random_model
from sparsepass.warmup import random_inputs

POLICY = {
    "version": 1,
    "name": "two layers, first one careful",
    "default": "prior",
    "rules": [
        {"task": "single_qa", "lengths": {"above": 1024}, "budget": {"method": "pooled_topk", "density": 0.08}},
        # Of the rules that hold, the last one wins: layer 0 gets more.
        {
            "task": "single_qa",
            "lengths": {"above": 1024},
            "layers": "0",
            "budget": {"method": "pooled_topk", "density": 0.14},
        },
    ],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="prompt tokens (default: 16384)")
    parser.add_argument("--always-sparse", action="store_true", help="sparse even where dense is faster")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.json"

        # A mistake is found when the file is read, with the place and the repair.
        mistaken = json.loads(json.dumps(POLICY).replace("density", "densty", 1))
        path.write_text(json.dumps(mistaken))
        try:
            sparsepass.Policy.load(path)
        except sparsepass.PolicyError as error:
            print(f"A misspelled parameter: {error}\n")

        path.write_text(json.dumps(POLICY, indent=2))
        policy = sparsepass.Policy.load(path)
        bucket = policy.bucket(args.length)
        for layer in (0, 1):
            budget = policy.budget(sparsepass.TaskClass.SINGLE_QA, bucket, layer)
            print(f"layer {layer}, single_qa, {args.length} tokens in {bucket}: {budget}")
        print(f"fingerprint {policy.fingerprint[:12]}; the same again from its own JSON: ", end="")
        print(sparsepass.Policy.from_json(policy.to_json()) == policy)

        model = build_random_model(
            "llama", ModelShape(layers=2, max_length=args.length), attn="sdpa", dtype=torch.float32, device="cpu"
        )
        options: dict[str, object] = {"sparsepass.policy": str(path)}
        if args.always_sparse:
            options["sparsepass.always_sparse"] = True
        model.compile(backend=sparsepass.backend, options=options)
        inputs = random_inputs(model, length=args.length, batch=1)
        print()
        print(sparsepass.explain(model, **inputs, logits_to_keep=1, task="single_qa"))


if __name__ == "__main__":
    main()
