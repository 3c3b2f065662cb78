"""Selection methods: what a budget's method name means, which parameters it has, and its text form.

One method is one frozen dataclass below, listed in ``METHODS``: its fields are its parameters, checked on creation.
``docs/policy.md`` has the recipe for adding one.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from sparsepass.errors import PolicyError, close_names
from sparsepass.types import Budget

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.dispatch import BlockLists, Visible

BLOCKS = (64, 128)
"""Block sizes, in tokens, that block lists may have."""


class Method:
    """Base of every selection method. Subclasses are frozen dataclasses; override what the defaults get wrong."""

    name: ClassVar[str]

    @property
    def max_density(self) -> float:
        """The largest share of the visible area any head computes: decides buffer sizes."""
        raise NotImplementedError

    @property
    def mean_density(self) -> float:
        """The share of the visible area computed over all heads: what the time follows."""
        return self.max_density

    def for_head(self, head: int) -> Method:
        """This method as query head ``head`` sees it."""
        return self

    def uniform(self) -> Method:
        """This method with every head given what the costliest head has."""
        return self

    def prepare(self, device: torch.device) -> None:
        """Put on the device what ``select`` needs there. Called at compile time: a CUDA graph may not copy."""

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scale: float,
        visible: Visible,
        counter: torch.Tensor | None,
    ) -> BlockLists:
        """Block lists for query [B, H, Sq, D] and key [B, Hkv, Skv, D]: the method itself. No host synchronization."""
        raise NotImplementedError(f"{self.name} selects no blocks")

    @classmethod
    def merge_heads(cls, heads: Sequence[Method]) -> Method:
        """One method for a whole site from one per query head. Raises ``PolicyError`` if this one cannot differ."""
        if len(set(heads)) == 1:
            return heads[0]
        raise _cannot_differ(cls, heads)


@dataclass(frozen=True, slots=True)
class Dense(Method):
    """Everything visible, by the dense kernel."""

    name: ClassVar[str] = "dense"

    @property
    def max_density(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True)
class PooledTopK(Method):
    """Pooled block top-k ("block-sparse" in The Sparse Frontier, arXiv 2504.17768).

    ``density``: share of the visible blocks kept, in (0, 1]. At 1 every block runs through the sparse kernel.
    ``block``: tokens per block, 64 or 128; ``None``: the device's default.
    ``head_densities``: one density per query head; ``density`` is then their maximum. Raises ``PolicyError``.
    """

    name: ClassVar[str] = "pooled_topk"
    density: float
    block: int | None = None
    head_densities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", _density("density", self.density))
        if self.block is not None and (isinstance(self.block, bool) or self.block not in BLOCKS):
            raise PolicyError(f"pooled_topk block is {self.block!r}; accepted are 64, 128 or null (the default).")
        if self.head_densities is not None:
            given = self.head_densities
            if not isinstance(given, Sequence) or isinstance(given, str) or not given:
                raise PolicyError(f"pooled_topk head_densities is {given!r}; accepted is a list, one number per head.")
            heads = tuple(_density(f"head_densities[{head}]", value) for head, value in enumerate(given))
            if max(heads) != self.density:
                raise PolicyError(
                    f"pooled_topk density is {self.density!r} but the largest of head_densities is {max(heads)!r}; "
                    "give density that value."
                )
            object.__setattr__(self, "head_densities", heads)

    @property
    def max_density(self) -> float:
        return self.density

    @property
    def mean_density(self) -> float:
        return self.density if self.head_densities is None else sum(self.head_densities) / len(self.head_densities)

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        scale: float,
        visible: Visible,
        counter: torch.Tensor | None,
    ) -> BlockLists:
        from sparsepass.kernels.dispatch import select_pooled_topk

        density: float | torch.Tensor = self.density
        if self.head_densities is not None:
            density = head_densities(self.head_densities, query.device)
        return select_pooled_topk(
            query,
            key,
            scale=scale,
            visible=visible,
            density=density,
            max_density=self.density,
            block=self.block,
            counter=counter,
        )

    def prepare(self, device: torch.device) -> None:
        if self.head_densities is not None:
            head_densities(self.head_densities, device)

    def for_head(self, head: int) -> PooledTopK:
        if self.head_densities is None:
            return self
        if not 0 <= head < len(self.head_densities):
            raise PolicyError(
                f"A budget with head_densities for {len(self.head_densities)} heads is used for head {head} (from 0); "
                "give one density per query head of the model."
            )
        return PooledTopK(self.head_densities[head], self.block)

    def uniform(self) -> PooledTopK:
        return PooledTopK(self.density, self.block)

    @classmethod
    def merge_heads(cls, heads: Sequence[Method]) -> Method:
        """Dense heads become density 1 where others are sparse: one launch serves the whole site."""
        if len(set(heads)) == 1:
            return heads[0]
        blocks = {head.block for head in heads if isinstance(head, PooledTopK)}
        if len(blocks) != 1 or not all(isinstance(head, PooledTopK | Dense) for head in heads):
            raise _cannot_differ(cls, heads)
        densities = tuple(head.max_density for head in heads)
        return cls(max(densities), blocks.pop(), densities)


@functools.lru_cache(maxsize=256)
def head_densities(densities: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Densities of a site's heads on its device, float32 [1, H]. Kept for good: compiled graphs refer to it."""
    import torch

    return torch.tensor([densities], dtype=torch.float32, device=device)


