"""How the `MaskReader` reads tensor factories, views, indexing and the few scans that masks are built with."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from sparsepass.graph.canonical import called_name
from sparsepass.masks.ir import Bool, Choice, Int, Value
from sparsepass.masks.reader import ZERO, Handler, Index, MaskReader, argument, handles, scalar, tensor_of
from sparsepass.masks.values import NotExact, constant, select

# Factories


@handles("arange")
def _arange(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    if reader.tensor(node).dtype not in (torch.int64, torch.int32):
        raise NotExact("counts in other than integers of 32 or 64 bits")
    bounds = list(node.args) + [node.kwargs[name] for name in ("start", "end", "step") if name in node.kwargs]
    start, step = (ZERO if len(bounds) < 2 else scalar(bounds[0])), (scalar(bounds[2]) if len(bounds) > 2 else ZERO + 1)
    if start is None or step is None or scalar(bounds[-1 if len(bounds) < 3 else 1]) is None:
        raise NotExact("counts from or by something that is not an integer")
    return Int(sympy.expand(start + step * index[0]))


def _filled(number: float) -> Handler:
    def handler(reader: MaskReader, node: fx.Node, index: Index) -> Value:
        return constant(number, reader.tensor(node).dtype, reader.logic)

    return handler


handles("ones", "ones_like", "new_ones")(_filled(1))
handles("zeros", "zeros_like", "new_zeros")(_filled(0))


def _filled_with(position: int, name: str) -> Handler:
    def handler(reader: MaskReader, node: fx.Node, index: Index) -> Value:
        fill, dtype = argument(node, position, name), reader.tensor(node).dtype
        number = scalar(fill)
        if number is not None and not number.is_Integer and not dtype.is_floating_point and dtype is not torch.bool:
            return Int(number)
        if number is not None and number.is_Integer:
            fill = int(number)
        if not isinstance(fill, (bool, int, float)):
            raise NotExact("is filled with a value that is not known")
        return constant(fill, dtype, reader.logic)

    return handler


handles("full", "full_like", "new_full")(_filled_with(1, "fill_value"))
handles("tensor", "scalar_tensor", "as_tensor")(_filled_with(0, "data"))


# Views


@handles("expand", "broadcast_to", "expand_as")
def _expand(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    return reader.broadcast(argument(node, 0, "input"), index, reader.sizes(node))


@handles("repeat")
def _repeat(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    return reader.broadcast(argument(node, 0, "input"), index, reader.sizes(node))  # only of dimensions of size 1


@handles("unsqueeze", "squeeze", "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten")
def _reshape(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    source = argument(node, 0, "input")
    if any(isinstance(part, torch.dtype) for part in (*node.args, *node.kwargs.values())):
        raise NotExact("reinterprets the bits")
    before, after = reader.sizes(source), reader.sizes(node)
    kept = [(size, at) for size, at in zip(after, index, strict=True) if size != 1]
    wide = [size for size in before if size != 1]
    if len(kept) != len(wide) or not all(reader.prover.equal(a, b) for (a, _), b in zip(kept, wide, strict=True)):
        raise NotExact("merges or splits dimensions")
    positions = iter(at for _, at in kept)
    return reader.read(source, tuple(ZERO if size == 1 else next(positions) for size in before))


def _permuted(reader: MaskReader, node: fx.Node, index: Index, order: list[int]) -> Value:
    """Result dimension i is dimension ``order[i]`` of the source."""
    at: list[sympy.Expr] = [ZERO] * len(order)
    for position, dim in zip(index, order, strict=True):
        at[dim] = position
    return reader.read(argument(node, 0, "input"), tuple(at))


@handles("transpose", "swapaxes", "swapdims")
def _transpose(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    order = list(range(len(index)))
    first = reader.dimension(argument(node, 1, "dim0"), len(order))
    second = reader.dimension(argument(node, 2, "dim1"), len(order))
    order[first], order[second] = order[second], order[first]
    return _permuted(reader, node, index, order)


@handles("mT", "mH", "adjoint", "T", "H", "t", "numpy_T", "matrix_H")
def _matrix_transpose(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    order = list(range(len(index)))
    if len(order) < 2 or (len(order) > 2 and called_name(node) not in ("mT", "mH", "adjoint")):
        raise NotExact("turns other than two dimensions around")
    order[-1], order[-2] = order[-2], order[-1]
    return _permuted(reader, node, index, order)


@handles("permute")
def _permute(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    dims: Any = node.args[1:] or (node.kwargs.get("dims"),)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    return _permuted(reader, node, index, [reader.dimension(dim, len(index)) for dim in dims])


# Indexing


@handles("getitem", "__getitem__")
def _getitem(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    return _indexed(reader, node, index, node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],))


@handles("slice")
def _slice(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    start, end, step = (argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step")))
    return _along(reader, node, index, slice(start, end, step))


@handles("select")
def _select(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    return _along(reader, node, index, argument(node, 2, "index"))


def _along(reader: MaskReader, node: fx.Node, index: Index, item: Any) -> Value:
    dim = reader.dimension(argument(node, 1, "dim", 0), len(reader.sizes(node.args[0])))
    return _indexed(reader, node, index, (*[slice(None)] * dim, item))


@handles("index")
def _index(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    """ATen's indexing with tensors, None for a whole dimension."""
    items: Any = node.args[1]
    return _indexed(reader, node, index, tuple(slice(None) if item is None else item for item in items))


