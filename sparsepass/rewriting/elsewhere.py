"""Attention that no captured graph holds in a known form: told once, as nothing else shows that a model stays dense."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from torch import fx

from sparsepass.graph import torch_private
from sparsepass.rewriting import record
from sparsepass.sites import TOO_FEW
from sparsepass.types import Skip

log = logging.getLogger("sparsepass")

_ATTENDS = re.compile(r"Attention|Attn", re.ASCII)
_ANOTHER_KIND = re.compile(r"Linear|Lightning|Channel|Spatial|Conv|Delta|Norm|Mask|Embedding|Mlp|MLP", re.ASCII)

_told: set[str] = set()


def attention_module(gm: fx.GraphModule) -> str:
    """The class of a module that a graph is part of and that attends by its name (``LlamaAttention``); else empty.

    Modules that sum without a softmax (linear attention) or over channels are none. To be called while the frame is
    compiled, whose own modules are looked at too.
    """
    stacks = [node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes]
    kinds = [kind for stack in stacks for _, kind in stack.values()]
    for kind in (*(type(module) for module in torch_private.frame_modules()), *kinds):
        name = str(kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]
        if _ATTENDS.search(name) and not _ANOTHER_KIND.search(name):
            return name
    return ""


class Elsewhere:
    """Watches a graph in which no attention was matched, but which has a part of a module that attends, or what looks
    like attention.

    The rest of a module may be in another graph. So the line is logged at the second run, if no graph with a site ran
    since the first one, and once in a process for each class of modules or each reason.
    """

    def __init__(self, module: str, refused: Sequence[Skip]) -> None:
        self.module = module
        reasons = [skip.reason for skip in refused if TOO_FEW not in skip.reason]
        if reasons:
            self._text = f"What looks like attention was not matched and runs as the model wrote it: {reasons[0]}."
        elif module:
            self._text = (
                f"{module} ran in a compiled graph, but its attention is in none: it runs outside, as the model wrote "
                "it, and no budget holds there (a graph break, a disabled function, or one that is no softmax)."
            )
        self._done = not reasons and not module
        self._before: int | None = None

    def ran(self) -> None:
        """To be called at each run of the graph."""
        if self._done:
            return
        if self._before is None:
            self._before = record.with_sites
            return
        self._done = True
        key = re.sub(r"'[^']*'|\d+", "", self._text)
        if record.with_sites == self._before and key not in _told:
            _told.add(key)
            log.warning("%s sparsepass.explain(model, ...) says more.", self._text)
