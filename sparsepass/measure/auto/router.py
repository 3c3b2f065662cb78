"""The router: from the signals of a cheap prefill to the odds that it fell short, and a threshold. Plain data, JSON."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsepass.errors import shown, shown_path
from sparsepass.host.files import read_json, write_json
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.probe import SIGNALS, Probe
from sparsepass.types import TaskClass

VERSION = 1
"""Of the router file format."""


@dataclass(frozen=True)
class Term:
    """One signal's part of the score: ``weight * (value - mean) / scale``; 0 or more, since larger values are worse."""

    mean: float
    scale: float
    weight: float


FIRST = TaskClass.SINGLE_QA
"""The class whose budgets are tried first, if a router names no other."""


@dataclass(frozen=True)
class Router:
    """Trusts a prefill whose score is under ``threshold``, a log-odds; the others run again.

    ``first``: the class whose budgets are tried where no hint is given. ``then``: the class that a request runs under
    which was not trusted. ``above`` (exclusive) and ``up_to``: key lengths in tokens that were calibrated; requests of
    other lengths run under ``then`` at once. ``budgets``: what ``first`` computed when it was calibrated.
    ``calibrated``: fingerprint of the model; ``shown``: what the fit says of itself. Raises ``AutoError``.
    """

    terms: Mapping[str, Term]
    bias: float
    threshold: float
    probe: Probe
    above: int
    up_to: int
    first: TaskClass = FIRST
    then: TaskClass = TaskClass.UNKNOWN
    name: str = "unnamed"
    budgets: tuple[str, ...] = ()
    calibrated: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.terms or (unknown := sorted(set(self.terms) - set(SIGNALS))):
            named = "none" if not self.terms else ", ".join(unknown)
            raise AutoError(f"A router reads the signals {named}; accepted are some of {', '.join(SIGNALS)}.")
        for name, term in self.terms.items():
            if not all(map(math.isfinite, (term.mean, term.scale, term.weight))) or term.scale <= 0 or term.weight < 0:
                raise AutoError(
                    f"The term {name} of a router is {term}; accepted are finite numbers, the scale above 0 and the "
                    "weight 0 or more."
                )
        if not math.isfinite(self.bias) or math.isnan(self.threshold):
            raise AutoError(f"A router has bias {self.bias} and threshold {self.threshold}; accepted are numbers.")
        if not 0 <= self.above < self.up_to:
            raise AutoError(f"A router's lengths run above {self.above} up to {self.up_to}; accepted is above < up_to.")
        if needed := sorted(set(self.terms) & RECHECKED) if not self.probe.rows else []:
            raise AutoError(f"A router reads {', '.join(needed)}, but its probe has rows=0; give it rows.")

    def score(self, signals: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Log-odds [B] that a prefill fell short, from signals [B] by name; NaN counts as surely."""
        total: torch.Tensor | float = self.bias
        for name, term in self.terms.items():
            total = total + term.weight * (signals[name] - term.mean) / term.scale
        assert isinstance(total, torch.Tensor)  # there is a term
        return total.nan_to_num(nan=torch.inf)

    def holds_at(self, length: int) -> bool:
        return self.above < length <= self.up_to

    @property
    def probes(self) -> bool:
        """Whether any term needs more than the last logits."""
        return bool(set(self.terms) - LOGITS)

    @property
    def effective_probe(self) -> Probe:
        """The probe, without the rows that no term needs."""
        return self.probe if RECHECKED & set(self.terms) else Probe(0)

    @property
    def fingerprint(self) -> str:
        """SHA-256, 16 hex digits, of all that decides."""
        content = {name: value for name, value in self.to_json().items() if name in _DECIDING}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The content of the router's file."""
        data = {**asdict(self), "first": str(self.first), "then": str(self.then)}
        data["terms"] = {name: asdict(term) for name, term in self.terms.items()}
        return {"version": VERSION, **data, "budgets": list(self.budgets)}

    def save(self, path: str | Path) -> None:
        """Write the router's file, whole or not at all, sealed with its fingerprint. Raises ``AutoError``."""
        content = {**self.to_json(), "fingerprint": self.fingerprint}
        write_json(path, content, AutoError, indent=2)

    @staticmethod
    def from_json(data: Any, where: str = "router") -> Router:
        """The router that ``data`` describes; ``where`` begins each error's text. Raises ``AutoError``."""
        if not isinstance(data, dict) or data.get("version") != VERSION:
            given = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise AutoError(f"{where}: the format version is {shown(given)}; this sparsepass reads {VERSION}.")
        known = set(Router.__dataclass_fields__) | {"version", "fingerprint"}
        if unknown := sorted(map(str, set(data) - known)):
            raise AutoError(f"{where}: unknown field {shown(unknown[0])}; accepted are {', '.join(sorted(known))}.")
        fields = {name: value for name, value in data.items() if name not in ("version", "fingerprint")}
        try:
            fields["terms"] = {
                name: Term(**{part: float(_number(part, value)) for part, value in term.items()})
                for name, term in fields["terms"].items()
            }
            for name in ("bias", "threshold", "above", "up_to"):
                whole = name in ("above", "up_to")
                fields[name] = _number(name, fields[name], int if whole else (int, float))
            for name, kind in (("name", str), ("calibrated", dict), ("shown", dict), ("budgets", list)):
                if name in fields and not isinstance(fields[name], kind):
                    raise TypeError(f"{name} is {shown(fields[name])}")
            fields["probe"] = Probe(**fields["probe"])
            for name in ("first", "then"):
                if name in fields:
                    fields[name] = TaskClass(fields[name])
            fields["budgets"] = tuple(fields.get("budgets", ()))
            router = Router(**fields)
        except AutoError as error:
            raise AutoError(f"{where}: {error}") from error
        except KeyError as error:
            raise AutoError(f"{where}: the field {error} is missing; fit the router again.") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise AutoError(f"{where} holds no router: {error}. Fit it again.") from error
        if data.get("fingerprint", router.fingerprint) != router.fingerprint:
            raise AutoError(
                f"{where}: the fingerprint is {shown(data['fingerprint'])}, and the content's is {router.fingerprint}: "
                "the file was edited since it was written. Undo the edit, or remove the field to accept it."
            )
        return router

    @staticmethod
    def load(path: str | Path) -> Router:
        """Read a router's file. Raises ``AutoError`` naming it."""
        # A threshold may be infinite: that router trusts every prefill, or none.
        return Router.from_json(read_json(path, "router file", AutoError, finite=False), shown_path(path))


def _number(name: str, value: Any, kinds: Any = (int, float)) -> Any:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} is {shown(value)}")
    return value


RECHECKED = frozenset({"shift"})
"""Signals that need rows to be run again."""

LOGITS = frozenset({"entropy", "margin"})
"""Signals that the last logits give alone."""

_DECIDING = frozenset({"terms", "bias", "threshold", "probe", "above", "up_to", "first", "then"})
