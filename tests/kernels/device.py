"""Where the Triton kernels run in this process: on a GPU, under the interpreter, or nowhere."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"

pytestmark = [
    pytest.mark.gpu if GPU else pytest.mark.slow,
    pytest.mark.skipif(
        not GPU and not INTERPRETED,
        reason="no CUDA device; test_interpreter.py runs this file under TRITON_INTERPRET=1",
    ),
]
