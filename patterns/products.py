"""Products of two tensors over one dimension, however they are written: matmul, bmm, baddbmm, einsum."""

from __future__ import annotations

import string
from dataclasses import dataclass

from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Operand, is_scalar
from sparsepass.graph.sizes import same_size, shape
from sparsepass.patterns.axes import Atom, Axes, Dims

PRODUCTS = ("matmul", "baddbmm", "einsum")


@dataclass(frozen=True)
class Product:
    """``left`` times ``right`` summed over ``summed``, times ``alpha``, plus ``beta`` times ``added``."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_dims: Dims
    right_dims: Dims
    out: Dims
    summed: Atom
    alpha: Operand = 1.0
    """A number, or what yields one."""
    added: Operand = None
    beta: float = 1.0


def is_product(view: CanonicalGraph, node: Operand) -> bool:
    """Whether ``node`` multiplies two activations: with fewer than three dimensions one is a weight."""
    if not isinstance(node, fx.Node) or view.ops[node].name not in PRODUCTS:
        return False
    pair = view.ops[node].operands[-2:]
    return len(pair) == 2 and all(isinstance(one, fx.Node) and len(shape(one)) >= 3 for one in pair)


def product_of(view: CanonicalGraph, node: fx.Node, axes: Axes) -> Product | None:
    """The product that ``node`` is, its dimensions as new atoms of ``axes``; None where it is none of one sum."""
    if not is_product(view, node):
        return None
    op = view.ops[node]
    left, right = op.operands[-2:]
    params = dict(op.params)
    if op.name == "einsum":
        return _einsum(axes, node, left, right, params["equation"])
    found = _matmul(axes, node, left, right)
    if op.name == "baddbmm" and found is not None:
        alpha, beta = params["alpha"], params["beta"]
        if not is_scalar(alpha) or not isinstance(beta, int | float):
            return None
        return Product(
            node, left, right, found.left_dims, found.right_dims, found.out, found.summed,
            float(alpha) if isinstance(alpha, int) else alpha, op.operands[0] if beta != 0 else None, float(beta),
        )  # fmt: skip
    return found


def _matmul(axes: Axes, node: fx.Node, left: fx.Node, right: fx.Node) -> Product | None:
    whole = shape(node)
    batch = tuple((axes.new(size),) for size in whole[:-2])
    row, column, summed = axes.new(whole[-2]), axes.new(whole[-1]), axes.new(shape(left)[-1])

    def lead(operand: fx.Node) -> Dims:
        sizes = shape(operand)[:-2]
        mine = batch[len(batch) - len(sizes) :]
        return tuple(dim if same_size(size, axes.size(dim)) else () for size, dim in zip(sizes, mine, strict=True))

    return Product(
        node,
        left,
        right,
        (*lead(left), (row,), (summed,)),
        (*lead(right), (summed,), (column,)),
        (*batch, (row,), (column,)),
        summed,
    )


def _einsum(axes: Axes, node: fx.Node, left: fx.Node, right: fx.Node, equation: str) -> Product | None:
    if "->" not in equation:
        return None
    given, out = equation.split("->")
    terms = given.split(",")
    if len(terms) != 2:
        return None
    texts = [_spelled(text, len(shape(one))) for text, one in ((terms[0], left), (terms[1], right), (out, node))]
    if any(len(set(text)) != len(text) for text in texts):
        return None
    first, second, result = texts
    summed = [letter for letter in first if letter in second and letter not in result]
    if len(summed) != 1 or any(letter not in first + second for letter in result):
        return None
    if any(letter not in result + summed[0] for letter in first + second):
        return None
    atoms: dict[str, Atom] = {}
    for text, one in ((result, node), (first, left), (second, right)):
        for letter, size in zip(text, shape(one), strict=True):
            if letter not in atoms:
                atoms[letter] = axes.new(size)

    def dims(text: str, one: fx.Node) -> Dims:
        pairs = zip(text, shape(one), strict=True)
        return tuple((atoms[letter],) if same_size(size, axes.sizes[atoms[letter]]) else () for letter, size in pairs)

    return Product(node, left, right, dims(first, left), dims(second, right), dims(result, node), atoms[summed[0]])


def _spelled(text: str, rank: int) -> str:
    """``...`` written out in capital letters of which there is one per dimension, the last ones for the last."""
    if "..." not in text:
        return text
    missing = rank - len(text.replace("...", ""))
    return text.replace("...", string.ascii_uppercase[26 - missing :] if missing else "")
