"""Grouped-query attention by repetition: K or V of every group copied to its query heads, as transformers writes it.

``k[:, :, None].expand(B, Hkv, G, S, D).reshape(B, Hkv * G, S, D)``, or ``repeat_interleave(G, dim=1)``.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sparsepass.graph.canonical import CanonicalGraph, Operand, called
from sparsepass.graph.sizes import same_size, shape


def repeated(k: torch.Tensor, groups: int) -> torch.Tensor:
    """What ``without_repeat`` undoes. k: [B, Hkv, S, D]; returns [B, Hkv * groups, S, D]."""
    batch, heads, length, dim = k.shape
    return k[:, :, None, :, :].expand(batch, heads, groups, length, dim).reshape(batch, heads * groups, length, dim)


def both_without_repeat(view: CanonicalGraph, key: Operand, value: Operand) -> tuple[Operand, Operand]:
    """Key and value without their repetition, or as they are where only one of them is seen to be repeated."""
    pair = without_repeat(view, key), without_repeat(view, value)
    return pair if same_size(shape(pair[0])[1], shape(pair[1])[1]) else (key, value)


def without_repeat(view: CanonicalGraph, node: Operand) -> Operand:
    """The [B, Hkv, S, D] tensor behind a repeated [B, H, S, D] one, or ``node`` itself where nothing is repeated."""
    node = view.resolve(node)
    if not isinstance(node, fx.Node):
        return node
    name = view.ops[node].name
    if name == "reshape":
        expanded = view.resolve(node.args[0])
        return _behind_expand(view, node, expanded) if view.ops[expanded].name == "expand" else node
    if called(node) in ("repeat_interleave", torch.repeat_interleave):
        source = node.args[0]
        repeats = node.args[1] if len(node.args) > 1 else node.kwargs.get("repeats")
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if isinstance(source, fx.Node) and isinstance(repeats, int) and axis in (1, -3) and len(shape(source)) == 4:
            return source
    return node


def _behind_expand(view: CanonicalGraph, node: fx.Node, expanded: fx.Node) -> fx.Node:
    inserted = view.resolve(expanded.args[0])
    if not isinstance(inserted, fx.Node) or not _inserts_axis_2(view, inserted):
        return node
    source = view.resolve(inserted.args[0])
    if not isinstance(source, fx.Node):
        return node
    before, wide, after = shape(source), shape(expanded), shape(node)
    if len(before) != 4 or len(wide) != 5 or len(after) != 4:
        return node
    batch, heads, length, dim = before
    kept = zip((wide[0], wide[1], wide[3], wide[4]), (batch, heads, length, dim), strict=True)
    folded = zip(after, (batch, heads * wide[2], length, dim), strict=True)
    return source if all(same_size(a, b) for a, b in (*kept, *folded)) else node


def _inserts_axis_2(view: CanonicalGraph, node: fx.Node) -> bool:
    """``x[:, :, None]`` (with any number of trailing full slices) or ``x.unsqueeze(2)`` of a 4-D tensor."""
    name = view.ops[node].name
    if name == "unsqueeze":
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return axis in (2, -3)
    if name != "getitem" or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    full = slice(None, None, None)
    return len(index) >= 3 and index[2] is None and all(i == full for i in (*index[:2], *index[3:]))
