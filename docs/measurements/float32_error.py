"""How much float32 attention errs on a GPU, by how its products are computed, beside dense attention's own error.

    PYTHONPATH=. timeout 120 python docs/measurements/float32_error.py --out docs/measurements/float32_error_h200.json

Under a minute, most of it compilation. Largest errors against float64. ``allowed`` is what the tests ask for: twice the
dense kernel's error and one rounding of the largest value. The dense kernel is SDPA, or eager attention where scores
are changed. The last column is the shipped tile. Cases of 4096 keys have ten times as many steps of the online softmax
as the others: an error made once a step shows there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsepass.kernels.attend.triton.block_map import block_map_cuda, in_kernel_form
from sparsepass.kernels.attend.triton.launch import attend_launches
from sparsepass.kernels.runtime.launch import run_all
from sparsepass.kernels.scores import check_scores
from sparsepass.kernels.spec import attend_tile, capability_of
from sparsepass.measure.bench.machine import describe
from sparsepass.testing import Case, Inputs
from sparsepass.testing.accuracy import dense_error

PLAIN = Case(
    batch=2, kv_heads=2, group=2, q_len=300, kv_len=300, head_dim=64, v_head_dim=64, dtype=torch.float32, q_block=128,
    kv_block=128, left=-1, right=0, offset=0, scale=0.125, layout="bshd", segments="none", lists="full",
    shared_lists="none", bad=0, seed=7,
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter: to try the script
PRECISIONS = ("tf32x3", "bf16x6", "ieee")


def sized(head_dim: int, v_head_dim: int, **changes: Any) -> Case:
    sizes: dict[str, Any] = {"head_dim": head_dim, "v_head_dim": v_head_dim, "scale": head_dim**-0.5, "batch": 1}
    return replace(PLAIN, segments="packed", **sizes, **changes)


LONG: dict[str, Any] = {"batch": 1, "kv_heads": 1, "q_len": 256, "kv_len": 4096, "offset": 3840}
CASES = {
    "64": PLAIN,
    "64 sinks": replace(PLAIN, terms=("sinks",)),
    "64 mask": replace(PLAIN, terms=("mask",)),
    "7/20": sized(7, 20),
    "80": replace(PLAIN, head_dim=80, v_head_dim=80),
    "128": replace(PLAIN, head_dim=128, v_head_dim=128),
    "192/128": sized(192, 128),
    "576/512": sized(576, 512),
    "64, 4096 keys": replace(PLAIN, **LONG),
    "64 sinks, 4096 keys": replace(PLAIN, **LONG, terms=("sinks",)),
    "128, 4096 keys": replace(PLAIN, **LONG, head_dim=128, v_head_dim=128, scale=128**-0.5),
}


def kernel_error(inputs: Inputs, reference: torch.Tensor, precision: str | None) -> float:
    """Largest error of the plain Triton kernel, with the shipped tile but for the precision, where one is named."""
    scores = in_kernel_form(check_scores(inputs.scores, inputs.q, inputs.k))
    blocks = None
    if scores.hides:
        band: dict[str, Any] = {name: value for name, value in inputs.mask.items() if name != "scale"}
        lengths: dict[str, Any] = {"q_len": inputs.q.shape[2], "kv_len": inputs.k.shape[2], "batch": inputs.q.shape[0]}
        blocks = block_map_cuda(scores, **band, **lengths)
    terms = 2 if scores.slopes is not None or scores.bias is not None else int(scores.given)
    sizes: dict[str, Any] = {"v_head_dim": inputs.v.shape[3], "terms": terms}
    tile = attend_tile(torch.float32, inputs.q.shape[3], capability_of(inputs.q.device), **sizes)
    if precision is not None:
        tile = tile._replace(precision=precision)
    lists = (inputs.kv_num_blocks, inputs.kv_indices)
    options: dict[str, Any] = {"return_lse": False, "counter": None, "tile": tile, "implementation": "triton"}
    launches, out, _ = attend_launches(
        inputs.q, inputs.k, inputs.v, *lists, **inputs.mask, **options, scores=scores, blocks=blocks
    )
    run_all(launches, inputs.q.device)
    return float((out.double() - reference).abs().max())


def measure(case: Case, seeds: int) -> dict[str, Any]:
    """Errors of a case, the largest over the seeds of each ratio to what is allowed."""
    found: dict[str, Any] = {"dense": 0.0, "allowed": 0.0}
    for seed in range(7, 7 + seeds):
        inputs = replace(case, seed=seed).tensors(DEVICE)
        reference, _ = inputs.reference()
        dense = dense_error(inputs, reference)
        allowed = 2 * dense + torch.finfo(torch.float32).eps * float(inputs.v.abs().max())
        for name in (*PRECISIONS, "shipped"):
            if name == "ieee" and 64 < inputs.q.shape[3] < 576:  # half a minute of compilation
                found[name] = {}
                continue
            try:
                error = kernel_error(inputs, reference, None if name == "shipped" else name)
            except Exception as refused:  # a precision that this Triton cannot compile: the others count all the same
                found[name] = {"refused": str(refused).strip().splitlines()[-1][:200]}
                print(name, found[name])
                continue
            worst = found.setdefault(name, {"error": 0.0, "of_dense": 0.0, "of_allowed": 0.0})
            of_allowed = error / allowed
            if of_allowed > worst["of_allowed"]:
                worst.update(error=error, of_dense=error / max(dense, 1e-30), of_allowed=of_allowed)
        found["dense"], found["allowed"] = max(found["dense"], dense), max(found["allowed"], allowed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="names of cases; absent: all")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chosen = options.cases or list(CASES)
    records = {name: measure(CASES[name], options.seeds) for name in chosen}
    print(f"{'':22}{'dense':>10}" + "".join(f"{name:>26}" for name in (*PRECISIONS, "shipped")))
    for name, record in records.items():
        cells = ""
        for kind in (*PRECISIONS, "shipped"):
            one = record[kind]
            text = "-"
            if "error" in one:
                text = f"{one['error']:.2e} {one['of_dense']:.2f}x {one['of_allowed']:.2f}"
            cells += f"{text:>26}"
        print(f"{name:22}{record['dense']:10.2e}{cells}")
    print("each: error, times dense's, share of what is allowed")
    if options.out:
        head = {**describe(torch.device("cuda", 0)), "command": "python " + " ".join(sys.argv)}
        options.out.write_text(json.dumps({**head, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
