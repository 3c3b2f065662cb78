"""Operands as SDPA takes them, as the kernels do: four dimensions, one batch, as many heads of keys as of values.

SDPA broadcasts: operands may have different numbers of dimensions, and a batch or heads of one against several. What is
missing is expanded, which copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsepass.graph.canonical import Operand
from sparsepass.graph.made import Maker
from sparsepass.graph.sizes import same_size, shape


class NotBroadcast(Exception):
    """Sizes that are not known to go together; the text is for the user."""


@dataclass(frozen=True)
class Lifted:
    """Query, key, value and mask of four dimensions, and the calls that give an output its own shape again."""

    query: Operand
    key: Operand
    value: Operand
    mask: Operand
    restore: tuple[tuple[Any, ...], ...] = ()


def lifted(maker: Maker, operands: tuple[Operand, Operand, Operand], mask: Operand, grouped: bool) -> Lifted:
    """``grouped``: heads of keys and values may be fewer than those of queries. Raises ``NotBroadcast``."""
    rank = max(len(shape(operand)) for operand in operands)
    if min(len(shape(operand)) for operand in operands) < 2:
        raise NotBroadcast("query, key and value need two dimensions or more")
    same_rank = [_led(maker, operand, rank) for operand in operands]
    restore: tuple[tuple[Any, ...], ...] = ()
    if rank == 2 or (rank == 3 and grouped):  # [S, D], or [H, S, D]
        same_rank = [_led(maker, operand, 4) for operand in same_rank]
        restore = (("squeeze", 0),) * (4 - rank)
    elif rank == 3:  # [B, S, D] of one head
        same_rank = [maker.call("unsqueeze", operand, 1) for operand in same_rank]
        restore = (("squeeze", 1),)
        if mask is not None and len(shape(mask)) == 3:
            mask = maker.call("unsqueeze", mask, 1)
    elif rank > 4:
        return _folded(maker, same_rank, mask, grouped)
    query, key, value = _together(maker, same_rank, grouped)
    return Lifted(query, key, value, mask, restore)


def _led(maker: Maker, operand: Operand, rank: int) -> Operand:
    """With dimensions of 1 in front."""
    return maker.steps(operand, (("unsqueeze", 0),) * (rank - len(shape(operand))))


def _folded(maker: Maker, operands: list[Operand], mask: Operand, grouped: bool) -> Lifted:
    """More than four dimensions: all in front of the heads are the batch."""
    rank = len(shape(operands[0]))
    lead = rank - 3
    sizes = [_widest(maker, operands, axis) for axis in range(lead)]
    query, key, value = (maker.call("flatten", _expanded(maker, one, sizes), 0, lead - 1) for one in operands)
    query, key, value = _together(maker, [query, key, value], grouped)
    if mask is not None and len(shape(mask)) > 3:
        mask = _led(maker, mask, rank)
        if not all(same_size(size, 1) for size in shape(mask)[:lead]):
            mask = _expanded(maker, mask, sizes)
        mask = maker.call("flatten", mask, 0, lead - 1)
    return Lifted(query, key, value, mask, (("unflatten", 0, tuple(sizes)),))


def _together(maker: Maker, operands: list[Operand], grouped: bool) -> list[Operand]:
    """[B, H, ..] each, with the batch of the widest; heads of keys and values alike, 1 where they serve all queries."""
    batch = _widest(maker, operands, 0)
    query, key, value = (_expanded(maker, one, [batch]) for one in operands)
    if not grouped:
        query = _expanded(maker, query, [-1, _widest(maker, [query, key, value], 1)])
    if not all(same_size(shape(one)[1], 1) for one in (key, value)):
        heads = _widest(maker, [key, value], 1)
        key, value = (_expanded(maker, one, [-1, heads]) for one in (key, value))
    if not grouped and not any(same_size(shape(key)[1], size) for size in (1, shape(query)[1])):
        raise NotBroadcast(f"{shape(key)[1]} heads of keys against {shape(query)[1]} of queries")
    return [query, key, value]


def _widest(maker: Maker, operands: list[Operand], axis: int) -> Any:
    """The size that all broadcast to in one dimension: a number, or what yields it."""
    wide = [(one, shape(one)[axis]) for one in operands if not same_size(shape(one)[axis], 1)]
    if not wide:
        return 1
    holder, size = wide[0]
    for _, other in wide[1:]:
        if not same_size(size, other):
            raise NotBroadcast(f"sizes of {size} and {other} in one dimension are not known to be equal")
    return size if isinstance(size, int) else maker.call("size", holder, axis)


def _expanded(maker: Maker, operand: Operand, sizes: list[Any]) -> Operand:
    """The first dimensions expanded to ``sizes``, -1 for one that stays."""
    own = shape(operand)
    if all(given == -1 or not same_size(have, 1) or given == 1 for have, given in zip(own, sizes, strict=False)):
        return operand
    wanted = [given if same_size(have, 1) else -1 for have, given in zip(own, sizes, strict=False)]
    return maker.call("expand", operand, *wanted, *(-1,) * (len(own) - len(sizes)))
