"""From the softmax down to the product with the values: what may happen to the probabilities in between."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Operand, called_name
from sparsepass.graph.sizes import same_size, shape
from sparsepass.patterns.axes import Atom, Axes, Dims
from sparsepass.patterns.pattern import used_outside
from sparsepass.patterns.products import PRODUCTS, product_of
from sparsepass.patterns.score_chain import Unclear, number_of

_VIEWS = frozenset({"reshape", "transpose", "permute", "unsqueeze", "squeeze"})


@dataclass(frozen=True)
class Below:
    """The second product: ``output`` yields it with dims ``out``; ``size`` is the dimension of the values alone."""

    output: fx.Node
    out: Dims
    value: fx.Node
    value_dims: Dims
    size: Atom
    inside: set[fx.Node] = field(default_factory=set)
    dropout_p: Operand = 0.0
    sink: tuple[Operand, Dims] | None = None


def read_below(view: CanonicalGraph, softmax: fx.Node, axes: Axes, dims: Dims, key: Atom, has_sink: bool) -> Below:
    """Follow the probabilities, with dims ``dims``, to their product with the values. Raises ``Unclear``."""
    node, inside = softmax, {softmax}
    pending_sink = has_sink
    dropout_p: Operand = 0.0
    for _ in range(16):
        user = _next(view, node)
        op = view.ops[user]
        if op.name in PRODUCTS:
            if pending_sink:
                raise Unclear("the sinks are not dropped after the softmax", user)
            return _summed(view, axes, node, user, dims, key, inside | {user}, dropout_p)
        inside.add(user)
        if op.name in ("getitem", "slice") and pending_sink and _drops_last(user, len(dims)):
            pending_sink = False
        elif op.name == "dropout":
            dropout_p = dict(op.params)["p"]
        elif op.name == "masked_fill" and number_of(view.resolve(op.operands[2])) == 0.0:
            _check_repeats(view, softmax, user)
        elif op.name == "transpose":
            first, second = dict(op.params)["dims"]
            moved = list(dims)
            moved[first], moved[second] = moved[second], moved[first]
            dims = tuple(moved)
        elif op.name == "permute":
            dims = tuple(dims[place] for place in dict(op.params)["dims"])
        elif op.name in _VIEWS:
            dims = axes.viewed(dims, shape(user))
        else:
            raise Unclear(
                f"{op.name.removeprefix('call_function:').removeprefix('call_method:')!r} (node {user.name!r}) changes "
                "the probabilities between the softmax and their product with the values",
                user,
            )
        node = user
    raise Unclear("too many operations between the softmax and the product with the values", node)


def _next(view: CanonicalGraph, node: fx.Node) -> fx.Node:
    users = view.users(node)
    if not users and node.users:
        raise Unclear(
            f"nothing uses what {node.name!r} is for: this attention has no effect, and the compiler leaves it out",
            node,
        )
    if not users:
        raise Unclear(f"nothing uses {node.name!r}, the softmax of these scores, in this graph", node)
    if len(users) > 1:
        other = next((user for user in users if view.ops[user].name not in PRODUCTS), users[-1])
        raise Unclear(used_outside(node, other), node, other)
    if users[0].op == "output":
        raise Unclear(used_outside(node, users[0]), node, users[0])
    return users[0]


def _drops_last(node: fx.Node, rank: int) -> bool:
    """``x[..., :-1]``, or with full slices in front."""
    index = node.args[1]
    if called_name(node) == "slice":
        return index in (-1, rank - 1) and tuple(node.args[2:]) == (0, -1)
    if not isinstance(index, tuple) or index[-1] != slice(None, -1, None):
        return False
    front = index[:-1]
    return front == (Ellipsis,) or (len(index) == rank and all(one == slice(None, None, None) for one in front))


def _check_repeats(view: CanonicalGraph, softmax: fx.Node, after: fx.Node) -> None:
    """A mask after the softmax does nothing where it was there before: hidden keys have no weight."""
    above, mask = softmax, view.resolve(view.ops[after].operands[1])
    for _ in range(6):
        above = view.resolve(view.ops[above].operands[0])
        if not isinstance(above, fx.Node):
            break
        op = view.ops[above]
        if op.name == "masked_fill" and _equal(view, view.resolve(op.operands[1]), mask):
            return
        if not op.operands or op.name not in ("masked_fill", "add", "mul", "reshape"):
            break
    raise Unclear(f"{after.name!r} masks the probabilities after the softmax, by another mask than before it", after)


def _equal(view: CanonicalGraph, left: Operand, right: Operand, depth: int = 6) -> bool:
    """Whether two nodes are the same computation of the same inputs."""
    left, right = view.resolve(left), view.resolve(right)
    if left is right:
        return True
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or not depth:
        return bool(type(left) is type(right) and left == right)
    if left.op not in ("call_function", "call_method") or (left.op, left.target) != (right.op, right.target):
        return False
    if left in view.writes or right in view.writes or left.kwargs != right.kwargs or len(left.args) != len(right.args):
        return False
    return all(_equal(view, a, b, depth - 1) for a, b in zip(left.args, right.args, strict=True))


def _summed(
    view: CanonicalGraph, axes: Axes, node: fx.Node, user: fx.Node, dims: Dims, key: Atom, inside: set[fx.Node],
    dropout_p: Operand,
) -> Below:  # fmt: skip
    """The product with the values, its dimensions named by those of the probabilities."""
    product = product_of(view, user, axes)
    if product is None or product.added is not None or product.alpha != 1.0:
        raise Unclear(f"{user.name!r} is no product of probabilities and values over one dimension", user)
    left, right = view.resolve(product.left), view.resolve(product.right)
    if left is node and right is node:
        raise Unclear(f"{user.name!r} multiplies the probabilities with themselves", user)
    mine, values, value_dims = (
        (product.left_dims, product.right, product.right_dims)
        if left is node
        else (product.right_dims, product.left, product.left_dims)
    )
    for own, known in zip(mine, axes.of(dims), strict=True):
        if own:
            axes.parts[own[0]] = known
        elif known and not same_size(axes.size(known), 1):
            raise Unclear(f"{user.name!r} broadcasts the probabilities", user)
    if axes.of([(product.summed,)])[0] != (key,):
        raise Unclear(
            f"the softmax is over one dimension of the scores (the keys), and {user.name!r} sums the values over "
            "another, so this is no attention",
            user,
        )
    scores = {atom for dim in axes.of(dims) for atom in dim}
    held = [atom for dim in axes.of(value_dims) for atom in dim]
    alone = [atom for atom in held if atom not in scores]
    if len(alone) != 1:
        raise Unclear(f"the values {values.name!r} do not have one dimension of their own", user)
    return Below(user, axes.of(product.out), values, axes.of(value_dims), alone[0], inside, dropout_p)
