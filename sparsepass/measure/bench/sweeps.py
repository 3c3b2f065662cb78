"""Methods to measure, from what is written on the command line."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from sparsepass.errors import OptionError, PolicyError, close_names
from sparsepass.methods import METHODS, Method, decode_budget, make_method
from sparsepass.methods.base import parameters
from sparsepass.types import Budget

SWEEPS: dict[str, tuple[float, ...]] = {
    "density": (0.05, 0.1, 0.2, 0.4),
    "alpha": (0.03, 0.08, 0.18, 0.4),
    "coverage": (0.8, 0.9, 0.95, 0.98),
    "gamma": (0.8, 0.9, 0.95, 0.98),
    "tau": (0.8, 0.9, 0.95, 0.98),
    "window": (1024, 4096, 16384),
}
"""Values of a method's main parameter, by its name, where none are given."""


@dataclass(frozen=True, slots=True)
class Case:
    """A method to measure, and the name it is grouped under."""

    name: str
    method: Method

    @property
    def text(self) -> str:
        return self.method.text()


def cases(given: tuple[str, ...]) -> list[Case]:
    """``pooled_topk``, ``pooled_topk=0.05,0.1``, ``pooled_topk(density=0.1)``; all methods if none is given.

    Raises ``OptionError`` or ``PolicyError``.
    """
    sparse = {method.name: method for method in METHODS if method.name != "dense"}
    found: list[Case] = []
    for text in given or tuple(sparse):
        name, equals, values = text.partition("=")
        if "(" in name:
            budget = decode_budget(text)
            found.append(Case(budget.method, make_method(budget)))
            continue
        if name not in sparse:
            raise OptionError(f"--methods {name!r} is not known. {close_names(name, sparse)}")
        found += _swept(sparse[name], values if equals else "")
    return found


def _swept(method: type[Method], values: str) -> list[Case]:
    dial = getattr(method, "dial", "")
    known = {spec.name: spec for spec in parameters(method)}
    if not dial:
        dial = next((name for name in known if name in SWEEPS), "")
    numbers: tuple[float, ...] = SWEEPS.get(dial, ())
    if values:
        if not dial:
            raise OptionError(f"{method.name} has no main parameter to give values of; write it in full.")
        try:
            numbers = tuple(float(value) for value in values.split(","))
        except ValueError:
            raise OptionError(f"--methods {method.name}={values} is no list of numbers, such as =0.05,0.1.") from None
    if not dial or not numbers:
        missing = [name for name, spec in known.items() if spec.default is MISSING and spec.default_factory is MISSING]
        if missing:
            raise OptionError(
                f"{method.name} needs {', '.join(missing)}; write it in full, as in 'name(parameter=0.1)'."
            )
        return [Case(method.name, make_method(Budget(method.name)))]
    kind = known[dial].type
    whole = kind in ("int", int)
    try:
        return [
            Case(method.name, make_method(Budget(method.name, {dial: int(number) if whole else number})))
            for number in numbers
        ]
    except PolicyError as error:
        raise OptionError(f"--methods {method.name}: {error}") from error
