"""What every selection method has: its name, its parameters as a budget and as text, and how it selects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from sparsepass.errors import PolicyError, shown
from sparsepass.types import Budget

if TYPE_CHECKING:
    import torch

    from sparsepass.kernels.types import BlockLists, Visible

BLOCKS = (64, 128)
"""Block sizes, in tokens, that block lists may have."""


class Method:
    """Base of every selection method. Subclasses are frozen dataclasses; override what the defaults get wrong."""

    name: ClassVar[str]
    dial: ClassVar[str | None] = None
    """The one parameter that says how much is computed; ``None``: the method has none (dense)."""
    dial_at_all: ClassVar[float] = 1.0
    """The dial at which every visible block is computed. Its side of the others says which of two dials costs more."""

    @property
    def max_density(self) -> float:
        """The largest share of the visible area any head computes: decides buffer sizes."""
        raise NotImplementedError

    @property
    def mean_density(self) -> float:
        """The share of the visible area computed over all heads: what the time follows."""
        return self.max_density

    def density_at(self, length: int) -> float:
        """``mean_density`` of a causal problem of ``length`` tokens; other where the share follows the length."""
        return self.mean_density

    def cost_at(self, length: int) -> float:
        """The time as a density: that of ``pooled_topk`` which takes as long, causal, ``length`` tokens.

        Where sparse pays was measured with ``pooled_topk``, so this is what is held against it.
        """
        return self.density_at(length)

    def dials(self, heads: int) -> tuple[float, ...]:
        """The dial of each of ``heads`` query heads. Raises ``PolicyError`` if the method has none."""
        if self.dial is None:
            raise PolicyError(f"{self.name} has no dial: it computes everything.")
        return tuple(float(getattr(self.for_head(head), self.dial)) for head in range(heads))

    @classmethod
    def cap(cls, methods: Sequence[Method]) -> Method:
        """One method of this type that computes at least as much as each of ``methods``: its dial is the costliest.

        Buffers are sized for it, and ``select`` may then be given each request's own dial. ``Dense`` may be among the
        methods: the dial becomes ``dial_at_all``. Raises ``PolicyError`` where other parameters or types differ.
        """
        own = [method.uniform() for method in methods if isinstance(method, cls)]
        if cls.dial is None or not own or not all(isinstance(method, cls) or method.computes_all for method in methods):
            raise cannot_share(cls, methods)
        dials = [getattr(method, cls.dial) for method in own]
        if len(own) < len(methods):
            dials.append(cls.dial_at_all)
        costliest = max(dials) if cls.dial_at_all >= max(dials) else min(dials)
        caps = {replace(method, **{cls.dial: costliest}) for method in own}  # type: ignore[type-var]
        if len(caps) != 1:
            raise cannot_share(cls, methods)
        return caps.pop()

    @property
    def computes_all(self) -> bool:
        """Whether every visible block is computed, whatever the input: the result is exact."""
        return False

    def for_head(self, head: int) -> Method:
        """This method as query head ``head`` sees it."""
        return self

    def uniform(self) -> Method:
        """This method with every head given what the costliest head has."""
        return self

    def list_block(self, device: torch.device) -> int:
        """Tokens per block, of queries and keys alike, of the lists that ``select`` makes on this device."""
        from sparsepass.kernels.support import default_block

        own: int | None = getattr(self, "block", None)
        return default_block(device) if own is None else own

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
        dial: torch.Tensor | None = None,
    ) -> BlockLists:
        """Block lists for query [B, H, Sq, D] and key [B, Hkv, Skv, D]: the method itself. No host synchronization.

        ``dial``: float32 [B or 1, H or 1] on the device, each batch item's and head's own dial. The method's is then
        the cap: it sizes buffers, and a dial that costs more is cut to it. ``visible.blocks``, if given, is a map of
        blocks of ``list_block`` tokens: only what it has is listed, ranked and counted as visible.
        ``counter``: int64 [3]; the number of visible blocks is added to its last entry.
        """
        raise NotImplementedError(f"{self.name} selects no blocks")

    def budget(self) -> Budget:
        """This method as a budget, in its one canonical form: parameters at their default are left out."""
        params = {
            spec.name: value
            for spec in parameters(type(self))
            if (value := getattr(self, spec.name)) != spec.default or spec.default is MISSING
        }
        return Budget(self.name, params)

    def text(self) -> str:
        """This method as one line, for instance ``pooled_topk(density=0.1)``; equal text means an equal method."""
        budget = self.budget()
        inner = ", ".join(f"{name}={value!r}" for name, value in budget.params.items())
        return f"{budget.method}({inner})" if inner else budget.method

    @classmethod
    def merge_heads(cls, heads: Sequence[Method]) -> Method:
        """One method for a whole site from one per query head. Raises ``PolicyError`` if this one cannot differ."""
        if len(set(heads)) == 1:
            return heads[0]
        raise cannot_differ(cls, heads)


def parameters(method: type[Method]) -> tuple[Field[Any], ...]:
    """A method's parameters: the fields of its dataclass."""
    return fields(method)  # type: ignore[arg-type]  # every registered method is a dataclass


