"""Write a checkpoint as the bfloat16 safetensors file that ``sparsepass.measure.testbed.load`` reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from examples.testbed import checkpoint
from examples.testbed.network import transformers_state
from sparsepass.measure.testbed import SIZES, weights_file


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    parser.add_argument("--out", type=Path, help="default: where sparsepass.testbed looks for this size")
    options = parser.parse_args(given)
    weights, _, meta = checkpoint.read(options.folder)
    out = options.out or weights_file(meta["size"])
    out.parent.mkdir(parents=True, exist_ok=True)
    state = transformers_state({name: weight.bfloat16() for name, weight in weights.items()}, SIZES[meta["size"]])
    save_file(state, out, {"format": "pt", "size": meta["size"], "steps": str(meta["steps"])})
    print(f"{out}: {sum(one.numel() for one in state.values()):,} parameters, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
