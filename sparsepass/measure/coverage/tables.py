"""What a sweep found, as lines, as text and as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sparsepass.measure.coverage.reasons import CAPTURED_OTHERWISE, HIDDEN_ROWS
from sparsepass.measure.coverage.store import Record, Sweep
from sparsepass.measure.coverage.totals import Total, failures, large, measured, reasons, totals


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


def text(records: Sequence[Record]) -> str:
    """The totals, the reasons and the failures, for a terminal."""
    lines = [""]
    for total in totals(records):
        done = f"{total.matched} recognized" if total.phase == "decode" else f"{total.rewritten} rewritten"
        small = f", {total.small} too small" if total.small else ""
        fused = f", Inductor alone {total.fused}" if total.fused is not None else ""
        wrong = f", {total.differ} models DIFFER from eager" if total.differ else ""
        lines.append(
            f"{total.kind}, {total.implementation}, {total.phase}: {total.sites} sites of {total.models} models{small}"
            f", {done} ({total.share:.1%}){fused}{wrong}"
        )
    listed = reasons(records)
    if listed:
        lines += ["", "Not rewritten:"]
        lines += [f"{count:5} x {reason} ({_some(archs)})" for reason, count, archs in listed]
    failed = failures(records)
    if failed:
        lines += ["", "Not measured:"]
        lines += [f"  {reason} ({_some(archs, 8)})" for reason, archs in failed]
    return "\n".join(lines)


def markdown(records: Sequence[Record], sweep: Sweep) -> str:
    """The tables of the documentation."""
    held = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    rows = [f"{held}; {sweep.settings['length']} tokens, fp32, CPU.", ""]
    rows += _total_rows(totals(records))
    for title, phases in (
        ("Why sites are not rewritten", ("prefill", "padded", "own")),
        ("Why sites are not recognized in decode", ("decode",)),
    ):
        listed = reasons(records, phases)
        if listed:
            rows += ["", f"### {title}", "", "| executions | architectures | reason | for instance |"]
            rows += ["|--:|--:|---|---|"]
            rows += [
                f"| {count} | {len(archs)} | {_cell(reason)} | {_some(archs)} |" for reason, count, archs in listed
            ]
    differing = [record for record in measured(records) if not record.get("equal", True)]
    if differing:
        rows += ["", "### Outputs that differ from eager", "", "| model | largest difference |", "|---|--:|"]
        rows += [f"| {_name(record)} | {record['difference']:.1e} |" for record in differing]
    for note, sentence in NOTES.items():
        noted = [record for record in measured(records) if record.get("note") == note]
        if noted:
            names = ", ".join(dict.fromkeys(record["arch"] for record in noted))
            rows += ["", f"{sentence}: {names}."]
    rows += ["", "### Architectures", "", _ARCHITECTURES, ""]
    rows += _by_architecture(records)
    failed = failures(records)
    if failed:
        rows += ["", "### Not measured", "", "| architectures | what went wrong |", "|---|---|"]
        rows += [f"| {', '.join(archs)} | {_cell(reason)} |" for reason, archs in failed]
    return "\n".join(rows) + "\n"


NOTES = {
    HIDDEN_ROWS: "Compared with eager whose rows that see nothing give zero",
    CAPTURED_OTHERWISE: 'Compared with `torch.compile(backend="eager")`, from which the uncompiled model differs',
}


def _total_rows(found: Sequence[Total]) -> list[str]:
    fused = any(total.fused is not None for total in found)
    rows = ["| kind | attention | phase | models | sites | too small | matched | rewritten |"]
    rows += ["|---|---|---|--:|--:|--:|--:|--:|"]
    rows[0] += " differ from eager |" + " Inductor's fuse_attention |" * fused
    rows[1] += "--:|" + "--:|" * fused
    for total in found:
        decode = total.phase == "decode"
        cells = [total.kind, total.implementation, total.phase, total.models, total.sites, total.small]
        cells.append(f"{total.matched} ({total.matched / total.sites:.1%})")
        cells.append("-" if decode else f"{total.rewritten} ({total.share:.1%})")
        cells.append(total.differ)
        if fused:
            cells.append("-" if total.fused is None else total.fused)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


_ARCHITECTURES = (
    "Rewritten of counted sites, those too small left out; in decode, recognized of counted. `-`: the model has no "
    "such implementation or no attention there, or it did not run. `*`: the output differs from eager's."
)


def _by_architecture(records: Sequence[Record]) -> list[str]:
    columns = list(dict.fromkeys((record["implementation"], record["phase"]) for record in records))
    columns.sort(key=lambda column: ("sdpa eager own".find(column[0]), "prefill padded decode".find(column[1])))
    rows = ["| architecture | kind | " + " | ".join(f"{attn} {phase}" for attn, phase in columns) + " |"]
    rows += ["|---|---|" + "--:|" * len(columns)]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = defaultdict(dict)
    for record in measured(records):
        done, sites = record["rewritten"], large(record)
        if record["phase"] == "decode":
            done, sites = record["matched"], record["sites"]
        fused = f" ({record['fused']})" if record.get("fused") is not None else ""
        mark = "" if record.get("equal", True) else " *"
        cells[record["arch"], record["kind"]][record["implementation"], record["phase"]] = (
            f"{done}/{sites}{mark}{fused}"
        )
    for (arch, kind), held in sorted(cells.items()):
        rows.append(f"| {arch} | {kind} | " + " | ".join(held.get(column, "-") for column in columns) + " |")
    return rows


def _name(record: Record) -> str:
    return f"{record['arch']} ({record['kind']}, {record['implementation']}, {record['phase']})"


def _some(archs: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(archs[:most])
    return shown + (f" and {len(archs) - most} more" if len(archs) > most else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
