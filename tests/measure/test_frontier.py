"""The frontier's counts against what is written out, its comparisons on made-up cells, and how sparse a state is."""

from __future__ import annotations

import pytest
import torch

from examples.testbed import compare, hidden
from examples.testbed.costs import BLOCK, cost, parameters, visible_blocks
from examples.testbed.network import new_weights
from sparsepass.measure.testbed import SIZES


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_costs_are_those_of_the_weights(name: str) -> None:
    size, length = SIZES[name], 256
    weights = new_weights(size, torch.Generator())
    matrices = {key: weights[key].numel() for key in ("qkv", "out", "gate_up", "down")}
    assert parameters(size) == sum(matrices.values()) + weights["embedding"].numel()
    blocks = visible_blocks(length, size)
    assert blocks == size.layers * size.heads * (1 + 2 + 3 + 4)
    paid = cost(size, length, blocks, pooled=False, answer=0)
    half = cost(size, length, blocks / 2, pooled=False, answer=0)
    assert paid.flops - half.flops == 2 * 2 * BLOCK * BLOCK * size.head_dim * blocks / 2
    assert 2 * half.flops - paid.flops == 2 * length * sum(matrices.values())
    assert 2 * half.bytes - paid.bytes == 2 * parameters(size)
    assert cost(size, length, blocks, pooled=True, answer=2).flops > paid.flops


def cell(model: str, budget: str, flops: float, right: str) -> compare.Cell:
    share = right.count("1") / len(right)
    return {
        "model": model, "task": "t", "class": "single_qa", "length": 64, "budget": budget, "density": 0.5,
        "questions": len(right), "accuracy": share, "flops": flops, "bytes": flops, "right": right,
    }  # fmt: skip


def test_a_comparison_takes_the_costliest_that_fits_whatever_it_answers() -> None:
    cells = [
        cell("tiny", "dense", 10.0, "1100"),
        cell("small", "dense", 30.0, "1111"),
        cell("small", "a", 5.0, "1111"),
        cell("small", "b", 9.0, "1010"),
        cell("small", "c", 11.0, "1111"),
    ]
    for one in compare.comparisons(cells):
        assert (one["smaller"], one["larger"], one["budget"], one["share"]) == ("tiny", "small", "b", 0.9)
        mean, low, high = one["difference"]  # one won, one lost
        assert mean == 0.0
        assert low < 0.0 < high
        assert low == pytest.approx(-high)
    short = [one for one in cells if one["budget"] not in "ab"]
    assert all("difference" not in one and one["least"] == 1.1 for one in compare.comparisons(short))


def test_measures_of_sparsity() -> None:
    state = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 3.0, 0.0, 0.0]])
    found = hidden.sparsity(state)
    torch.testing.assert_close(found["hoyer"], torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found["participation"], torch.tensor([1.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(found["small"], torch.tensor([0.0, 0.75], dtype=torch.float64))


def test_points_draw_what_they_name() -> None:
    for point in hidden.points((256, 512)):
        tokens, answer = hidden.drawn(point, 2, torch.Generator().manual_seed(0))
        assert tokens.shape == (2, point.length - point.task.answer_size)
        if point.task.name == "token_chains":  # the value begins the asked name's chain
            name = tokens[:, -1]
            for row in range(2):
                for _ in range(point.hops):
                    place = int((tokens[row, :-2] == name[row]).nonzero()[0])
                    name[row] = tokens[row, place - 1]
            assert name.tolist() == answer.tolist()
