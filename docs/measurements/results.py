"""Write the tables of docs/results.md, and the one in README.md, from the JSON files in this folder.

    python docs/measurements/results.py           # rewrites what stands between the markers of both
    python docs/measurements/results.py --check   # exit status 1 if that is not what the files say

The README's table is that of ``end_to_end_h200.json``. docs/results.md has one table per ``end_to_end*.json``,
``cpu_attention*.json``, ``hopper_kernel*.json``, ``error_time*.json`` and ``density_fit*.json`` (of the scripts of
these names), ``tuning_*.json`` (of ``sparsepass tune``) and ``bench_*.json`` (of ``sparsepass bench kernel`` and
``op``), under it the command that measured it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
RESULTS, README = ROOT / "docs" / "results.md", ROOT / "README.md"
HEADLINE = FOLDER / "end_to_end_h200.json"
BEGIN, END = "<!-- results: written by docs/measurements/results.py -->", "<!-- end of results -->"


def seconds(value: float) -> str:
    """A time of two significant digits, of three from 100 on."""
    number, unit = (value, "s") if value >= 1 else (value * 1e3, "ms")
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}" if number >= 1 else f"{number:.2g} {unit}"


def setting(text: str) -> str:
    """A budget's text with its numbers rounded to two significant digits."""
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2g}", text)


def length_text(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    if "error" in record:
        return "out of memory" if "out of memory" in record["error"] else "failed"
    return seconds(record["median_s"])


def ratio(by: dict[tuple[str, int], dict[str, Any]], length: int, other: str, variant: str) -> str:
    base, own = by.get((other, length), {}).get("median_s"), by.get((variant, length), {}).get("median_s")
    return f"{base / own:.1f}x" if base and own else "-"


def commands(given: str | list[str]) -> list[str]:
    """The commands that measured a file, as a block of code."""
    return ["```", *([given] if isinstance(given, str) else given), "```"]


def end_to_end(content: dict[str, Any]) -> list[str]:
    """A table of median times, variants down and lengths across; then sparsepass over the other two."""
    by = {(record["variant"], record["length"]): record for record in content["records"]}
    variants = list(dict.fromkeys(variant for variant, _ in by))
    lengths = sorted({length for _, length in by})
    versions = content.get("versions", {})
    stack = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions)
    names = {"eager": "eager", "inductor": "Inductor"}
    others = [variant for variant in names if variant in variants]
    lines = [f"Prefill, {content['hardware']}, {content['threads']} CPU threads, {stack}:", ""]
    lines.append("| | " + " | ".join(length_text(length) for length in lengths) + " |")
    lines.append("|---|" + "---|" * len(lengths))
    for variant in variants:
        name = names.get(variant, f"sparsepass, {variant}" if variant == "no hint" else f"sparsepass, `{variant}`")
        row = []
        for length in lengths:
            text = cell(by.get((variant, length)))
            if variant not in names and text and others:
                text += f" ({', '.join(ratio(by, length, other, variant) for other in others)})"
            row.append(text)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    if "note" in content:
        lines += ["", content["note"]]
    if others:
        lines += ["", f"In parentheses: times faster than {' and than '.join(names[other] for other in others)}."]
    return [*lines, "", *commands(content["command"])]


def hardware(machine: dict[str, Any]) -> str:
    """What it ran on, from the head of a file: a CPU is described by a table of its own."""
    device = machine.get("device", machine.get("hardware", "CPU"))
    if isinstance(device, dict):
        facts = [device.get("cpu", "CPU"), *device.get("features", []), f"{device.get('threads', '?')} threads"]
        if "load_average" in device:  # what else the machine was doing
            facts.append(f"load average {device['load_average']}")
        device = ", ".join(facts)
    versions = machine.get("versions", machine)
    return ", ".join([device, *(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)])


SPEEDUPS = ("speedup_over_dense", "speedup_median_of_pairs")


CPU_COMMAND = "python docs/measurements/cpu_attention.py target --out docs/measurements/cpu_attention.json"


def attention(content: dict[str, Any]) -> list[str]:
    """A table of the attention op alone, selection included, against the best dense kernel of the same run."""
    machine = content.get("environment", content)
    lines = [f"The attention op alone, selection included, {hardware(machine)}:", ""]
    lines += [
        "| tokens | dtype | head size | density | time | over the best dense kernel |",
        "|---|---|---|---|---|---|",
    ]
    for record in content["records"]:
        speedup = next((record[name] for name in SPEEDUPS if name in record), None)
        if speedup is None or record.get("what", "op") != "op":
            continue
        time = seconds(record.get("median_ms", record.get("sparse_ms", 0.0)) / 1e3)
        cells = (length_text(record["length"]), record["dtype"], record["head_dim"], record["density"], time)
        lines.append("| " + " | ".join(map(str, cells)) + f" | {speedup:.1f}x |")
    return [*lines, "", *commands(content.get("command", CPU_COMMAND))]


