"""sparsepass: a ``torch.compile`` backend that rewrites attention into block-sparse kernels.

The budget, how much of the attention is computed, follows the length and a task hint; both are guarded, so each
compiled graph carries its own budget.
"""

from sparsepass import moved
from sparsepass.decorator import sparse
from sparsepass.errors import HintError, KernelInputError, OptionError, PolicyError, SparsepassError
from sparsepass.monitoring.monitor import MassReport, Monitor, monitor
from sparsepass.pipeline import backend
from sparsepass.planning.plan import plan_keys
from sparsepass.policies.policy import Policy
from sparsepass.reports.explain import explain
from sparsepass.reports.report import Report
from sparsepass.request.hints import TaskHint, current_task, task
from sparsepass.types import Budget, TaskClass
from sparsepass.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "HintError",
    "KernelInputError",
    "MassReport",
    "Monitor",
    "OptionError",
    "Policy",
    "PolicyError",
    "Report",
    "SparsepassError",
    "TaskClass",
    "TaskHint",
    "backend",
    "current_task",
    "explain",
    "monitor",
    "plan_keys",
    "sparse",
    "task",
    "warmup",
]

moved.install()
