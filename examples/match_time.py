"""How long matching and rewriting take, against the time of the whole compilation, for a model of many layers.

python examples/match_time.py --layers 32
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # Inductor compiles anew

import torch
from torch import fx

import sparsepass
from sparsepass.sites import find_sites

OPTIONS = {"sparsepass.always_sparse": True, "sparsepass.task": "single_qa"}


def model(layers: int, implementation: str) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, attn_implementation=implementation,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048, help="prompt tokens (default: 2048)")
    parser.add_argument("--implementation", nargs="*", default=["sdpa", "eager"], help="attention of transformers")
    parser.add_argument("--no-inductor", action="store_true", help="measure matching and rewriting alone")
    args = parser.parse_args(argv)

    for implementation in args.implementation:
        times: dict[str, float] = {}

        def timed(gm: fx.GraphModule, inputs: Sequence[Any], times: dict[str, float] = times) -> Any:
            without = {**OPTIONS, "sparsepass.inductor": False}
            times["match"] = seconds(lambda: find_sites(gm.graph))
            times["own"] = seconds(lambda: sparsepass.backend(gm, inputs, options=without))
            if not args.no_inductor:
                times["whole"] = seconds(lambda: sparsepass.backend(gm, inputs, options=OPTIONS))
            times["nodes"] = len(gm.graph.nodes)
            return gm.forward

        torch._dynamo.reset()
        built = model(args.layers, implementation)
        compiled: Any = torch.compile(built, backend=timed, dynamic=False)
        with torch.no_grad():
            compiled(torch.randint(0, 256, (1, args.length)), use_cache=False, logits_to_keep=1)
        share = f", {times['own'] / times['whole']:.1%} of {times['whole']:.1f} s" if "whole" in times else ""
        print(
            f"{implementation}: {times['nodes']} nodes, matching {times['match'] * 1e3:.0f} ms; "
            f"matching, planning and rewriting {times['own'] * 1e3:.0f} ms{share}"
        )


if __name__ == "__main__":
    main()
