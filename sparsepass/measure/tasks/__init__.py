"""Tasks with exact length control, by class: what a calibration measures on."""

from __future__ import annotations

from sparsepass.measure.tasks.base import Metric, Question, Sample, Task, TaskError

__all__ = ["Metric", "Question", "Sample", "Task", "TaskError"]
