"""A captured graph condensed for a picture: runs of other nodes become boxes, repeated layers become one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

NODE_KINDS = ("op", "sparse", "dense_masked", "dense", "refused", "decode")


_NUMBER = re.compile(r"(?i)(?<=\blayer)s? ?\d+|(?<=\bsite)s? ?\d+|(?<=[a-z])[._]\d+|(?<=[a-z])\[\d+\]")


@dataclass(frozen=True)
class DrawNode:
    """One node of a captured graph, for the picture. ``label`` is the site's second line (plan, density); "" for ops.

    Labels of equal sites should be equal: put no layer number there, the name carries it.
    """

    name: str
    inputs: tuple[str, ...] = ()
    """Names of the nodes it reads. Names that are not in the graph are ignored."""
    kind: str = "op"
    """One of ``NODE_KINDS``: ``op``, or the outcome of an attention site."""
    label: str = ""


@dataclass(frozen=True)
class Stage:
    """The ops between two rows of sites, and the sites that follow them. One stage per layer in a decoder."""

    op_names: tuple[str, ...]
    """Sorted, without numbers: equal layers have equal ones."""
    sites: tuple[DrawNode, ...]
    ops_read: tuple[int, ...] = ()
    """Which ``Condensed.shared`` boxes its ops read."""
    sites_read: tuple[int, ...] = ()
    """Which of them its sites read directly, as a mask is."""
    skips_sites: bool = False
    """True when the next stage's ops also read this stage's ops (the residual stream around the sites)."""

    @property
    def ops(self) -> int:
        return len(self.op_names)

    @property
    def signature(self) -> tuple[object, ...]:
        sites = tuple((s.kind, without_number(s.label)) for s in self.sites)
        return (self.op_names, sites, self.ops_read, self.sites_read, self.skips_sites)


@dataclass(frozen=True)
class Shared:
    """Ops whose results several layers read: masks, rotary tables. ``stage``: where they are computed."""

    ops: int
    stage: int
    names: tuple[str, ...]
    """The nodes that layers read directly."""


@dataclass(frozen=True)
class Fold:
    """``times`` repeats of ``stages``; ``last`` holds the sites of the last repeat, for their names."""

    stages: tuple[Stage, ...]
    times: int
    last: tuple[Stage, ...]


@dataclass(frozen=True)
class Condensed:
    """A graph ready to lay out, in execution order."""

    folds: tuple[Fold, ...]
    shared: tuple[Shared, ...]


def condense(nodes: Sequence[DrawNode]) -> Condensed:
    """Condenses a graph given in topological order (the order of an FX graph's nodes)."""
    users = _users(nodes)
    levels = _levels(nodes, users)
    shared_of, shared = _shared(nodes, users, levels)
    kinds = {n.name: n.kind for n in nodes}
    count = max((levels[n.name] for n in nodes), default=-1) + 1
    ops: list[list[str]] = [[] for _ in range(count)]
    sites: list[list[DrawNode]] = [[] for _ in range(count)]
    ops_read: list[set[int]] = [set() for _ in range(count)]
    sites_read: list[set[int]] = [set() for _ in range(count)]
    skips = [False] * count
    for node in nodes:
        level = levels[node.name]
        if node.name in shared_of:
            continue
        if node.kind == "op":
            ops[level].append(re.sub(r"_?\d+", "", node.name))
        else:
            sites[level].append(node)
        for name in node.inputs:
            if name in shared_of:
                (ops_read if node.kind == "op" else sites_read)[level].add(shared_of[name])
            elif node.kind == "op" and kinds.get(name) == "op" and levels[name] == level - 1:
                skips[level - 1] = True
    stages = [
        Stage(
            tuple(sorted(ops[i])), tuple(sites[i]), tuple(sorted(ops_read[i])), tuple(sorted(sites_read[i])), skips[i]
        )
        for i in range(count)
        if ops[i] or sites[i]
    ]
    return Condensed(tuple(fold_stages(stages)), shared)


def fold_stages(stages: Sequence[Stage], longest: int = 8) -> list[Fold]:
    """Repeats of up to ``longest`` stages (alternating sliding and full layers have period 2) become one ``Fold``."""
    folds: list[Fold] = []
    start = 0
    while start < len(stages):
        period, times = _best_repeat(stages[start:], longest)
        end = start + period * times
        folds.append(Fold(tuple(stages[start : start + period]), times, tuple(stages[end - period : end])))
        start = end
    return folds


def without_number(text: str) -> str:
    """The text without layer and node numbers (``layer 3``, ``layers.3``, ``softmax_3``); densities and sizes stay.

    Two layers with the same story then compare equal.
    """
    return _NUMBER.sub("#", text)


def _best_repeat(stages: Sequence[Stage], longest: int) -> tuple[int, int]:
    signatures = [s.signature for s in stages]
    best = (1, 1)
    for period in range(1, min(longest, len(stages) // 2) + 1):
        times = 1
        while signatures[times * period : (times + 1) * period] == signatures[:period]:
            times += 1
        # A longer period must cover more stages: x32 of one stage is also x16 of two.
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best


def _users(nodes: Sequence[DrawNode]) -> dict[str, list[DrawNode]]:
    users: dict[str, list[DrawNode]] = {node.name: [] for node in nodes}
    for node in nodes:
        for name in dict.fromkeys(node.inputs):
            if name in users:
                users[name].append(node)
    return users


def _levels(nodes: Sequence[DrawNode], users: dict[str, list[DrawNode]]) -> dict[str, int]:
    """Stage of each node: sites as early as their inputs allow, ops as late as their users allow.

    Late, so that a layer's own weights and the projections of an encoder's output count for the layer that uses them.
    """
    levels: dict[str, int] = {}
    after: dict[str, int] = {}
    for node in nodes:
        levels[node.name] = max((after[name] for name in node.inputs if name in after), default=0)
        after[node.name] = levels[node.name] + (node.kind != "op")
    for node in reversed(nodes):
        if node.kind == "op" and users[node.name]:
            levels[node.name] = min(levels[u.name] for u in users[node.name])
    return levels


def _shared(
    nodes: Sequence[DrawNode], users: dict[str, list[DrawNode]], levels: dict[str, int]
) -> tuple[dict[str, int], tuple[Shared, ...]]:
    """Ops read by three stages or more, with the ops that only they read, one box per stage they are computed in.

    Three, because the residual stream is read by two: by the attention of its own stage and, around it, by the next.
    Nodes that nobody reads (the output, which may list every layer's keys) do not count as readers.
    """
    members: set[str] = set()
    seeds: dict[int, list[str]] = {}
    for node in reversed(nodes):
        readers = [u for u in users[node.name] if u.kind != "op" or users[u.name]]
        if node.kind != "op" or not readers:
            continue
        if len({levels[u.name] for u in readers}) >= 3:
            seeds.setdefault(levels[node.name], []).append(node.name)
            members.add(node.name)
        elif all(u.name in members for u in readers):
            members.add(node.name)
    order = sorted({levels[name] for name in members})
    boxes = tuple(
        Shared(sum(levels[m] == level for m in members), level, tuple(reversed(seeds.get(level, []))))
        for level in order
    )
    number = {level: i for i, level in enumerate(order)}
    return {name: number[levels[name]] for name in members}, boxes
