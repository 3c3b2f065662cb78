"""What a sweep found, as lines, as text and as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from sparsepass.coverage.store import Record, Sweep


def line(record: Record) -> str:
    """One record, for the progress of a run."""
    what = f"{record['arch']} {record['implementation']} {record['phase']}"
    if record.get("stage") == "absent":
        return f"{what}: not there"
    if "error" in record:
        return f"{what}: {record['error']}"
    verb = "recognized" if record["phase"] == "decode" else "rewritten"
    done = record["matched"] if record["phase"] == "decode" else record["rewritten"]
    parts = [f"{what}: {done} of {record['sites']} sites {verb}"]
    if not record.get("equal", True):
        parts.append(f"OUTPUT DIFFERS by {record['difference']:.1e}")
    parts += [f"{count} x {reason}" for reason, count in record["reasons"].items()]
    return "; ".join(parts)


def measured(records: Iterable[Record]) -> list[Record]:
    """Records of models that ran and have attention."""
    return [record for record in records if "error" not in record and record["sites"]]


def totals(records: Iterable[Record]) -> list[tuple[str, str, str, int, int, int, int, int]]:
    """Per kind, implementation and phase: models, sites, matched, rewritten (decode: 0), models that differ."""
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in measured(records):
        groups[record["kind"], record["implementation"], record["phase"]].append(record)
    return [
        (
            *key,
            len(group),
            sum(record["sites"] for record in group),
            sum(min(record["matched"], record["sites"]) for record in group),
            sum(min(record["rewritten"], record["sites"]) for record in group),
            sum(not record.get("equal", True) for record in group),
        )
        for key, group in groups.items()
    ]


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


def text(records: Sequence[Record]) -> str:
    """The totals, the reasons and the failures, for a terminal."""
    lines = [""]
    for kind, attn, phase, models, sites, matched, rewritten, differ in totals(records):
        share = f"{rewritten} rewritten ({rewritten / sites:.0%})" if phase != "decode" else "dense by design"
        wrong = f", {differ} models DIFFER from eager" if differ else ""
        lines.append(f"{kind}, {attn}, {phase}: {sites} sites of {models} models, {matched} matched, {share}{wrong}")
    listed = reasons(records)
    if listed:
        lines += ["", "Not rewritten:"]
        lines += [f"{count:5} x {reason} ({_some(archs)})" for reason, count, archs in listed]
    failed = failures(records)
    if failed:
        lines += ["", "Not measured:"]
        lines += [f"  {reason} ({_some(archs, 8)})" for reason, archs in failed]
    return "\n".join(lines)


def failures(records: Iterable[Record]) -> list[tuple[str, list[str]]]:
    """Why models did not build or run; an implementation that an architecture does not have is no failure."""
    where: dict[str, list[str]] = defaultdict(list)
    for record in records:
        if "error" in record and record.get("stage") != "absent" and record["arch"] not in where[record["error"]]:
            where[record["error"]].append(record["arch"])
    return sorted(where.items(), key=lambda item: -len(item[1]))


def markdown(records: Sequence[Record], sweep: Sweep) -> str:
    """The tables of the documentation."""
    held = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    rows = [f"{held}; {sweep.settings['length']} tokens, fp32, CPU.", ""]
    rows += ["| kind | attention | phase | models | sites | matched | rewritten | differ from eager |"]
    rows += ["|---|---|---|--:|--:|--:|--:|--:|"]
    for kind, attn, phase, models, sites, matched, rewritten, differ in totals(records):
        share = f"{rewritten} ({rewritten / sites:.1%})" if phase != "decode" else "-"
        rows.append(
            f"| {kind} | {attn} | {phase} | {models} | {sites} | {matched} ({matched / sites:.1%}) | {share} "
            f"| {differ} |"
        )
    rows += ["", "### Why sites are not rewritten", "", "| executions | architectures | reason | for instance |"]
    rows += ["|--:|--:|---|---|"]
    for reason, count, archs in reasons(records):
        rows.append(f"| {count} | {len(archs)} | {_cell(reason)} | {_some(archs)} |")
    differing = [record for record in measured(records) if not record.get("equal", True)]
    if differing:
        rows += ["", "### Outputs that differ from eager", "", "| model | largest difference |", "|---|--:|"]
        rows += [f"| {_name(record)} | {record['difference']:.1e} |" for record in differing]
    rows += ["", "### Architectures", "", _ARCHITECTURES, ""]
    rows += _by_architecture(records)
    failed = failures(records)
    if failed:
        rows += ["", "### Not measured", "", "| architectures | what went wrong |", "|---|---|"]
        rows += [f"| {', '.join(archs)} | {_cell(reason)} |" for reason, archs in failed]
    return "\n".join(rows) + "\n"


_ARCHITECTURES = (
    "Rewritten of counted sites; in decode, recognized of counted. `-`: the model has no such implementation or no "
    "attention there, or it did not run."
)


def _by_architecture(records: Sequence[Record]) -> list[str]:
    columns = list(dict.fromkeys((record["implementation"], record["phase"]) for record in records))
    columns.sort(key=lambda column: ("sdpa eager own".find(column[0]), "prefill padded decode".find(column[1])))
    rows = ["| architecture | kind | " + " | ".join(f"{attn} {phase}" for attn, phase in columns) + " |"]
    rows += ["|---|---|" + "--:|" * len(columns)]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = defaultdict(dict)
    for record in measured(records):
        done = record["matched"] if record["phase"] == "decode" else record["rewritten"]
        fused = f" (Inductor {record['fused']})" if "fused" in record else ""
        mark = "" if record.get("equal", True) else " *"
        cells[record["arch"], record["kind"]][record["implementation"], record["phase"]] = (
            f"{done}/{record['sites']}{mark}{fused}"
        )
    for (arch, kind), held in cells.items():
        rows.append(f"| {arch} | {kind} | " + " | ".join(held.get(column, "-") for column in columns) + " |")
    return rows


def _name(record: Record) -> str:
    return f"{record['arch']} ({record['kind']}, {record['implementation']}, {record['phase']})"


def _some(archs: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(archs[:most])
    return shown + (f" and {len(archs) - most} more" if len(archs) > most else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
