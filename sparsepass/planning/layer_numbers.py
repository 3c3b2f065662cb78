"""Which layer each attention site of a graph is, where a policy has budgets by layer.

A graph may serve several layers: layers that are compiled one by one share their code. So a number that a module holds
is guarded, by the stretch of layers that the policy treats alike. One that cannot be guarded is not known.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sparsepass.graph import torch_private
from sparsepass.policies.policy import Policy
from sparsepass.sites import Findings, FoundSite, layer_in_path
from sparsepass.types import Phase

ATTRIBUTE = "layer_idx"
"""What transformers' attention modules call their number."""

Place = tuple[str, ...]
"""Names of attributes and places in lists that lead from a variable of the frame to a module."""


def number_layers(findings: Findings, policy: Policy) -> tuple[Findings, tuple[torch_private.ObjectGuard, ...]]:
    """The findings with each site's layer as far as it is known, and the guards that were installed for that.

    Where the policy gives all layers the same, numbers are for reports alone: those of the modules' paths.
    """
    held: dict[str, dict[Place, int]] = {}
    sites = []
    for found in findings.sites:
        # A frame's own module is in no path: its parts are.
        root, place = _parse(found.source) if found.source else (torch_private.only_module(), ())
        module = torch_private.root_object(root) if root and _matters(found, policy) else None
        if module is None:
            sites.append(found)
            continue
        number = layer_of(module, place)
        shared = False
        if number is not None:
            held.setdefault(root, {})[place] = number
            first, last = policy.layer_stretch(number)
            shared = first != last and layer_in_path(".".join(place)) != number
        sites.append(replace(found, layer=number, layer_shared=shared))
    guards = tuple(_guard(root, numbers, policy) for root, numbers in held.items())
    for guard in guards:
        guard.install()
    return replace(findings, sites=tuple(sites)), guards


def layer_of(root: Any, place: Sequence[str]) -> int | None:
    """The layer of the module at a place: what it, or else a module around it, holds as ``layer_idx``.

    Without one the first number in the path, if it counts modules of one class and the others do not: a list of a
    layer's own parts holds several classes. None where that leaves it open.
    """
    modules = [root]
    for name in place:
        modules.append(_child(modules[-1], name))
    for module in reversed(modules):
        number = getattr(module, ATTRIBUTE, None) if isinstance(module, nn.Module) else None
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            return number
    lists = [(int(name), parent) for name, parent in zip(place, modules, strict=False) if name.isdecimal()]
    if lists and [_of_one_class(parent) for _, parent in lists] == [True] + [False] * (len(lists) - 1):
        return lists[0][0]
    return None


def _matters(found: FoundSite, policy: Policy) -> bool:
    if found.site.phase is Phase.DECODE:
        return False
    length = found.site.kv_len
    return _differs(policy, max(1, length) if isinstance(length, int) else None, found.site.heads)


@functools.lru_cache(maxsize=256)
def _differs(policy: Policy, length: int | None, heads: int) -> bool:
    buckets = policy.buckets if length is None else (policy.bucket(length),)
    return policy.differs_by_layer(buckets, heads)


def _parse(source: str) -> tuple[str, Place]:
    """``L['self']._modules['layers'][7].self_attn`` as ``L['self']`` and the names after it; else nothing."""
    match = re.match(r"[LG]\['\w+'\]", source)
    if match is None:
        return "", ()
    names = re.findall(r"\w+", source[match.end() :])
    return match.group(), tuple(name for name in names if name != "_modules")


def _child(parent: Any, name: str) -> Any:
    if isinstance(parent, nn.Module) and name in parent._modules:
        return parent._modules[name]
    if name.isdecimal() and isinstance(parent, list | tuple):
        return parent[int(name)] if int(name) < len(parent) else None
    if isinstance(parent, dict):
        return parent.get(name)
    return getattr(parent, name, None)


def _of_one_class(parent: Any) -> bool:
    children: Iterable[Any] = parent.children() if isinstance(parent, nn.Module) else parent
    classes = [type(child) for child in children]
    return len(classes) > 1 and len(set(classes)) == 1


def _guard(root: str, numbers: dict[Place, int], policy: Policy) -> torch_private.ObjectGuard:
    stretches = {place: policy.layer_stretch(number) for place, number in numbers.items()}
    words = ", ".join(dict.fromkeys(map(_words, stretches.values())))
    return torch_private.ObjectGuard(root, _check(stretches), f"sparsepass: layers of {root} are {words}")


def _check(stretches: dict[Place, tuple[int, int | None]]) -> Callable[[Any], bool]:
    def check(root: Any) -> bool:
        for place, (first, last) in stretches.items():
            number = layer_of(root, place)
            if number is None or number < first or (last is not None and number > last):
                return False
        return True

    return check


def _words(stretch: tuple[int, int | None]) -> str:
    first, last = stretch
    return str(first) if first == last else f"{first} to {last}" if last is not None else f"{first} and on"
