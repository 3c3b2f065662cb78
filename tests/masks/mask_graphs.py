"""Captures mask graphs with Dynamo and checks, at every call and element, what was recognized against the real mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsepass.masks.recognize import MaskTerms, recognize_mask
from sparsepass.patterns.pattern import HIDES
from sparsepass.types import UNBOUNDED, Align, Skip


def rebuild(terms: MaskTerms, values: dict[fx.Node, torch.Tensor], q_len: int, kv_len: int) -> torch.Tensor:
    """The full boolean mask [B or 1, 1, Sq, Skv] that the terms describe, from the real values of their nodes."""
    offset = kv_len - q_len if terms.band.align is Align.BOTTOM_RIGHT else 0
    rows, columns = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)[None, :]
    visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    if terms.band.left != UNBOUNDED:
        visible = visible & (columns >= rows - terms.band.left)
    if terms.band.right != UNBOUNDED:
        visible = visible & (columns <= rows + terms.band.right)
    for node in terms.padding:
        assert values[node].dtype is torch.bool
        visible = visible & values[node].reshape(-1, values[node].shape[-1])[:, None, None, :kv_len]
    if terms.segments is not None:
        ids = values[terms.segments]
        ids = ids.reshape(-1, ids.shape[-1])
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    return visible


def visible_keys(mask: torch.Tensor) -> torch.Tensor:
    """Where a boolean or additive mask lets a key through; an additive one must be 0 or so low that it hides."""
    if mask.dtype is torch.bool:
        return mask
    shown = mask == 0
    assert bool((shown | (mask <= HIDES)).all())
    return shown


@dataclass
class Site:
    """What was recognized for one mask of one graph."""

    terms: MaskTerms | Skip
    calls: int = 0
    """Runs in which the rebuilt mask was compared with the real one."""

    @property
    def found(self) -> MaskTerms:
        assert isinstance(self.terms, MaskTerms), self.terms
        return self.terms

    @property
    def reason(self) -> str:
        assert isinstance(self.terms, Skip), self.terms
        return self.terms.reason


def masks_of(graph: fx.Graph) -> list[tuple[fx.Node, Any, Any]]:
    """Masks with query and key lengths: of SDPA calls, of ``scores + mask`` before a softmax, else all outputs."""
    sites = []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "scaled_dot_product_attention" and node.kwargs.get("attn_mask") is not None:
            q, k = (node.args[i].meta["example_value"].shape for i in (0, 1))
            sites.append((node.kwargs["attn_mask"], q[-2], k[-2]))
        if name == "softmax" and getattr(node.args[0].target, "__name__", "") == "add":
            scores, mask = node.args[0].args
            shape = scores.meta["example_value"].shape
            sites.append((mask, shape[-2], shape[-1]))
    if not sites:
        (results,) = next(node for node in graph.nodes if node.op == "output").args
        for mask in results:
            shape = mask.meta["example_value"].shape
            sites.append((mask, shape[-2], shape[-1]))
    return sites


@dataclass
class Checker:
    """A backend that recognizes the masks of every graph and compares at each run, eagerly, with the real ones."""

    sites: list[Site] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        guards = [len(env.guards) for env in _shape_envs(gm)]
        masks = masks_of(gm.graph)
        sites = [Site(recognize_mask(mask, q_len=q_len, kv_len=kv_len)) for mask, q_len, kv_len in masks]
        assert guards == [len(env.guards) for env in _shape_envs(gm)], "recognizing a mask added a guard"
        self.sites += sites

        def run(*inputs: Any) -> Any:
            interpreter = _Recorder(gm)
            result = interpreter.run(*inputs)
            for (mask, _, _), site in zip(masks, sites, strict=True):
                if isinstance(site.terms, MaskTerms):
                    real = visible_keys(interpreter.values[mask])
                    site.calls += 1
                    q_len, kv_len = real.shape[-2:]
                    expected = rebuild(site.terms, interpreter.values, q_len, kv_len)
                    real = real[(None,) * (4 - real.dim())]
                    expected = expected.expand_as(real)
                    assert torch.equal(real, expected), (site.terms, tuple(real.shape), gm.code)
            return result

        return run


def _shape_envs(gm: fx.GraphModule) -> list[Any]:
    envs = []
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.shape_env not in envs:
                envs.append(size.node.shape_env)
    return envs


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every tensor."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.values[n] = value
        return value


def check(function: Callable[..., Any], *calls: tuple[Any, ...], dynamic: bool | None = False) -> list[Site]:
    """Compile ``function``, run it on each of ``calls``, and return the sites of all graphs."""
    torch._dynamo.reset()
    checker = Checker()
    compiled = torch.compile(function, backend=checker, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    return checker.sites
