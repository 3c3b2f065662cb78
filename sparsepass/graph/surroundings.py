"""What surrounds the nodes of a captured graph and limits what may be made of them.

Gradients can be turned on and off in the middle of a graph; ``torch.func`` transforms open levels in which a tensor is
more than it seems; and a value may be a tensor subclass, whose operations are its own.
"""

from __future__ import annotations

import re

from torch import fx

from sparsepass.graph import torch_private
from sparsepass.graph.canonical import called_name, value

_NESTING = re.compile(r"_(vmap|grad|jvp|func)_(in|de)crement_nesting")


def grad_modes(graph: fx.Graph, start: bool) -> dict[fx.Node, bool]:
    """Whether gradients are recorded at each node, if they are (``start``) where the graph begins."""
    mode, modes = start, dict[fx.Node, bool]()
    outside: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        name = called_name(node) if node.op == "call_function" else ""
        if name == "_set_grad_enabled":
            mode = bool(node.args[0])
        elif name == "_enter_inference_mode":
            outside[node] = mode
            mode = not node.args[0]  # inference_mode(False) turns gradients on
        elif name == "_exit_inference_mode":
            mode = outside[node.args[0]]
        modes[node] = mode
    return modes


def left_alone(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes of which nothing may be made, with the reason as the end of a sentence."""
    reasons: dict[fx.Node, str] = {}
    levels: list[str] = []
    for node in graph.nodes:
        nesting = _NESTING.fullmatch(called_name(node)) if node.op == "call_function" else None
        if nesting is not None and nesting[2] == "in":
            levels.append(nesting[1])
        elif nesting is not None and levels:
            levels.pop()
        elif levels and node.op != "output":
            reasons[node] = f"is inside a torch.func transform ({levels[-1]})"
        elif (kind := torch_private.tensor_kind(value(node))) is not None:
            reasons[node] = f"is a {kind}, whose operations are its own"
    return reasons
