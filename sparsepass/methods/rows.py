"""Budgets that differ by row of a batch: the classes of a mix share one method, each with its own dial."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsepass.errors import PolicyError
from sparsepass.methods.base import Method
from sparsepass.methods.catalogue import decode_budget, make_method
from sparsepass.methods.heads import float32_at_most
from sparsepass.types import DENSE, TASKS, Budget, TaskClass

if TYPE_CHECKING:
    import torch

_NEXT, _OWN, _REPLACED = "|", "=", "*="


@dataclass(frozen=True, slots=True)
class ClassBudget:
    """What rows of one class compute in a mixed batch."""

    task: TaskClass
    budget: Budget
    """Of the cap's method, or ``DENSE``: every visible block, in the sparse kernel."""
    replaced: bool = False
    """The class's own budget is of another method or block size, so it gets that of the costliest class."""


@dataclass(frozen=True, slots=True)
class RowBudgets:
    """Budgets of one site of a mixed batch, by class. One launch serves all rows, so one method does."""

    cap: Budget
    """Computes at least as much as each of ``classes``: it fixes the compiled graph and its buffers."""
    classes: tuple[ClassBudget, ...]
    """In the order of ``TASKS``. A class that is not here would get the cap."""

    def text(self) -> str:
        """One line, for instance ``pooled_topk(density=0.6)|single_qa=pooled_topk(density=0.1)|...``."""
        parts = [make_method(self.cap).text()]
        for one in self.classes:
            parts.append(f"{one.task}{_REPLACED if one.replaced else _OWN}{make_method(one.budget).text()}")
        return _NEXT.join(parts)

    def budget(self, task: TaskClass) -> Budget:
        """What rows of a class compute."""
        return next((one.budget for one in self.classes if one.task is task), self.cap)

    def row_density(self, task: TaskClass, length: int | None = None) -> float:
        """The share that rows of a class compute, mean over heads, at ``length`` keys if known."""
        return density_of(make_method(self.budget(task)), length)

    def cost(self, task: TaskClass | None, length: int) -> float:
        """The time of rows of a class (None: under the cap, the most that a batch can), as ``Method.cost_at``."""
        return make_method(self.cap if task is None else self.budget(task)).cost_at(length)

    def dials(self, heads: int) -> tuple[tuple[float, ...], ...] | None:
        """The dial of each class (in the order of ``TASKS``) and query head; None for a method without one."""
        cap = make_method(self.cap)
        if cap.dial is None:
            return None
        held = {one.task: make_method(one.budget) for one in self.classes}
        every = (type(cap).dial_at_all,) * heads
        return tuple(every if (method := held.get(task, cap)).computes_all else method.dials(heads) for task in TASKS)


def is_row_text(text: str) -> bool:
    """Whether a budget's text is that of ``RowBudgets``."""
    return _NEXT in text


@functools.lru_cache(maxsize=1024)
def decode_rows(text: str) -> RowBudgets:
    """The budgets that ``RowBudgets.text`` wrote. Raises ``PolicyError``."""
    cap, *parts = text.split(_NEXT)
    classes = []
    for part in parts:
        name, _, budget = part.partition(_OWN)
        replaced = name.endswith("*")
        classes.append(ClassBudget(TaskClass(name.removesuffix("*")), decode_budget(budget), replaced))
    return RowBudgets(decode_budget(cap), tuple(classes))


def share_batch(budgets: Mapping[TaskClass, Budget], length: int | None = None) -> RowBudgets | None:
    """How classes with these budgets share one launch; None where all are dense.

    The method is that of the class that computes most at ``length`` keys. A class of another method, or of another
    block size, gets that class's budget: never less than its own share, since that one computes more. So that no class
    loses the query blocks at its end that it computes whole, all get as many as the one with most.
    """
    methods = _with_most_last({task: make_method(budget) for task, budget in budgets.items()})
    sparse = [method for method in methods.values() if not method.computes_all]
    if not sparse:
        return None
    costliest = max(sparse, key=lambda method: (density_of(method, length), method.max_density, method.text()))
    kind = type(costliest)
    if kind.dial is None and len(sparse) < len(methods):
        return None  # it cannot compute everything for the dense rows
    classes, together = [], [costliest]
    for task in TASKS:
        if task not in methods:
            continue
        method = methods[task]
        fits = method.computes_all or method == costliest or _fits(costliest, method)
        if fits and not method.computes_all:
            together.append(method)
        budget = DENSE if method.computes_all else (method if fits else costliest).budget()
        classes.append(ClassBudget(task, budget, not fits))
    together += [method for method in methods.values() if method.computes_all]
    cap = costliest if kind.dial is None else kind.cap(together)
    return RowBudgets(cap.budget(), tuple(classes))


def leaves_as_is(budgets: RowBudgets, others: RowBudgets) -> bool:
    """Whether ``others``, of more classes, leaves the cap and the classes of ``budgets`` as they are."""
    return others.cap == budgets.cap and set(budgets.classes) <= set(others.classes)


def density_of(method: Method, length: int | None) -> float:
    """The share a method computes, mean over heads."""
    return method.mean_density if length is None else method.density_at(length)


def _with_most_last(methods: dict[TaskClass, Method]) -> dict[TaskClass, Method]:
    """Every method that has a ``last`` with the greatest of them."""
    most = max((getattr(method, "last", 0) for method in methods.values()), default=0)
    return {
        task: replace(method, last=most) if hasattr(method, "last") else method  # type: ignore[type-var]
        for task, method in methods.items()
    }


def _fits(costliest: Method, method: Method) -> bool:
    """Whether the two differ in their dial alone."""
    if type(method) is not type(costliest):
        return False
    try:
        type(method).cap((costliest, method))
    except PolicyError:
        return False
    return True


@functools.cache  # kept for good: compiled graphs and CUDA graphs refer to it
def dial_table(text: str, heads: int, device: torch.device) -> torch.Tensor | None:
    """The dials of ``decode_rows(text)`` on the device, float32 [classes, heads]: a class's number is its row."""
    import torch

    shared = decode_rows(text)
    dials = shared.dials(heads)
    if dials is None:
        return None
    if make_method(shared.cap).dial == "density":
        dials = tuple(tuple(map(float32_at_most, row)) for row in dials)
    with torch.inference_mode(False):
        return torch.tensor(dials, dtype=torch.float32, device=device)