def share(method: str, parameter: str, value: Any) -> float:
    """``value`` as a float in (0, 1]. Raises ``PolicyError`` that names the method and the parameter."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:
        raise PolicyError(f"{method} {parameter} is {shown(value)}; accepted is a number above 0 and at most 1.")
    return float(value)


def whole(method: str, parameter: str, value: Any, least: int) -> int:
    """``value`` as an integer of at least ``least``. Raises ``PolicyError`` that names the method and the parameter."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= 1 << 30 or value != value // 1:
        raise PolicyError(f"{method} {parameter} is {shown(value)}; accepted is a whole number of at least {least}.")
    return int(value)


def last_blocks(method: str, value: Any) -> int:
    """``value`` as a number of query blocks at the end. Raises ``PolicyError``."""
    return whole(method, "last", value, 0)


def area_of_last(last: int, length: int, block: int | None) -> float:
    """Share of a causal problem of ``length`` tokens that its ``last`` query blocks (None: of 128 tokens) see."""
    rows = max(1, -(-length // (block or 128)))
    last = min(last, rows)
    return last * (2 * rows - last + 1) / (rows * (rows + 1))


def block_size(method: str, value: Any) -> int | None:
    """``value`` if lists may have blocks of that many tokens. Raises ``PolicyError``."""
    if value is not None and (isinstance(value, bool) or value not in BLOCKS):
        raise PolicyError(f"{method} block is {shown(value)}; accepted are 64, 128 or null (the default).")
    return None if value is None else int(value)


def expected(method: str, value: Any) -> float | None:
    """``value`` as an expected density, or None. Raises ``PolicyError``."""
    return None if value is None else share(method, "expected_density", value)


def similarity(method: str, value: Any) -> float | None:
    """``value`` as a mean cosine, or None. Raises ``PolicyError``."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -1 <= value <= 1:
        raise PolicyError(
            f"{method} self_similarity is {shown(value)}; accepted is a cosine from -1 to 1, or null (none)."
        )
    return float(value)


def cannot_share(method: type[Method], methods: Sequence[Method]) -> PolicyError:
    """The error for requests of one batch whose methods differ in more than their dial."""
    given = ", ".join(sorted({one.text() for one in methods})) or "none"
    return PolicyError(
        f"The requests of one batch must share a method that differs in nothing but its dial, here {method.name} "
        f"({method.dial}); given: {given}."
    )


def cannot_differ(method: type[Method], heads: Sequence[Method]) -> PolicyError:
    """The error for a layer whose heads have methods that cannot run together."""
    given = ", ".join(sorted({head.text() for head in heads}))
    return PolicyError(f"The heads of one layer have budgets that {method.name} cannot run together: {given}.")