def kernel(content: dict[str, Any]) -> list[str]:
    """A table of attention over given lists, of ``sparsepass bench kernel``: sparse variants against dense and flex."""
    lines = [f"Attention over given block lists, {hardware(content['environment'])}:", ""]
    lines += [
        "| tokens | batch | heads | dtype, head size | lists | density | variant | time | TF/s | times faster than |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for record in content["records"]:
        if "median_ms" not in record or not record.get("correct"):
            continue
        faster = ", ".join(
            f"{name} {value:.2f}" for name, value in record.get("speedup", {}).items() if name != "dense"
        )
        cells = (
            length_text(record["length"]),
            record["batch"],
            f"{record['heads']}/{record['kv_heads']}",
            f"{record['dtype']}, {record['head_dim']}",
            record.get("lists", ""),
            f"{record['density_computed']:.3g}",
            record["variant"],
            f"{seconds(record['median_ms'] / 1e3)} ({record['min_ms']:.3g} to {record['max_ms']:.3g} ms)",
            f"{record.get('tflops', 0):.0f}",
            faster,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, "", *commands(content["environment"]["command"])]


def given_lists(content: dict[str, Any]) -> list[str]:
    """A table of attention over given lists, of ``hopper_kernel.py``: our kernels against FlexAttention and dense."""
    lines = [f"Attention over given block lists (no selection), {hardware(content)}:", ""]
    names = {"hopper": "hopper kernel", "triton": "plain Triton", "flex": "FlexAttention", "dense": "cuDNN, dense"}
    lines += [
        "| tokens | batch, heads, size, type | density | " + " | ".join(names.values()) + " | times faster than |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in content["records"]:
        found = {**record, "dense": record.get("cudnn", record.get("flash"))}
        shape = (
            f"{record.get('batch', 1)}, {record.get('heads', 32)}/{record.get('kv_heads', 8)}, "
            f"{record.get('head_dim', 128)}, {record.get('dtype', 'bf16')}"
        )
        density = f"{record['density']:.2f}" + (", uneven" if record.get("uneven") else "")
        density += f", blocks {record['kv_block']} wide" if "kv_block" in record else ""
        own = record["hopper"]["median_ms"]
        cells = [
            f"{seconds(r['median_ms'] / 1e3)}, {r['tflops']:.0f} TF/s" if (r := found.get(n)) else "" for n in names
        ]
        faster = [f"{n} {found[n]['median_ms'] / own:.1f}" for n in ("triton", "flex", "dense") if found.get(n)]
        lines.append(
            "| " + " | ".join((length_text(record["length"]), shape, density, *cells, ", ".join(faster))) + " |"
        )
    return [*lines, "", *commands(content["command"])]


def error_time(content: dict[str, Any]) -> list[str]:
    """A table of ``error_time.py``: others' attention at each of their settings, and ours at no greater error."""
    if not content["comparisons"]:
        return []
    lines = [
        f"Selection and attention on {content.get('inputs', 'structured')} inputs beside others, at no greater error, "
        f"{hardware(content['environment'])}:",
        "",
        "| tokens | other | its error | its time | over cuDNN | ours | error | time | over cuDNN | times faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in content["comparisons"]:
        cells = (
            length_text(found["length"]),
            f"{found['curve']}, {found['variant']}" + (" (default)" if found["default"] else ""),
            f"{found['error']:.2g}",
            seconds(found["median_ms"] / 1e3),
            f"{found['over_dense']:.1f}x",
            f"`{setting(found['ours'])}`",
            f"{found['our_error']:.2g}",
            seconds(found["our_ms"] / 1e3),
            f"{found['our_over_dense']:.1f}x",
            f"{found['times_faster']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *commands(content["environment"]["command"])]


def density_fit(content: dict[str, Any]) -> list[str]:
    """A table of ``density_fit.py``: the straight line of time against density, with intervals."""
    lines = [
        f"Time of attention over given lists against density, a straight line, {hardware(content['environment'])}:",
        "",
        "| tokens | kernel | time at density 1 | constant | the constant as density | largest residual |",
        "|---|---|---|---|---|---|",
    ]
    for line in content["lines"]:
        parts = []
        for name in ("slope_ms", "constant_ms"):
            low, high = line[f"{name}_interval"]
            parts.append(f"{line[name]:.3g} ms ({low:.3g} to {high:.3g})")
        last = (f"{line['constant_as_density']:.4f}", f"{line['largest_residual']:.1%}")
        lines.append("| " + " | ".join((length_text(line["length"]), line["variant"], *parts, *last)) + " |")
    level = f"In parentheses: intervals of {content['level']:.0%}."
    return [*lines, "", level, "", *commands(content["environment"]["command"])]


TUNED_LENGTHS, TUNED_DENSITIES = (8192, 32768, 131072), (0.05, 0.1, 0.2, 0.45, 1.0)


def tuned(content: dict[str, Any]) -> list[str]:
    """A table of the whole op, selection by pooled top-k included, out of what ``sparsepass tune`` measured."""
    lines = []
    for device in content["devices"]:
        lines += [
            "Selection (pooled top-k) and attention, over the faster of the dense kernels, "
            f"{hardware(device['environment'])}:",
            "",
            "| tokens | type, head size | dense | "
            + " | ".join(f"density {density}" for density in TUNED_DENSITIES)
            + " |",
            "|---|---|---|" + "---|" * len(TUNED_DENSITIES),
        ]
        by = {(r["length"], r["dtype"], r["head_dim"], r["density"]): r for r in device["records"]}
        for length in TUNED_LENGTHS:
            for dtype, head_dim in dict.fromkeys((r["dtype"], r["head_dim"]) for r in device["records"]):
                row = [by.get((length, dtype, head_dim, density)) for density in TUNED_DENSITIES]
                cells = [
                    f"{seconds(r['sparse_ms'] / 1e3)} ({r['dense_ms'] / r['sparse_ms']:.1f}x)" if r else "" for r in row
                ]
                if any(cells):
                    dense = next(r for r in row if r)
                    first = (length_text(length), f"{dtype}, {head_dim}", seconds(dense["dense_ms"] / 1e3))
                    lines.append("| " + " | ".join((*first, *cells)) + " |")
        lines += ["", *commands(device["environment"]["command"])]
    return lines


def op(content: dict[str, Any]) -> list[str]:
    """A table of selection and attention together, of ``sparsepass bench op``."""
    lines = [f"Selection and attention, {hardware(content['environment'])}:", ""]
    lines += ["| tokens | dtype, head size | method | density | error over dense | time | times faster than dense |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for record in content["records"]:
        if record.get("does") != "op" or "median_ms" not in record or not record.get("correct"):
            continue
        cells = (
            length_text(record["length"]),
            f"{record['dtype']}, {record['head_dim']}",
            f"`{record['method']}`",
            f"{record['density_computed']:.3g}" if "density_computed" in record else "",
            f"{record['error_over_dense']:.2g}",
            seconds(record["median_ms"] / 1e3),
            f"{record['speedup']['dense']:.2f}" if "dense" in record.get("speedup", {}) else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *commands(content["environment"]["command"])]


BENCH = {"kernel": kernel, "op": op}


SECTIONS: tuple[tuple[str, str, Callable[[dict[str, Any]], list[str]]], ...] = (
    ("How long does a whole prefill take?", "end_to_end*.json", end_to_end),
    ("How fast is attention over given lists?", "hopper_kernel*.json", given_lists),
    ("What does a smaller density save?", "density_fit*.json", density_fit),
    ("How fast are selection and attention together, on a GPU?", "tuning_*.json", tuned),
    ("How fast are they on a CPU?", "cpu_attention*.json", attention),
    ("How do they compare with other methods at the same error?", "error_time*.json", error_time),
)
"""Heading, files and table of each question."""


def tables(folder: Path = FOLDER) -> str:
    parts: list[str] = []
    for heading, pattern, table in SECTIONS:
        files = sorted(folder.glob(pattern))
        if files:
            parts += [f"## {heading}", ""]
        for path in files:
            parts += [*table(json.loads(path.read_text(encoding="utf-8"))), ""]
    benched = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("bench_*.json"))]
    if any(content.get("what") in BENCH for content in benched):
        parts += ["## What did `sparsepass bench` measure?", ""]
    for content in benched:
        if content.get("what") in BENCH:
            parts += [*BENCH[content["what"]](content), ""]
    return "\n".join(["", *parts])


def headline() -> str:
    """The table of the README."""
    return "\n".join(["", *end_to_end(json.loads(HEADLINE.read_text(encoding="utf-8"))), ""])


def updated(text: str, body: str) -> str:
    """``text`` with what stands between the markers replaced. Raises ``ValueError`` if they are not there."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text needs each of these lines once: {BEGIN} and {END}")
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + body + END + rest.split(END)[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    options = parser.parse_args(argv)
    old = 0
    for document, body in ((RESULTS, tables()), (README, headline())):
        before = document.read_text(encoding="utf-8")
        after = updated(before, body)
        if options.check and before != after:
            print(f"{document} is out of date; run python docs/measurements/results.py", file=sys.stderr)
            old = 1
        elif not options.check:
            document.write_text(after, encoding="utf-8")
    return old


if __name__ == "__main__":
    sys.exit(main())
