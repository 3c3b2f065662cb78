"""Attention counted in an uncompiled run, by what is called: nothing here knows how sites are matched."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

SHORTEST = 48
"""Fewer keys than this are no tokens: layers, experts, streams."""

SOFTMAX = {"softmax", "_softmax", "softmax_", "logsumexp", "_safe_softmax", "softmax_int"}
SDPA = "scaled_dot_product_attention"
_COMPOSITE = "multi_head_attention_forward"
_NATIVE = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}


class AttentionCounter(TorchFunctionMode):
    """Counts executions of attention: calls of SDPA, and softmaxes over scores [.., Sq, Skv] of tokens.

    A softmax over features or experts is told by its shape: two dimensions, three and a size in ``features``, fewer
    than ``SHORTEST`` entries, or not over the last dimension. ``sites``: executions by what was called, ``sdpa`` or
    ``softmax``. ``shapes``: executions by (what, query length, key length).
    """

    def __init__(self, features: Iterable[int] = ()) -> None:
        super().__init__()
        self.features = frozenset(features)
        self.sites: Counter[str] = Counter()
        self.shapes: Counter[tuple[str, int, int]] = Counter()
        self._scores: weakref.ref[torch.Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == SDPA:
            query = args[0] if args else given["query"]
            key = args[1] if len(args) > 1 else given["key"]
            if key.shape[-2] >= SHORTEST:
                self._add("sdpa", query.shape[-2], key.shape[-2])
        elif name in SOFTMAX:
            self._softmax(args, given)
        elif name in _NATIVE:
            source = args[0] if args else given.get("query", given.get("src"))
            if source is not None and source.shape[1] >= SHORTEST:
                self._add("sdpa", source.shape[1], source.shape[1])
        elif name == _COMPOSITE:
            # What it calls is not seen here: one softmax or one SDPA. Its tensors are [S, B, E].
            query, key = (args[0], args[1]) if len(args) > 1 else (given["query"], given["key"])
            if key.shape[0] >= SHORTEST:
                self._add("softmax" if given.get("need_weights", True) else "sdpa", query.shape[0], key.shape[0])
        return func(*args, **given)

    def _softmax(self, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        scores = args[0] if args else given.get("input", given.get("self"))
        dim = args[1] if len(args) > 1 else given.get("dim", -1)
        if not isinstance(scores, torch.Tensor) or scores.ndim < 3 or not isinstance(dim, int):
            return
        if self._scores is not None and self._scores() is scores:  # its logsumexp, besides its softmax
            return
        if dim not in (-1, scores.ndim - 1):
            return  # the tokens of a window weighted per feature, say: attention has its keys last
        size = scores.shape[-1]
        if size < SHORTEST or (scores.ndim == 3 and size in self.features) or not scores.is_floating_point():
            return
        self._scores = weakref.ref(scores)
        self._add("softmax", scores.shape[-2], size)

    def _add(self, what: str, rows: int, keys: int) -> None:
        self.sites[what] += 1
        self.shapes[what, int(rows), int(keys)] += 1


def anchors(gm: fx.GraphModule) -> int:
    """Nodes of a captured graph, and of graphs inside it, that call SDPA or a softmax over long rows of scores."""
    found = 0
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            if node.op not in ("call_function", "call_method"):
                continue
            held = node.meta.get("example_value")
            scores = isinstance(held, torch.Tensor) and held.ndim > 2 and isinstance(held.shape[-1], int)
            long = scores and held.shape[-1] >= SHORTEST
            found += name in (SDPA, _COMPOSITE) or (name in SOFTMAX and name != "logsumexp" and long)
    return found
