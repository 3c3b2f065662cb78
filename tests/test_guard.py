"""The guard on a trained model: wrong hints are escalated and right answers come back, right hints stay."""

from __future__ import annotations

import pytest
import torch

from examples import guard
from sparsepass.measure import testbed
from sparsepass.measure.tasks.tokens import TOKEN_TASKS

LOOKUP, COUNT = TOKEN_TASKS[0], TOKEN_TASKS[3]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_wrong_hint_is_escalated_and_accuracy_comes_back() -> None:
    model = testbed.load(dtype=torch.float32)
    with torch.no_grad():
        floors = guard.find_floors(model, 1024, 2)
        guard.use(model, guard.make_policy(floors))
        wrong = guard.serve(model, [(COUNT, COUNT.draw(1024, seed)) for seed in range(2)])
        lookups = guard.serve(model, [(LOOKUP, LOOKUP.draw(1024, seed)) for seed in range(2)])
    assert wrong[0].raised_to is not None
    assert wrong[0].kept[0] < floors[0]
    assert wrong[1].ran_under == wrong[0].raised_to
    assert wrong[1].kept == {}  # dense, which keeps everything and is not watched
    assert all(one.dense and one.again for one in wrong)
    assert not any(one.unguarded for one in wrong)
    assert [one.right for one in wrong] == [False, True]
    assert [(one.right, one.raised_to, one.ran_under) for one in lookups] == [(True, None, "single_qa")] * 2