def _indexed(reader: MaskReader, node: fx.Node, index: Index, items: tuple[Any, ...]) -> Value:
    source = node.args[0]
    before, after = reader.sizes(source), reader.sizes(node)
    items = _without_ellipsis(items, len(before))
    tensors = [item for item in items if tensor_of(item) is not None]
    if tensors and any(scalar(item) is not None for item in items):
        raise NotExact("mixes integers and tensors as indices")
    return reader.read(source, _source_index(reader, items, tensors, before, after, index))  # type: ignore[arg-type]


def _without_ellipsis(items: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    """``items`` with as many full slices as the ellipsis, or the missing end, stands for."""
    taken = sum(1 for item in items if item is not None and item is not Ellipsis)
    filler = (slice(None),) * (rank - taken)
    dots = [position for position, item in enumerate(items) if item is Ellipsis]
    if len(dots) > 1:
        raise NotExact("has two ellipses")
    if not dots:
        return (*items, *filler)
    return (*items[: dots[0]], *filler, *items[dots[0] + 1 :])


def _source_index(
    reader: MaskReader, items: tuple[Any, ...], tensors: list[Any], before: Index, after: Index, index: Index
) -> Index:
    shared = max((len(reader.sizes(item)) for item in tensors), default=0)
    places = [position for position, item in enumerate(items) if tensor_of(item) is not None]
    adjacent = not places or places[-1] - places[0] + 1 == len(places)
    cursor, advanced = 0, None
    if tensors and not adjacent:
        advanced, cursor = 0, shared  # their dimensions come first
    at: list[sympy.Expr] = []
    for item in items:
        if item is None:
            cursor += 1
        elif tensor_of(item) is not None:
            if advanced is None:
                advanced, cursor = cursor, cursor + shared
            block = slice(advanced, advanced + shared)
            at.append(_element(reader, item, index[block], after[block], before[len(at)]))
        elif isinstance(item, slice):
            at.append(_sliced(reader, item, before[len(at)], after[cursor], index[cursor]))
            cursor += 1
        elif (number := scalar(item)) is not None:
            at.append(_from_end(reader, number, before[len(at)]))
        else:
            raise NotExact("is indexed with something unexpected")
    if cursor != len(index) or len(at) != len(before):
        raise NotExact("has indices that do not account for its shape")
    return tuple(at)


def _element(reader: MaskReader, item: fx.Node, index: Index, sizes: Index, size: sympy.Expr) -> sympy.Expr:
    """What one index tensor says at ``index`` of the broadcast index tensors."""
    if reader.tensor(item).dtype is torch.bool:
        raise NotExact("is indexed with a boolean tensor, which is data")
    value = reader.broadcast(item, index, sizes)
    if not isinstance(value, Int) or reader.logic.opaques_in(value.expr):
        raise NotExact("is indexed with data")
    return _from_end(reader, value.expr, size)


def _from_end(reader: MaskReader, position: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """``position`` counted from the start, where a negative one counts from the end."""
    if reader.never_positive(-position):
        return position
    if reader.never_positive(position + 1):
        return sympy.expand(position + size)
    raise NotExact("is indexed with numbers that may be negative")


def _sliced(reader: MaskReader, item: slice, size: sympy.Expr, kept: sympy.Expr, at: sympy.Expr) -> sympy.Expr:
    """Position in a dimension of ``size`` of the element ``at`` of the slice, which has ``kept`` elements."""
    step = sympy.Integer(1) if item.step is None else scalar(item.step)
    if step is None or not step.is_Integer or step < 1:
        raise NotExact("has a slice whose step is not a literal")
    if step == 1 and reader.prover.equal(size, kept):
        return at
    start = ZERO if item.start is None else scalar(item.start)
    if start is None:
        raise NotExact("has a slice that starts at data")
    if not reader.never_positive(-start):
        if not (reader.never_positive(start + 1) and reader.never_positive(-(start + size))):
            raise NotExact("has a slice whose start is not known to be inside")
        start = start + size
    return sympy.expand(start + step * at)


# Triangles and scans


def _triangle(lower: bool) -> Handler:
    def handler(reader: MaskReader, node: fx.Node, index: Index) -> Value:
        diagonal = scalar(argument(node, 1, "diagonal", 0))
        if diagonal is None:
            raise NotExact("has a diagonal that is data")
        gap = index[-1] - index[-2] - diagonal
        inside = reader.logic.le_zero(gap if lower else -gap)
        dtype = reader.tensor(node).dtype
        value = reader.read(argument(node, 0, "input"), index)
        return select(inside, value, constant(0, dtype, reader.logic), dtype, reader.logic)

    return handler


handles("tril")(_triangle(lower=True))
handles("triu")(_triangle(lower=False))


@handles("cumsum")
def _cumsum(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    """Of a constant only: anything else is left to be read as data."""
    source = argument(node, 0, "input")
    dim = reader.dimension(argument(node, 1, "dim"), len(index))
    if reader.tensor(node).dtype is not torch.int64:
        raise NotExact("sums into other than 64-bit integers")
    anywhere = (*index[:dim], reader.variable(node, reader.sizes(node)[dim]), *index[dim + 1 :])
    match reader.read(source, anywhere):
        case Bool(pred) if pred in (reader.logic.true, reader.logic.false):
            number = sympy.Integer(int(pred is reader.logic.true))
        case Int(expr) if expr.is_Integer:
            number = expr
        case Choice(_, yes, no) if yes == no:
            number = sympy.Integer(int(yes))
        case _:
            raise NotExact("sums up data")
    return Int(sympy.expand(number * (index[dim] + 1)))


@handles("diff")
def _diff(reader: MaskReader, node: fx.Node, index: Index) -> Value:
    """Of what grows by the same step everywhere, from the prepended element on."""
    dim = reader.dimension(argument(node, 2, "dim", -1), len(index))
    prepend, append = argument(node, 3, "prepend"), argument(node, 4, "append")
    if argument(node, 1, "n", 1) != 1 or append is not None or reader.tensor(node).dtype is not torch.int64:
        raise NotExact("is not a plain first difference of 64-bit integers")
    source = argument(node, 0, "input")
    somewhere = reader.variable(node, reader.sizes(source)[dim])

    def along(of: fx.Node, position: sympy.Expr) -> sympy.Expr:
        value = reader.read(of, (*index[:dim], position, *index[dim + 1 :]))
        if not isinstance(value, Int) or reader.logic.opaques_in(value.expr):
            raise NotExact("takes the difference of data")
        return value.expr

    rising = along(source, somewhere)
    step = sympy.expand(rising - rising.subs(somewhere, somewhere - 1))
    if step.has(somewhere):
        raise NotExact("takes the difference of positions that are not evenly spaced")
    if prepend is not None:
        if reader.sizes(prepend)[dim] != 1:
            raise NotExact("prepends more than one element")
        first = rising.subs(somewhere, 0) - along(prepend, ZERO)
        if not reader.prover.equal(first, step):
            raise NotExact("prepends an element that does not continue the positions")
    return Int(step)
