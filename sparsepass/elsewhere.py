"""Attention that runs outside every captured graph: told once, since a model that stays dense looks like one that works."""

from __future__ import annotations

import logging
import re

from torch import fx

from sparsepass import record

log = logging.getLogger("sparsepass")

_ATTENDS = re.compile(r"Attention|Attn", re.ASCII)
_ANOTHER_KIND = re.compile(r"Linear|Lightning|Channel|Spatial|Conv|Delta|Norm|Mask|Embedding|Mlp|MLP", re.ASCII)

_told: set[str] = set()


def attention_module(gm: fx.GraphModule) -> str:
    """The class of the first module in a graph that attends by its name, for instance ``LlamaAttention``; else empty.

    Modules that sum without a softmax (linear attention) or over channels are none.
    """
    for node in gm.graph.nodes:
        for _, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else kind.__name__
            if _ATTENDS.search(name) and not _ANOTHER_KIND.search(name):
                return str(name)
    return ""


class Elsewhere:
    """Watches a graph that has a part of an attending module and no attention.

    The rest of the module may be in another graph. So the line is logged at the second run, if no graph with attention
    ran since the first one, and once for each class of modules in a process.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self._before: int | None = None
        self._done = False

    def ran(self) -> None:
        if self._done:
            return
        if self._before is None:
            self._before = record.with_attention
            return
        self._done = True
        if record.with_attention == self._before and self.module not in _told:
            _told.add(self.module)
            log.warning(
                "%s ran in a compiled graph, but its attention is in none: it runs outside, as the model wrote it, and "
                "no budget holds there (a graph break, a disabled function, a kernel of another package, or one that is "
                "no softmax). sparsepass.explain(model, ...) says more.",
                self.module,
            )
