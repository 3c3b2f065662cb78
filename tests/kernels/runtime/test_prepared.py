"""Prepared launches run on the call's own tensors, whichever those are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsepass.errors import KernelInputError
from sparsepass.kernels.runtime.launch import Launch
from sparsepass.kernels.runtime.prepared import Prepared


class Recorder:
    """Stands for a kernel of parameters (a, factor, out) and for its compiled form."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.params = [SimpleNamespace(name=name) for name in ("a", "factor", "out")]
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)

        def run(a: torch.Tensor, factor: int, out: torch.Tensor) -> None:
            out.copy_(a * factor)

        return run


def prepared(x: torch.Tensor) -> tuple[Recorder, Prepared]:
    kernel = Recorder()
    between = torch.empty(4)
    launches = [
        Launch(kernel, (3,), {"out": between, "a": x, "factor": 2}, {"num_warps": 4}),
        Launch(kernel, (5, 6), {"factor": 10, "a": between, "out": between}, {}),
    ]
    return kernel, Prepared(launches, [kernel, kernel], (x, None), (between, None))


def test_new_inputs_new_outputs() -> None:
    _, problem = prepared(torch.ones(4))
    first, nothing = problem.run((torch.arange(4.0), None))
    second, _ = problem.run((torch.full((4,), 5.0), None))
    assert nothing is None
    assert first is not None
    assert second is not None
    assert first.tolist() == [0.0, 20.0, 40.0, 60.0]
    assert second.tolist() == [100.0] * 4


def test_grids_have_three_dimensions() -> None:
    kernel, _ = prepared(torch.ones(4))
    assert kernel.grids == [(3, 1, 1), (5, 6, 1)]


def test_room_keeps_its_strides() -> None:
    kernel = Recorder()
    x, out = torch.ones(2, 3), torch.empty(3, 2).t()
    problem = Prepared([Launch(kernel, (1,), {"a": x, "factor": 3, "out": out}, {})], [kernel], (x,), (out,))
    (result,) = problem.run((x,))
    assert result is not None
    assert result.stride() == (1, 2)
    assert result.tolist() == [[3.0] * 3] * 2


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 70_000)], ids=str)
def test_a_grid_that_cuda_does_not_take_is_named(grid: tuple[int, ...]) -> None:
    """A batch of windows is soon longer than a grid's second and third size may be; the first may be longer."""
    x, kernel = torch.ones(2), Recorder()
    arguments = {"a": x, "factor": 2, "out": x.clone()}
    with pytest.raises(KernelInputError, match=r"grid of .*up to 65535"):
        Launch(kernel, grid, arguments, {}).run()
    Launch(kernel, (70_000, 65535), arguments, {}).run()
    assert kernel.grids == [(70_000, 65535)]
