"""Where the Triton kernels run in this process: on a GPU, under the interpreter, or nowhere."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"

EXAMPLES = 400 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 25 if GPU else 8
"""Cases drawn by each property; the interpreter takes a second or two for one."""

pytestmark = [
    pytest.mark.gpu if GPU else pytest.mark.slow,
    pytest.mark.skipif(
        not GPU and not INTERPRETED,
        reason="no CUDA device; test_interpreter.py runs this file under TRITON_INTERPRET=1",
    ),
]
