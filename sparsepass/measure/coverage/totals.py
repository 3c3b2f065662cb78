"""Sums over the records of a sweep, the reasons of what was not rewritten, and what did not run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsepass.measure.coverage.store import Record


def measured(records: Iterable[Record]) -> list[Record]:
    """Records of models that ran and have attention."""
    return [record for record in records if "error" not in record and record["sites"]]


@dataclass(frozen=True)
class Total:
    """Sums over the models of a kind, an implementation and a phase; executions of attention, if not said else."""

    kind: str
    implementation: str
    phase: str
    models: int
    sites: int
    small: int
    """Of one query or one block of keys: nothing can be left out there."""
    matched: int
    rewritten: int
    differ: int
    """Models whose output differs from eager's."""
    fused: int | None
    """By Inductor's own pass; None where not all were asked."""

    @property
    def share(self) -> float:
        """Rewritten of the sites where something can be left out; recognized of all in decode."""
        if self.phase == "decode":
            return self.matched / self.sites
        return self.rewritten / (self.sites - self.small) if self.sites > self.small else 1.0


def large(record: Record) -> int:
    """Sites of a record where something can be left out."""
    return int(record["sites"] - record.get("small", 0))


def totals(records: Iterable[Record]) -> list[Total]:
    """Per kind, implementation and phase, in that order; then of all prefills of an implementation together."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in measured(records):
        groups[record["kind"], record["implementation"], record["phase"]].append(record)
    order = sorted(groups, key=lambda key: tuple(map(_place, key)))
    found = [_total(key, groups[key]) for key in order]
    for attn in dict.fromkeys(attn for _, attn, _ in order):
        several = [key for key in order if key[1] == attn and key[2] in ("prefill", "padded")]
        if len(several) > 1:
            found.append(_total(("all", attn, "prefill, padded"), [one for key in several for one in groups[key]]))
    return found


def _total(key: tuple[str, str, str], group: Sequence[Record]) -> Total:
    fused = [record.get("fused") for record in group]
    return Total(
        *key,
        models=len({(record["kind"], record["arch"]) for record in group}),
        sites=sum(record["sites"] for record in group),
        small=sum(record.get("small", 0) for record in group),
        matched=sum(min(record["matched"], record["sites"]) for record in group),
        rewritten=sum(min(record["rewritten"], large(record)) for record in group),
        differ=sum(not record.get("equal", True) for record in group),
        fused=None if None in fused else sum(count for count in fused if count is not None),
    )


_ORDER = ("sdpa", "eager", "own", "prefill", "padded", "decode", "decoder", "encoder", "encoder_decoder", "vision")


def _place(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def reasons(records: Iterable[Record], phases: Sequence[str] = ()) -> list[tuple[str, int, list[str]]]:
    """Reasons of what is not rewritten, most frequent first: executions, and the architectures."""
    counts: Counter[str] = Counter()
    where: dict[str, list[str]] = defaultdict(list)
    for record in measured(records):
        if phases and record["phase"] not in phases:
            continue
        for reason, count in record["reasons"].items():
            counts[reason] += count
            if record["arch"] not in where[reason]:
                where[reason].append(record["arch"])
    return [(reason, count, where[reason]) for reason, count in counts.most_common()]


def failures(records: Iterable[Record]) -> list[tuple[str, list[str]]]:
    """Why models did not build or run; an implementation that an architecture does not have is no failure."""
    where: dict[str, list[str]] = defaultdict(list)
    for record in records:
        if "error" in record and record.get("stage") != "absent" and record["arch"] not in where[record["error"]]:
            where[record["error"]].append(record["arch"])
    return sorted(where.items(), key=lambda item: -len(item[1]))
