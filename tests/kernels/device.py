"""Where the Triton kernels run in this process: on a GPU, under the interpreter, or nowhere."""

import os

import pytest
import torch

from sparsepass.testing import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"

EXAMPLES = 400 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 25 if GPU else 6
"""Cases drawn by each property; the interpreter takes a second or two for one."""

FEWER = EXAMPLES if GPU else max(4, EXAMPLES // 2)
"""The same for properties whose every case runs several selections, or whose kernels other properties run as well."""

GROUPS = (1, 2, 3) if GPU else (1, 2)
"""Query heads to a key head. Time interpreted is in proportion to the heads, and two to a group show a wrong one."""

GROUPED = Case(
    batch=2, kv_heads=2, group=2, q_len=300 if GPU else 40, kv_len=800 if GPU else 136, head_dim=64 if GPU else 16,
    v_head_dim=64 if GPU else 16, dtype=torch.float32, q_block=64 if GPU else 16, kv_block=64 if GPU else 16,
    left=-1, right=0, offset=500 if GPU else 96, scale=0.25, layout="bshd", segments="left_pad", lists="full",
    shared_lists="none", bad=0, seed=11,
)  # fmt: skip
"""Batch, key heads and groups of more than one, which a handful of drawn cases seldom has all at once."""

pytestmark = [
    pytest.mark.gpu if GPU else pytest.mark.slow,
    pytest.mark.skipif(
        not GPU and not INTERPRETED,
        reason="no CUDA device; test_interpreter.py runs this file under TRITON_INTERPRET=1",
    ),
]
