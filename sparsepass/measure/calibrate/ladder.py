"""The budgets that a calibration tries of a method: from the one that computes least to the one that computes most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparsepass.errors import OptionError, PolicyError, close_names
from sparsepass.methods import METHODS, decode_budget, make_method
from sparsepass.types import Budget

STEPS: dict[str, tuple[float, ...]] = {
    "density": (0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7),
    "alpha": (0.5, 0.3, 0.18, 0.1, 0.06, 0.03, 0.015),
    "coverage": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
    "tau": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
    "gamma": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99),
    "window": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
}
"""Values of a method's dial, the sparsest first. Steps of density are of a factor of about 1.5."""


def ladder(text: str) -> tuple[Budget, ...]:
    """The budgets of ``pooled_topk``, ``pooled_topk=0.05,0.1,0.3`` or ``top_p(coverage=0.9, stride=8)``, in order.

    In the last form every parameter but the dial is kept; ``=0.5,0.9`` may follow it. Raises ``OptionError`` or
    ``PolicyError``.
    """
    known = {method.name: method for method in METHODS if method.dial is not None}
    name, equals, values = text.partition("=")
    fixed: dict[str, Any] = {}
    if "(" in name:
        written, bracket, after = text.rpartition(")")
        budget = decode_budget(written + bracket)
        name, fixed = budget.method, dict(budget.params)
        _, equals, values = after.partition("=")
    if name not in known:
        raise OptionError(f"The method {name!r} cannot be calibrated. {close_names(name, known)}")
    dial = known[name].dial
    assert dial is not None  # only such methods are in ``known``
    steps = STEPS[dial]
    if equals:
        try:
            steps = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise OptionError(f"{text!r} is no method with values of {dial}, such as {name}={steps[0]:g}.") from None
    kept = {key: value for key, value in fixed.items() if key != dial}
    try:
        methods = [make_method(Budget(name, {**kept, dial: _number(dial, step)})) for step in steps]
    except PolicyError as error:
        raise OptionError(f"{text!r}: {error}") from error
    at_all = known[name].dial_at_all
    methods.sort(key=lambda one: getattr(one, dial), reverse=at_all < getattr(methods[0], dial))
    return tuple(method.budget() for method in methods)


def within(steps: Sequence[Budget], length: int) -> tuple[Budget, ...]:
    """The budgets without windows that hold most of a length; the sparsest at least."""
    dial = make_method(steps[0]).dial
    if dial != "window":
        return tuple(steps)
    return tuple(step for step in steps if getattr(make_method(step), dial) <= length // 2) or tuple(steps[:1])


def _number(dial: str, value: float) -> float | int:
    return int(value) if dial == "window" else value


def with_density(budget: Budget, density: float) -> Budget:
    """The budget with the density that was measured, where its method asks for an expectation."""
    method = make_method(budget)
    if not hasattr(method, "expected_density"):
        return budget
    return replace(method, expected_density=min(1.0, max(density, 1e-3))).budget()  # type: ignore[type-var]
