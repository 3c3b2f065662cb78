"""The C++ kernels under the address and the undefined-behavior sanitizers, over random good and bad problems.

    make sanitize                     # 1000 problems
    make sanitize ARGS="--count 5000 --seed 7"

First a list with a count over its width goes past the checks: the sanitizer must stop that, or it sees nothing. Exits
with 1 where it does not, where it stops anything else, where a bad list is taken or a good one refused. Linux with g++.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsepass.kernels.types import BlockLists

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COUNTS = (-1, -(2**31), 2**31 - 1, 1000)
ENTRIES = (-1, -(2**31), 2**31 - 1, 7, 100_000)
"""What takes the place of a count, or of an entry; 7 may be a block that is there, or one that is listed already."""


def sanitized(mode: str, count: int, seed: int, cache: str) -> subprocess.CompletedProcess[str]:
    """This script in a process that has the sanitizers' runtime: it must be there before torch is."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    settings = {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CXX": "g++",
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
        "SPARSEPASS_CACHE_DIR": cache,
    }
    command = [sys.executable, __file__, "--mode", mode, "--count", str(count), "--seed", str(seed)]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=ROOT)


def use_sanitizers() -> None:
    """The library is built with them; where it cannot be, this ends with an error."""
    from sparsepass.kernels.runtime import build

    build.FLAGS += FLAGS
    if build.library() is None:
        sys.exit("the library cannot be built with the sanitizers")


def prove() -> None:
    """A read past a list's end, which the checks would refuse."""
    import torch

    from sparsepass.kernels.attend.cpu import native
    from sparsepass.kernels.attend.cpu.visible import Visibility
    from sparsepass.kernels.scores import Scores

    use_sanitizers()
    q = torch.randn(1, 1, 64, 16)
    num, indices = torch.full((1, 1, 4), 4000, dtype=torch.int32), torch.zeros(1, 1, 4, 4, dtype=torch.int32)
    mask = Visibility(64, 64, 16, 16, -1, -1, 0, None, None)
    native.attend(q, q, q, num, indices, mask, 1.0, False, Scores(), None)


def spoiled(lists: BlockLists, rng: random.Random) -> BlockLists:
    """The lists with one count or one entry that may be anything."""
    name = rng.choice(("kv_num_blocks", "kv_indices"))
    changed = getattr(lists, name).clone()
    place = tuple(rng.randrange(size) for size in changed.shape)
    changed[place] = rng.choice(COUNTS if name == "kv_num_blocks" else ENTRIES)
    return replace(lists, **{name: changed})


def fits(lists: BlockLists, kv_len: int) -> bool:
    """Whether lists are what is accepted, said in plain Python."""
    blocks, width = -(-kv_len // lists.kv_block), lists.kv_indices.shape[-1]
    counts, rows = lists.kv_num_blocks.flatten().tolist(), lists.kv_indices.flatten(0, 2).tolist()
    if not all(0 <= count <= width for count in counts):
        return False
    used = [row[:count] for row, count in zip(rows, counts, strict=True)]
    return all(len(set(row)) == len(row) and all(0 <= block < blocks for block in row) for row in used)


def run_problems(count: int, seed: int) -> None:
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from sparsepass.errors import KernelInputError
    from sparsepass.kernels.attend.api import block_sparse_attention
    from sparsepass.kernels.select.api import select_pooled_topk
    from sparsepass.testing import TERMS, Case, cases

    use_sanitizers()
    done: Counter[str] = Counter()
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    problems = st.one_of(cases(dtypes=dtypes), cases(dtypes=dtypes, bad=True), cases(dtypes=dtypes, terms=TERMS))

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=problems, number=st.integers(0, 2**32), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    def problem(case: Case, number: int, density: float) -> None:
        inputs, rng = case.tensors(), random.Random(number)
        q, k, v, visible, scale = inputs.q, inputs.k, inputs.v, inputs.band, inputs.mask["scale"]
        select_pooled_topk(q, k, scale=scale, visible=visible, density=density)
        done["selections"] += 1
        for lists in (inputs.lists, *(spoiled(inputs.lists, rng) for _ in range(3))):
            good = fits(lists, case.kv_len)
            try:
                block_sparse_attention(q, k, v, lists, scale=scale, visible=visible, scores=inputs.scores)
            except KernelInputError:
                assert not good, f"refused: {case} {lists}"
                done["bad lists refused"] += 1
            else:
                assert good, f"taken: {case} {lists}"
                done["good lists computed"] += 1

    problem()
    print(", ".join(f"{number} {name}" for name, number in sorted(done.items())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("all", "prove", "run"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=1000, help="problems")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.mode == "prove":
        prove()
        return 0
    if options.mode == "run":
        run_problems(options.count, options.seed)
        return 0
    with tempfile.TemporaryDirectory() as cache:
        proof = sanitized("prove", 0, 0, cache)
        if proof.returncode == 0 or "AddressSanitizer" not in proof.stderr:
            print(f"the sanitizers did not stop a read past the end:\n{proof.stderr[-3000:]}")
            return 1
        print("A read past the end of a list was stopped, as it must be.", flush=True)
        done = sanitized("run", options.count, options.seed, cache)
    print(done.stdout.strip())
    if done.returncode:
        print(done.stderr[:6000])
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
