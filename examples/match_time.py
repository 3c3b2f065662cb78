"""How long matching and rewriting take, against the time of the whole compilation, for a model of many layers.

python examples/match_time.py --layers 32

Several rounds of the pass alone, of which the fastest and the first are printed; then Inductor compiles once, with
empty caches. Seconds on the clock.
"""

from __future__ import annotations

import argparse
import gc
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
    gc.collect()  # what earlier work left behind is not this one's time
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048, help="prompt tokens (default: 2048)")
    parser.add_argument("--implementation", nargs="*", default=["sdpa", "eager"], help="attention of transformers")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the pass alone (default: 5)")
    parser.add_argument("--no-inductor", action="store_true", help="measure matching and rewriting alone")
    args = parser.parse_args(argv)

    for implementation in args.implementation:
        times: dict[str, list[float]] = {}
        nodes: list[int] = []

        def timed(
            gm: fx.GraphModule, inputs: Sequence[Any], times: dict[str, list[float]] = times, nodes: list[int] = nodes
        ) -> Any:
            without = {**OPTIONS, "sparsepass.inductor": False}
            nodes.append(len(gm.graph.nodes))
            times["own"] = [
                seconds(lambda: sparsepass.backend(gm, inputs, options=without)) for _ in range(args.rounds)
            ]
            times["match"] = [seconds(lambda: find_sites(gm.graph)) for _ in range(args.rounds)]
            if not args.no_inductor:
                times["whole"] = [seconds(lambda: sparsepass.backend(gm, inputs, options=OPTIONS))]
            return gm.forward

        torch._dynamo.reset()
        built = model(args.layers, implementation)
        compiled: Any = torch.compile(built, backend=timed, dynamic=False)
        with torch.no_grad():
            compiled(torch.randint(0, 256, (1, args.length)), use_cache=False, logits_to_keep=1)
        own, first = min(times["own"]), times["own"][0]
        share = f"; {own / times['whole'][0]:.2%} of {times['whole'][0]:.1f} s" if "whole" in times else ""
        print(
            f"{implementation}: {args.layers} layers, {nodes[0]} nodes, matching {min(times['match']) * 1e3:.0f} ms; "
            f"matching, planning and rewriting {own * 1e3:.0f} ms (the first time {first * 1e3:.0f} ms){share}",
            flush=True,
        )


if __name__ == "__main__":
    main()