METHODS: tuple[type[Method], ...] = (Dense, PooledTopK)
"""Every method. Order is that of the documentation."""

_BY_NAME = {method.name: method for method in METHODS}


def _density(what: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not 0 < value <= 1:
        raise PolicyError(f"pooled_topk {what} is {value!r}; accepted is a number above 0 and at most 1.")
    return float(value)


def _cannot_differ(method: type[Method], heads: Sequence[Method]) -> PolicyError:
    given = ", ".join(sorted({encode_budget(to_budget(head)) for head in heads}))
    return PolicyError(f"The heads of one layer have budgets that {method.name} cannot run together: {given}.")


def method_names() -> tuple[str, ...]:
    """Names that a budget's ``method`` may have."""
    return tuple(_BY_NAME)


def make_method(budget: Budget) -> Method:
    """The method that a budget names, its parameters checked. Raises ``PolicyError`` saying what is accepted."""
    method = _BY_NAME.get(budget.method)
    if method is None:
        raise PolicyError(f"Unknown method {budget.method!r}. {close_names(str(budget.method), _BY_NAME)}")
    known = {spec.name: spec for spec in _fields(method)}
    for param in budget.params:
        if param not in known:
            accepted = close_names(str(param), known) if known else "It takes no parameters."
            raise PolicyError(f"Unknown parameter {param!r} of method {method.name!r}. {accepted}")
    missing = [name for name, spec in known.items() if spec.default is MISSING and name not in budget.params]
    if missing:
        raise PolicyError(f"Method {method.name!r} needs {', '.join(map(repr, missing))}; given: {budget}.")
    return method(**budget.params)


def to_budget(method: Method) -> Budget:
    """The budget of a method, in its one canonical form: parameters at their default are left out."""
    params = {
        spec.name: value
        for spec in _fields(type(method))
        if (value := getattr(method, spec.name)) != spec.default or spec.default is MISSING
    }
    return Budget(method.name, params)


def merge_heads(heads: Sequence[Budget]) -> Budget:
    """One budget for a site from one per query head. Raises ``PolicyError`` where the method cannot differ by head."""
    if not heads:
        raise PolicyError("A site has at least one head, and budgets for none were given.")
    methods = [make_method(budget) for budget in heads]
    sparse = [method for method in methods if not isinstance(method, Dense)]
    return to_budget(type(sparse[0] if sparse else methods[0]).merge_heads(methods))


@functools.lru_cache(maxsize=4096)
def encode_budget(budget: Budget) -> str:
    """A budget as one line, for instance ``pooled_topk(density=0.1)``: how graph ops and plan keys carry it.

    Canonical: equal text means an equal budget, also across processes. Raises ``PolicyError`` as ``make_method``.
    """
    canonical = to_budget(make_method(budget))
    inner = ", ".join(f"{name}={value!r}" for name, value in canonical.params.items())
    return f"{canonical.method}({inner})" if inner else canonical.method


@functools.lru_cache(maxsize=4096)
def decode_budget(text: str) -> Budget:
    """The budget of a line written by ``encode_budget``. Raises ``PolicyError``."""
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Name):
            return to_budget(make_method(Budget(node.id)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            params = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            return to_budget(make_method(Budget(node.func.id, params)))
    except PolicyError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PolicyError(_undecodable(text)) from error
    raise PolicyError(_undecodable(text))


def _undecodable(text: str) -> str:
    return f"The budget {text!r} cannot be read; accepted is for instance 'pooled_topk(density=0.1)' or 'dense'."


def budget_from_json(data: Mapping[str, Any]) -> Budget:
    """The budget of ``{"method": ..., parameter: value, ...}``, checked. Raises ``PolicyError``."""
    return to_budget(make_method(Budget(data["method"], {key: data[key] for key in data if key != "method"})))


def budget_to_json(budget: Budget) -> dict[str, Any]:
    """What ``budget_from_json`` reads, of JSON types only."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in budget.params.items()}
    return {"method": budget.method, **plain}


def _fields(method: type[Method]) -> tuple[Field[Any], ...]:
    return fields(method)  # type: ignore[arg-type]  # every registered method is a dataclass
