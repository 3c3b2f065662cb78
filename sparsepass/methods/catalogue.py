"""The methods by name, and budgets as methods, as text and as JSON."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any

from sparsepass.errors import PolicyError, close_names, shown
from sparsepass.methods.a_shape import AShape
from sparsepass.methods.base import Method, parameters
from sparsepass.methods.dense import Dense
from sparsepass.methods.flex_prefill import FlexPrefill
from sparsepass.methods.full import Full
from sparsepass.methods.pooled_topk import PooledTopK
from sparsepass.methods.threshold import Threshold
from sparsepass.methods.top_p import TopP
from sparsepass.methods.vertical_slash import VerticalSlash
from sparsepass.methods.xattention import XAttention
from sparsepass.types import Budget

METHODS: tuple[type[Method], ...] = (
    Dense,
    Full,
    AShape,
    PooledTopK,
    Threshold,
    TopP,
    XAttention,
    VerticalSlash,
    FlexPrefill,
)
"""Every method. Order is that of the documentation."""

METHODS_VERSION = 1
"""Raised where a method selects other blocks than before for the same parameters: calibrations then no longer hold."""

_BY_NAME = {method.name: method for method in METHODS}


def method_names() -> tuple[str, ...]:
    """Names that a budget's ``method`` may have."""
    return tuple(_BY_NAME)


def make_method(budget: Budget) -> Method:
    """The method that a budget names, its parameters checked. Raises ``PolicyError`` saying what is accepted."""
    method = _BY_NAME.get(budget.method) if isinstance(budget.method, str) else None
    if method is None:
        raise PolicyError(f"Unknown method {shown(budget.method)}. {close_names(str(budget.method), _BY_NAME)}")
    known = {spec.name: spec for spec in parameters(method)}
    for param in budget.params:
        if param not in known:
            accepted = close_names(str(param), known) if known else "It takes no parameters."
            raise PolicyError(f"Unknown parameter {shown(param)} of method {method.name!r}. {accepted}")
    missing = [name for name, spec in known.items() if spec.default is MISSING and name not in budget.params]
    if missing:
        raise PolicyError(
            f"Method {method.name!r} needs {', '.join(map(repr, missing))}; given: {shown(dict(budget.params))}."
        )
    return method(**budget.params)


def merge_heads(heads: Sequence[Budget]) -> Budget:
    """One budget for a site from one per query head. Raises ``PolicyError`` where the method cannot differ by head."""
    if not heads:
        raise PolicyError("A site has at least one head, and budgets for none were given.")
    methods = [make_method(budget) for budget in heads]
    sparse = [method for method in methods if not isinstance(method, Dense)]
    return type(sparse[0] if sparse else methods[0]).merge_heads(methods).budget()


@functools.lru_cache(maxsize=4096)
def encode_budget(budget: Budget) -> str:
    """A budget as one line, for instance ``pooled_topk(density=0.1)``: how graph ops and plan keys carry it.

    Canonical: equal text means an equal budget, also across processes. Raises ``PolicyError`` as ``make_method``.
    """
    return make_method(budget).text()


@functools.lru_cache(maxsize=4096)
def decode_budget(text: str) -> Budget:
    """The budget of a line written by ``encode_budget``. Raises ``PolicyError``."""
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return make_method(Budget(node.id)).budget()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            params = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            return make_method(Budget(node.func.id, params)).budget()
    except PolicyError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PolicyError(_undecodable(text)) from error
    raise PolicyError(_undecodable(text))


def _undecodable(text: str) -> str:
    return f"The budget {shown(text)} cannot be read; accepted is for instance 'pooled_topk(density=0.1)' or 'dense'."


def budget_from_json(data: Mapping[str, Any]) -> Budget:
    """The budget of ``{"method": ..., parameter: value, ...}``, checked. Raises ``PolicyError``."""
    return make_method(Budget(data["method"], {key: data[key] for key in data if key != "method"})).budget()


def budget_to_json(budget: Budget) -> dict[str, Any]:
    """What ``budget_from_json`` reads, of JSON types only."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in budget.params.items()}
    return {"method": budget.method, **plain}
