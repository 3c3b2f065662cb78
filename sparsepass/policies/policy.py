"""Policies: which budget a task class, a length bucket, a layer and a head get. Data and look-up; files are in
``sparsepass.policies.file``.

Tolerance to sparsity falls with scope and dispersion and grows with length (The Sparse Frontier, arXiv 2504.17768). The
built-in prior is that study's fit, made more cautious; it holds until a calibrated policy replaces it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sparsepass.errors import PolicyError, quoted_path, shown
from sparsepass.host.files import json_text, write_whole
from sparsepass.methods import make_method, merge_heads
from sparsepass.policies.rule import Rule, rule_to_json
from sparsepass.types import DENSE, Budget, LengthBucket, TaskClass

VERSION = 1
"""Of the policy file format."""

SCHEMA_ID = "urn:sparsepass:policy:1"
"""``$id`` of the schema that files of this version follow."""

POLICY_ENV = "SPARSEPASS_POLICY"
"""Environment variable: path of the policy file used where none is given."""

PRIOR = {
    TaskClass.SINGLE_QA: (0.10, 0.03),
    TaskClass.MULTI_QA: (0.30, 0.10),
    TaskClass.MULTI_HOP: (0.60, 0.33),
    TaskClass.AGGREGATION: (0.60, 0.33),
    TaskClass.UNKNOWN: (0.60, 0.33),
}
"""Task class to (density at 16K tokens, the density it never goes under)."""

RETRIEVAL = (TaskClass.SINGLE_QA, TaskClass.MULTI_QA)
"""Classes for which The Sparse Frontier found vertical-slash best; for the others, blocks."""

POWERS = tuple(1024 << power for power in range(11))
"""Bucket edges that every policy has, in tokens: 1K to 1M."""


def prior_density(task: TaskClass, low: int) -> float:
    """Density of the prior in a bucket whose lower edge is ``low`` tokens: ``d16k * sqrt(16384 / low)``, clamped.

    The lower edge, since the shortest length of a bucket tolerates the least.
    """
    at_16k, never_under = PRIOR[task]
    return min(1.0, max(never_under, at_16k * math.sqrt(16384 / low))) if low > 0 else 1.0


@dataclass(frozen=True)
class Policy:
    """Maps (task class, length bucket, layer, head) to a budget. Of the rules that hold, the last one wins.

    ``default`` holds where no rule does: ``dense``, or the built-in ``prior``. ``name`` and ``description`` are for
    people, ``calibrated`` for warnings: they change no budget, so they are not in the fingerprint. Raises
    ``PolicyError``.
    """

    name: str = "unnamed"
    rules: tuple[Rule, ...] = ()
    default: Literal["dense", "prior"] = "dense"
    description: str = ""
    calibrated: Mapping[str, Any] | None = None
    """What it was measured on, if it was (``sparsepass calibrate``): architecture, weights, dtype, methods."""

    def __post_init__(self) -> None:
        if self.default not in ("dense", "prior"):
            raise PolicyError(f"A policy's default is {shown(self.default)}; accepted are 'dense' and 'prior'.")
        if not isinstance(self.name, str) or not self.name:
            raise PolicyError(f"A policy's name is {shown(self.name)}; accepted is any text, for reports.")
        object.__setattr__(self, "rules", tuple(self.rules))

    def __eq__(self, other: object) -> bool:
        """Dynamo compares the options of each ``torch.compile`` of a code at every call: by the fingerprints here."""
        if self is other or not isinstance(other, Policy):
            return self is other
        same = self.fingerprint == other.fingerprint and self.name == other.name
        return same and self.description == other.description and self.calibrated == other.calibrated

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides budgets; the same in every process."""
        content: dict[str, Any] = {
            "version": VERSION,
            "powers": POWERS,
            "default": self.default,
            "rules": [rule_to_json(rule) for rule in self.rules],
        }
        if self.default == "prior":
            content["prior"] = {str(task): numbers for task, numbers in PRIOR.items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def buckets(self) -> tuple[LengthBucket, ...]:
        """All lengths from 1, cut at the powers of two and at the rules' edges: a rule covers a bucket or misses it."""
        edges = set(POWERS)
        for rule in self.rules:
            edges |= {rule.above, rule.up_to or 0}
        cuts = [0, *sorted(edges - {0})]
        return tuple(LengthBucket(low, high) for low, high in zip(cuts, [*cuts[1:], None], strict=True))

    def bucket(self, length: int) -> LengthBucket:
        """The bucket of a key length in tokens. Raises ``PolicyError`` for a length under 1."""
        if length < 1:
            raise PolicyError(f"A key length is {length}; accepted is 1 token or more.")
        return self.buckets[bisect.bisect_left(self._lows, length) - 1]

    @cached_property
    def _lows(self) -> list[int]:
        return [bucket.low for bucket in self.buckets]

    def budget(
        self, task: TaskClass, bucket: LengthBucket, layer: int | None = None, head: int | None = None
    ) -> Budget:
        """The budget of one layer, or of one query head of it (both numbered from 0).

        An unknown (``None``) layer gets the most cautious of what any layer gets, and ``None`` as a head likewise.
        ``bucket`` is one of ``buckets``; ``PolicyError`` is raised for one that a rule covers in part.
        """
        return self._budget(task, bucket, layer, head, None)

    def budgets_for_heads(
        self, task: TaskClass, bucket: LengthBucket, layer: int | None, heads: int
    ) -> tuple[Budget, ...]:
        """The budgets of a layer's ``heads`` query heads, in order.

        Raises ``PolicyError`` for a budget with ``head_densities`` of another count.
        """
        return tuple(self._budget(task, bucket, layer, head, heads) for head in range(heads))

    def site_budget(self, task: TaskClass, bucket: LengthBucket, layer: int | None, heads: int | None) -> Budget:
        """One budget for a site of ``heads`` query heads; densities that differ are in its ``head_densities``.

        An unknown (``None``) number of heads gets the most cautious of what any head gets.
        """
        return _site_budget(self, task, bucket, layer, heads)

    def floor(self, task: TaskClass, bucket: LengthBucket, layer: int | None) -> float | None:
        """The share of the attention mass that a layer has to keep under a monitor; None where any will do.

        That of the last rule that holds for the layer; rules for some heads alone are passed over. An unknown
        (``None``) layer has to keep the most that any layer has to. ``bucket`` is one of ``buckets``.
        """
        rules = [rule for rule in _covering(self, task, bucket) if rule.heads is None]
        floors = [
            next((rule.floor for rule in reversed(rules) if rule.layers is None or place in rule.layers), None)
            for place in ((layer,) if layer is not None else _representatives(rules, "layers").values())
        ]
        return max((floor for floor in floors if floor is not None), default=None)

    @cached_property
    def layer_starts(self) -> tuple[int, ...]:
        """The first layer of each stretch of layers that all rules treat alike, in order; (0,) without such rules."""
        return tuple(sorted({0}.union(*(rule.layers.edges() for rule in self.rules if rule.layers is not None))))

    def layer_stretch(self, layer: int) -> tuple[int, int | None]:
        """The stretch of layers around one that all rules treat alike: first and last, ``None`` for no end."""
        place = bisect.bisect_right(self.layer_starts, layer)
        return self.layer_starts[place - 1], self.layer_starts[place] - 1 if place < len(self.layer_starts) else None

    def differs_by_layer(self, buckets: Iterable[LengthBucket], heads: int) -> bool:
        """Whether layers of ``heads`` query heads have several budgets, or floors, in one of the buckets."""
        if len(self.layer_starts) == 1:
            return False
        return any(
            len({(_site_budget(self, task, bucket, layer, heads), self.floor(task, bucket, layer)) for layer in places})
            > 1
            for bucket in buckets
            for task in TaskClass
            if (places := _representatives(_covering(self, task, bucket), "layers").values())
        )

    def within(self, span: LengthBucket) -> tuple[LengthBucket, ...]:
        """The buckets that a range of lengths made of whole buckets consists of."""
        return tuple(bucket for bucket in self.buckets if bucket.low >= span.low and _under(bucket, span.high))

    def to_json(self) -> dict[str, Any]:
        """The content of the policy's file. ``Policy.from_json`` of it is an equal policy."""
        data: dict[str, Any] = {"$schema": SCHEMA_ID, "version": VERSION, "name": self.name}
        if self.description:
            data["description"] = self.description
        if self.calibrated:
            data["calibrated"] = dict(self.calibrated)
        return {**data, "default": self.default, "rules": [rule_to_json(rule) for rule in self.rules]}

    @staticmethod
    def from_json(data: Any, where: str = "policy") -> Policy:
        """The policy that ``data``, the content of a file, describes; ``where`` begins each error's text."""
        from sparsepass.policies import file as policy_file  # not at import: checking a file needs jsonschema

        return policy_file.from_json(data, where)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """Read a policy file. Raises ``PolicyError`` naming the file, the place in it, and what is accepted."""
        from sparsepass.policies import file as policy_file

        return policy_file.load(Path(path))

    def save(self, path: str | os.PathLike[str], *, seal: bool = False) -> None:
        """Write the policy's file, whole or not at all. Raises ``PolicyError``.

        ``seal`` adds the fingerprint, so that loading it after an edit fails.
        """
        content = {**self.to_json(), **({"fingerprint": self.fingerprint} if seal else {})}
        text = json_text(content, PolicyError, indent=2, ascii_only=False)
        write_whole(path, text + "\n", PolicyError)

    def _budget(
        self, task: TaskClass, bucket: LengthBucket, layer: int | None, head: int | None, heads: int | None
    ) -> Budget:
        rules = _covering(self, task, bucket)
        layers = _memberships(self, task, bucket, "layers") if layer is None else (_holding(rules, "layers", layer),)
        at_heads = _memberships(self, task, bucket, "heads") if head is None else (_holding(rules, "heads", head),)
        winners = {(at_layer & at_head).bit_length() for at_layer in layers for at_head in at_heads}
        found = {rules[place - 1].budget if place else self._default(task, bucket) for place in winners}
        for budget in found:
            densities = budget.params.get("head_densities")
            if heads is not None and densities is not None and len(densities) != heads:
                raise PolicyError(
                    f"Policy {self.name!r} has a budget with head_densities for {len(densities)} heads, used at a "
                    f"layer of {heads}; give one density per query head, or limit the rule's layers."
                )
        if head is not None:
            found = {make_method(budget).for_head(head).budget() for budget in found}
        return found.pop() if len(found) == 1 else _most_cautious(found)

    def _default(self, task: TaskClass, bucket: LengthBucket) -> Budget:
        if task is TaskClass.DENSE or self.default == "dense":
            return DENSE
        density = prior_density(task, bucket.low)
        return DENSE if density >= 1 else Budget("pooled_topk", {"density": density})


def _under(bucket: LengthBucket, high: int | None) -> bool:
    return high is None or (bucket.high is not None and bucket.high <= high)


@functools.lru_cache(maxsize=512)
def _covering(policy: Policy, task: TaskClass, bucket: LengthBucket) -> tuple[Rule, ...]:
    """The rules that hold in a bucket, in some layer and head; cached, since every head of every layer asks."""
    if task is TaskClass.DENSE:
        return ()
    rules = [rule for rule in policy.rules if rule.task in (None, task)]
    for rule in rules:
        for edge in (rule.above, rule.up_to):
            if edge is not None and edge > bucket.low and (bucket.high is None or edge < bucket.high):
                raise PolicyError(f"Bucket {bucket} is cut by a rule at {edge} tokens; use the policy's buckets.")
    return tuple(rule for rule in rules if bucket.low >= rule.above and (rule.up_to is None or bucket.low < rule.up_to))


@functools.lru_cache(maxsize=4096)
def _site_budget(policy: Policy, task: TaskClass, bucket: LengthBucket, layer: int | None, heads: int | None) -> Budget:
    if heads is None:
        return make_method(policy.budget(task, bucket, layer)).uniform().budget()
    return merge_heads(policy.budgets_for_heads(task, bucket, layer, heads))


def _holding(rules: Sequence[Rule], what: Literal["layers", "heads"], number: int) -> int:
    """The rules that hold at a layer or head, as bits: the last rule's is the highest."""
    ranges = (getattr(rule, what) for rule in rules)
    return sum(1 << place for place, one in enumerate(ranges) if one is None or number in one)


@functools.lru_cache(maxsize=512)
def _memberships(
    policy: Policy, task: TaskClass, bucket: LengthBucket, what: Literal["layers", "heads"]
) -> tuple[int, ...]:
    """What ``_holding`` of a bucket's rules may be at an unknown layer or head."""
    return tuple(_representatives(_covering(policy, task, bucket), what))


def _representatives(rules: Sequence[Rule], what: Literal["layers", "heads"]) -> dict[int, int]:
    """A layer or head for each value that ``_holding`` may have: the first. One pass over the rules' edges."""
    changes: dict[int, int] = {0: 0}
    for place, rule in enumerate(rules):
        ranges = getattr(rule, what)
        for edge in (0,) if ranges is None else ranges.edges():
            changes[edge] = changes.get(edge, 0) ^ 1 << place
    held, found = 0, dict[int, int]()
    for edge in sorted(changes):
        held ^= changes[edge]
        found.setdefault(held, edge)
    return found


def _most_cautious(budgets: Iterable[Budget]) -> Budget:
    """One that computes at least as much as each; dense where they differ in more than the dial: those do not rank."""
    methods = [make_method(budget).uniform() for budget in budgets]
    kind = type(methods[0])
    if any(type(method) is not kind for method in methods):
        return DENSE
    try:
        return kind.cap(methods).budget()
    except PolicyError:
        return DENSE


def builtin_policy() -> Policy:
    """The prior: no rules, only the built-in densities. It holds until a calibrated policy replaces it."""
    return Policy(name="prior", default="prior")


@functools.cache
def published_policy() -> Policy:
    """The methods that The Sparse Frontier (arXiv 2504.17768) found best, at the prior's densities.

    Vertical-slash for retrieval (single_qa, multi_qa), pooled blocks for the other classes, which follow the prior.
    """
    rules = []
    for task in RETRIEVAL:
        for low, high in zip(POWERS, (*POWERS[1:], None), strict=True):
            if (density := prior_density(task, low)) < 1:
                rules.append(Rule(task, Budget("vertical_slash", {"density": density}), above=low, up_to=high))
    text = "Vertical-slash for retrieval, blocks for the rest (arXiv 2504.17768), at the prior's densities."
    return Policy(name="published", rules=tuple(rules), default="prior", description=text)


NAMED: dict[str, Callable[[], Policy]] = {"prior": builtin_policy, "published": published_policy}
"""Policies that are named where a file's path is accepted."""


@functools.lru_cache(maxsize=64)
def _of_text(text: str, path: str) -> Policy:
    from sparsepass.policies import file as policy_file

    return policy_file.parse(text, path)


def resolve_policy(given: str | os.PathLike[str] | Policy | None = None) -> Policy:
    """The policy that an option names: a ``Policy``, the path of a file, ``"prior"`` or ``"published"``.

    ``None``: the file that the environment variable ``SPARSEPASS_POLICY`` names, else the prior. A file is read each
    time, since its time of change may say nothing, and parsed again only if its text is another. Raises
    ``PolicyError``.
    """
    from sparsepass.policies import file as policy_file  # not at import: checking a file needs jsonschema

    if isinstance(given, Policy):
        return given
    if given is None:
        given = os.environ.get(POLICY_ENV) or "prior"
    if not isinstance(given, str | os.PathLike):
        raise PolicyError(f"A policy is {shown(given)}; accepted are a Policy, the path of a file, {_names()} or None.")
    path = os.fspath(given)
    if path in NAMED:
        return NAMED[path]()
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(
            f"The policy file {quoted_path(path)} cannot be read ({reason}); give the path of one, or {_names()}."
        ) from error
    file = os.path.abspath(path)
    return _of_text(policy_file.read(Path(file)), file)


def _names() -> str:
    return " or ".join(map(repr, NAMED))
