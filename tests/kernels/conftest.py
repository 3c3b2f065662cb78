"""Threads for the tests of the kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _several_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """The C++ kernels divide their rows among threads: at least two, also where ``OMP_NUM_THREADS`` is 1."""
    threads = torch.get_num_threads()
    if "cpu" in request.path.stem:
        torch.set_num_threads(max(threads, 2))
    yield
    torch.set_num_threads(threads)
