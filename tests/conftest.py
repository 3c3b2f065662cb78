"""Shared test set-up: hypothesis profiles, GPU tests skipped with a reason, tiny random transformers models."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors]
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_QUIET)
settings.register_profile("deep", max_examples=500, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.register_profile("triage", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])  # no shrinking
os.environ.setdefault("SPARSEPASS_TUNING", "off")  # what was measured on this machine must not change the tests
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no CUDA device. Run the slow tests last; first where processes share the tests."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
    shared = hasattr(config, "workerinput")  # set in a process of pytest-xdist
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None) == shared)
    if shared:
        items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled frame from an earlier test, none left for a later one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
