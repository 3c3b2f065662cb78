"""Floors for a policy: what the verified budgets keep of the attention mass where the hint is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsepass.graph import torch_private
from sparsepass.measure.calibrate.measure import ModelMeter
from sparsepass.measure.calibrate.result import Calibration, Floors
from sparsepass.measure.tasks.base import Task
from sparsepass.monitoring.monitor import monitor
from sparsepass.pipeline import backend
from sparsepass.planning import options as names
from sparsepass.policies.policy import Policy
from sparsepass.types import TaskClass

FLOOR_SEED = 1 << 34
"""Seeds of the samples for the floors begin here."""

MARGIN = 0.95
"""A floor is this part of the least that a layer kept in any request: a right hint should never be raised."""


def measure_floors(
    meter: ModelMeter, tasks: Sequence[Task], found: Calibration, policy: Policy, contexts: int
) -> Floors:
    """Run ``contexts`` fresh samples per task and length under the policy and a monitor, each with its right hint.

    The model is compiled anew, with the policy, and stays so.
    """
    torch_private.forget()
    options = {names.INDUCTOR: False, names.ALWAYS_SPARSE: True, names.POLICY: policy}
    meter.model.compile(backend=backend, options=options)
    floors: dict[tuple[TaskClass, int], dict[int, float]] = {}
    for length in found.lengths:
        for task in tasks:
            with monitor() as watched, torch.no_grad():
                for place in range(contexts):
                    meter.score(task, length, found.goal.seed + FLOOR_SEED + place, task.task_class)
            of_class = floors.setdefault((task.task_class, length), {})
            for one in watched.report().layers:
                if one.layer is not None:  # a policy names layers by their numbers
                    of_class[one.layer] = min(MARGIN * one.least, of_class.get(one.layer, 1.0))
    return floors
