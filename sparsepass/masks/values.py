"""Pointwise operations on mask elements: casts, arithmetic, comparisons, selection. Exact, or `NotExact`.

Integers are 64-bit here and their overflow is not modelled: indices, lengths and positions are taken to stay far below
2**31, which every tensor of more than one dimension of them does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import sympy  # type: ignore[import-untyped]
import torch

from sparsepass.masks.ir import Bool, Choice, Int, Logic, Pred, Value

Number = bool | int | float
Fold = Callable[[float, float], Number]


class NotExact(Exception):
    """The operation has no exact expression here; the text says why, as a fragment of a sentence."""


def constant(number: Number, dtype: torch.dtype, logic: Logic) -> Value:
    """The literal ``number`` in a tensor of ``dtype``."""
    if dtype is torch.bool:
        return Bool(logic.true if number else logic.false)
    if not dtype.is_floating_point:
        if dtype.is_complex:
            raise NotExact("is complex")
        return Int(sympy.Integer(int(number)))
    rounded = rounding(float(number), dtype)
    return Choice(logic.true, rounded, rounded)


def rounding(number: float, dtype: torch.dtype) -> float:
    """``number`` as ``dtype`` stores it."""
    return float(torch.tensor(number, dtype=dtype).item()) if dtype.is_floating_point else number


def truth(value: Value, logic: Logic) -> Pred:
    """``value != 0``, which is what a cast to bool and the logical operators take."""
    match value:
        case Bool(pred):
            return pred
        case Int(expr):
            return logic.negate(logic.eq_zero(expr))
        case Choice():
            return fold_test(value, 0.0, operator.ne, logic)
    raise NotExact("tests data for being nonzero")


def as_choice(value: Value, logic: Logic) -> Choice:
    """``value`` as a two-valued number, where it is one."""
    match value:
        case Choice():
            return value
        case Bool(pred):
            return Choice(pred, 1.0, 0.0)
        case Int(expr) if expr.is_Integer and abs(expr) < 2**53:
            return Choice(logic.true, float(expr), float(expr))
    raise NotExact("computes with numbers that vary with the indices or with data")


def fold_test(value: Choice, other: float, test: Fold, logic: Logic) -> Pred:
    yes, no = bool(test(value.yes, other)), bool(test(value.no, other))
    if yes == no:
        return logic.true if yes else logic.false
    return value.pred if yes else logic.negate(value.pred)


def cast(value: Value, source: torch.dtype, target: torch.dtype, logic: Logic) -> Value:
    """``value`` converted from ``source`` to ``target``."""
    if source is target:
        return value
    if target is torch.bool:
        return Bool(truth(value, logic))
    if target.is_complex:
        raise NotExact("is complex")
    if isinstance(value, Int) and not target.is_floating_point:
        narrow = target not in (torch.int64, torch.int32)
        loses = narrow or (target is torch.int32 and bool(logic.opaques_in(value.expr)))
        if loses and torch.iinfo(target).bits < torch.iinfo(source).bits and not value.expr.is_Integer:
            raise NotExact(f"narrows integers to {target}")
        if value.expr.is_Integer and not torch.iinfo(target).min <= value.expr <= torch.iinfo(target).max:
            raise NotExact(f"overflows {target}")
        if torch.iinfo(target).min == 0 and not value.expr.is_Integer:
            raise NotExact(f"turns integers into {target}")
        return value
    number = as_choice(value, logic)
    if target.is_floating_point:
        return Choice(number.pred, rounding(number.yes, target), rounding(number.no, target))
    if not {number.yes, number.no} <= {0.0, 1.0}:
        raise NotExact(f"casts to {target}")
    return number


def arithmetic(name: str, left: Value, right: Value, dtype: torch.dtype, logic: Logic) -> Value:
    """``left name right`` for ``add``, ``sub`` or ``mul``, stored as ``dtype``."""
    if dtype is torch.bool:
        if name == "mul":
            return Bool(logic.all_of(truth(left, logic), truth(right, logic)))
        if name == "add":
            return Bool(logic.any_of(truth(left, logic), truth(right, logic)))
    fold: Fold = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[name]
    if isinstance(left, Int) and isinstance(right, Int):
        if dtype is not torch.int64:
            raise NotExact(f"computes with indices in {dtype}")
        if name == "mul" and not any(_free_of_indices(side.expr, logic) for side in (left, right)):
            raise NotExact("multiplies two values that vary")
        return Int(sympy.expand(fold(left.expr, right.expr)))
    return _fold(fold, as_choice(left, logic), as_choice(right, logic), dtype, logic)


def _free_of_indices(expr: sympy.Expr, logic: Logic) -> bool:
    return not logic.depends(expr) and not logic.opaques_in(expr)


def _fold(fold: Fold, left: Choice, right: Choice, dtype: torch.dtype, logic: Logic) -> Choice:
    def at(a: float, b: float) -> float:
        number = float(fold(a, b))
        if not dtype.is_floating_point and not (
            dtype is not torch.bool
            and number.is_integer()
            and torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max
        ):
            raise NotExact(f"does not stay an integer in {dtype}")
        return rounding(number, dtype)

    if left.yes == left.no or left.pred is logic.true:
        return Choice(right.pred, at(left.yes, right.yes), at(left.yes, right.no))
    if right.yes == right.no or right.pred is logic.true or right.pred is left.pred:
        opposite = right.no if right.pred is left.pred else right.yes
        return Choice(left.pred, at(left.yes, right.yes), at(left.no, opposite))
    corner = at(left.no, right.no)  # two different conditions: still two-valued when one corner stands out
    if at(left.yes, right.no) == corner == at(left.no, right.yes):
        return Choice(logic.all_of(left.pred, right.pred), at(left.yes, right.yes), corner)
    raise NotExact("takes more than two values")


COMPARISONS: dict[str, Fold] = {
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
}


def compare(name: str, left: Value, right: Value, logic: Logic) -> Pred:
    """``left name right``."""
    if isinstance(left, Int) and isinstance(right, Int):
        gap = left.expr - right.expr
        match name:
            case "le":
                return logic.le_zero(gap)
            case "lt":
                return logic.le_zero(gap + 1)
            case "ge":
                return logic.le_zero(-gap)
            case "gt":
                return logic.le_zero(1 - gap)
            case "eq":
                return logic.eq_zero(gap)
        return logic.negate(logic.eq_zero(gap))
    a, b = as_choice(left, logic), as_choice(right, logic)
    test = COMPARISONS[name]
    if b.yes == b.no or b.pred is logic.true:
        return fold_test(a, b.yes, test, logic)
    if a.yes == a.no or a.pred is logic.true:
        return fold_test(b, a.yes, lambda x, y: test(y, x), logic)
    raise NotExact("compares two conditions with each other")


def select(condition: Pred, yes: Value, no: Value, dtype: torch.dtype, logic: Logic) -> Value:
    """``where(condition, yes, no)``, stored as ``dtype``."""
    if condition is logic.true:
        return yes
    if condition is logic.false:
        return no
    if dtype is torch.bool:
        otherwise = logic.negate(condition)
        first = logic.any_of(otherwise, truth(yes, logic))
        second = logic.any_of(condition, truth(no, logic))
        if isinstance(no, Bool) and no.pred is logic.false:
            return Bool(logic.all_of(condition, truth(yes, logic)))
        if isinstance(yes, Bool) and yes.pred is logic.false:
            return Bool(logic.all_of(otherwise, truth(no, logic)))
        return Bool(logic.all_of(first, second))
    if isinstance(yes, Int) and yes == no:
        return yes
    a, b = as_choice(yes, logic), as_choice(no, logic)
    if not dtype.is_floating_point and not {a.yes, a.no, b.yes, b.no} <= {0.0, 1.0}:
        raise NotExact("selects between integers")
    if a.yes == a.no or a.pred is logic.true:
        return _select_constant(condition, a.yes, b, dtype, logic)
    if _flat(b, logic):
        return _select_constant(logic.negate(condition), b.yes, a, dtype, logic)
    raise NotExact("takes more than two values")


def _flat(value: Choice, logic: Logic) -> bool:
    return value.yes == value.no or value.pred is logic.true


def _select_constant(condition: Pred, number: float, other: Choice, dtype: torch.dtype, logic: Logic) -> Value:
    """``where(condition, number, other)``."""
    number = rounding(number, dtype)
    yes, no = rounding(other.yes, dtype), rounding(other.no, dtype)
    if _flat(other, logic):
        return Choice(condition, number, yes)
    otherwise = logic.negate(condition)
    if number == no:
        return Choice(logic.all_of(otherwise, other.pred), yes, no)
    if number == yes:
        return Choice(logic.any_of(condition, other.pred), yes, no)
    raise NotExact("takes more than two values")
