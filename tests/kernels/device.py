"""Where the Triton kernels run in this process: on a GPU, under the interpreter, or nowhere."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"

EXAMPLES = 400 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 25 if GPU else 8
"""Cases drawn by each property; the interpreter takes a second or two for one."""

FEWER = EXAMPLES if GPU else max(4, EXAMPLES // 2)
"""The same for properties whose every case runs several selections, or whose kernels other properties run as well."""

GROUPS = (1, 2, 3) if GPU else (1, 2)
"""Query heads to a key head. Time interpreted is in proportion to the heads, and two to a group show a wrong one."""

pytestmark = [
    pytest.mark.gpu if GPU else pytest.mark.slow,
    pytest.mark.skipif(
        not GPU and not INTERPRETED,
        reason="no CUDA device; test_interpreter.py runs this file under TRITON_INTERPRET=1",
    ),
]
