"""Runs every CUDA kernel under compute-sanitizer, on small problems, and says what each tool said.

    PYTHONPATH=. python docs/measurements/sanitize.py --out docs/measurements/sanitize_h200.json --logs logs
    PYTHONPATH=. python docs/measurements/sanitize.py --part hopper        # one part of the work, without a tool

First each part runs without a tool, so that its kernels are compiled; then each part under each tool, all at once, each
in a process of its own and under a timeout. For memcheck every tensor is an allocation of its own, so that an access
just past its end is seen. Kernels that no part launched are listed: every ``Launch`` of the sources has to run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.runtime import launch
from sparsepass.kernels.types import BlockLists, Visible
from sparsepass.measure.bench import machine
from sparsepass.methods import (
    AShape,
    FlexPrefill,
    Full,
    Method,
    PooledTopK,
    Threshold,
    TopP,
    VerticalSlash,
    XAttention,
)
from sparsepass.testing import Case

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    "racecheck": {},
    "synccheck": {},
    "initcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
}
"""Environment of each tool."""

PLAIN = Case(
    batch=2, kv_heads=2, group=2, q_len=330, kv_len=330, head_dim=128, v_head_dim=128, dtype=torch.bfloat16,
    q_block=128, kv_block=128, left=-1, right=0, offset=0, scale=0.1, layout="bshd", segments="none", lists="random",
    shared_lists="none", bad=0, seed=3,
)  # fmt: skip
SIZES: tuple[tuple[torch.dtype, int, int], ...] = (
    (torch.bfloat16, 128, 128),
    (torch.float16, 64, 64),
    (torch.bfloat16, 256, 128),
    (torch.float32, 80, 64),
)
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"segments": "packed_pad", "lists": "empty_rows"},
    {"left": 150, "segments": "left_pad"},
)
MANY = {"kv_heads": 4, "q_len": 1300, "kv_len": 1300, "lists": "uneven"}
"""More tiles than a Hopper GPU has multiprocessors, of very different lengths."""


def sized(dtype: torch.dtype, dim: int, block: int, **changes: Any) -> Case:
    same = {"dtype": dtype, "head_dim": dim, "v_head_dim": dim, "q_block": block, "kv_block": block}
    return replace(PLAIN, **{**same, **changes})


def visible_of(mask: dict[str, Any]) -> Visible:
    return Visible(mask["left"], mask["right"], mask["offset"], mask["q_segments"], mask["kv_segments"])


def attend(case: Case, implementation: str) -> None:
    """Attention over a case's lists; finite inputs have to give finite outputs."""
    inputs = case.tensors("cuda")
    lists = BlockLists(inputs.kv_num_blocks, inputs.kv_indices, case.q_block, case.kv_block)
    options: dict[str, Any] = {"scale": case.scale, "visible": visible_of(inputs.mask), "return_lse": True}
    counter = torch.zeros(3, dtype=torch.int64, device="cuda")
    qkv = (inputs.q, inputs.k, inputs.v)
    out, _ = block_sparse_attention(*qkv, lists, **options, counter=counter, implementation=implementation)
    if not case.bad and not bool(out.isfinite().all()):
        raise RuntimeError(f"the output is not finite: {case}")


def select(case: Case, method: Method, *, attention: bool = False, dialed: bool = False) -> None:
    """A method's selection, twice where it takes a tensor of dials, and attention over it."""
    inputs = case.tensors("cuda")
    visible = visible_of(inputs.mask)
    dial = None
    if dialed and type(method).dial is not None:
        dial = torch.tensor(method.dials(case.heads), device="cuda")[None].expand(case.batch, -1).contiguous()
    counter = torch.zeros(3, dtype=torch.int64, device="cuda")
    lists = method.select(inputs.q, inputs.k, scale=case.scale, visible=visible, counter=counter, dial=dial)
    if attention:
        block_sparse_attention(inputs.q, inputs.k, inputs.v, lists, scale=case.scale, visible=visible, counter=counter)


def plain_attention() -> None:
    for size in SIZES:
        for mask in MASKS[:2]:
            attend(sized(*size, **mask), "triton")
    attend(sized(*SIZES[0], **MASKS[2]), "triton")
    attend(sized(*SIZES[0], bad=3), "triton")
    attend(sized(*SIZES[0], bad=3, segments="packed_pad"), "triton")


def hopper_attention() -> None:
    for size in SIZES[:3]:
        changes = {"q_block": 128, "kv_block": 128}
        for mask in MASKS:
            attend(sized(*size, **{**mask, **changes}), "hopper")
        attend(sized(*size, **{**MANY, **changes}), "hopper")
    attend(sized(*SIZES[0], bad=3), "hopper")


def selection() -> None:
    methods: tuple[Method, ...] = (
        Full(),
        AShape(window=100),
        PooledTopK(0.4),
        PooledTopK(0.4, block=64, self_similarity=0.1),
        Threshold(last=1, self_similarity=0.1),
        TopP(0.7, self_similarity=0.1),
        TopP(0.7, score="mass", block=64),
        XAttention(0.7),
        XAttention(0.7, stride=8, block=64),
    )
    for method in methods:
        for size, mask in ((SIZES[0], MASKS[0]), (SIZES[0], MASKS[1]), (SIZES[3], MASKS[2])):
            select(sized(*size, **mask), method, dialed=bool(mask))


def columns() -> None:
    methods: tuple[Method, ...] = (
        VerticalSlash(0.5, block=64),
        FlexPrefill(0.8, tau=0.0, min_budget=16, block=64),
        FlexPrefill(0.8, tau=1.0, min_budget=16, most=0.8, block=64),
    )
    long = {"q_len": 900, "kv_len": 900}
    for method in methods:
        for size, mask in ((SIZES[0], MASKS[0]), (SIZES[0], MASKS[1]), (SIZES[3], MASKS[2])):
            select(sized(*size, **{**mask, **long}), method, attention=True, dialed=bool(mask))
    select(sized(*SIZES[0], **long, bad=3), VerticalSlash(0.5, block=64), attention=True)


PARTS: dict[str, Callable[[], None]] = {
    "attention": plain_attention,
    "hopper": hopper_attention,
    "selection": selection,
    "columns": columns,
}
RAN = "kernels launched: "


def run_part(name: str) -> None:
    """The part's work, in this process; prints the kernels that it launched."""
    launched: set[str] = set()
    run = launch.Launch.run

    def recorded(self: launch.Launch) -> Any:
        launched.add(self.kernel.__name__)
        return run(self)

    launch.Launch.run = recorded  # type: ignore[method-assign]
    PARTS[name]()
    torch.cuda.synchronize()
    print(RAN + " ".join(sorted(launched)), flush=True)


def every_kernel() -> set[str]:
    """The kernels that the sources launch."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    return {name for text in sources for name in re.findall(r"\bLaunch\(\s*([A-Za-z_]\w*),", text)}


def start(part: str, log: Path, tool: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part]
    if tool is not None:
        checked = ["--tool", tool, "--target-processes", "all", "--show-backtrace", "no", "--print-limit", "1000"]
        more = ["--racecheck-report", "all"] if tool == "racecheck" else []
        command = [str(shutil.which("compute-sanitizer")), *checked, *more, *command]
    environment = {**os.environ, **(TOOLS[tool] if tool else {}), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        own = {"env": environment, "cwd": ROOT, "start_new_session": True}
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **own)


def finish(processes: dict[tuple[str, str], subprocess.Popen[bytes]], seconds: float) -> dict[tuple[str, str], Any]:
    """Exit codes, once all have ended; those that run past the time are killed: ``None``."""
    end = time.monotonic() + seconds
    codes: dict[tuple[str, str], Any] = {}
    for key, process in processes.items():
        try:
            codes[key] = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it runs
            process.wait()
            codes[key] = None
    return codes


def judged(text: str) -> dict[str, Any]:
    """What a tool's log says: its summary, and its distinct findings with the kernel and how often."""
    said = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    summary = [line for line in said if "SUMMARY" in line]
    found: Counter[str] = Counter()
    kind = ""
    for line in said:
        at = re.match(r"at (\w+)", line)
        if re.match(r"(Invalid|Error|Warning|Uninitialized|Barrier|Misaligned|Program hit|Host API)", line):
            # Offsets and addresses differ from one occurrence to the next.
            kind = re.sub(r"\+?0x[0-9a-f]+", "", line)
            if "Race reported" in line or "hazard" in line.lower():
                found[kind] += 1
                kind = ""
        elif at and kind:
            found[f"{kind} at {at[1]}"] += 1
            kind = ""
    counts = [int(n) for line in summary for n in re.findall(r"(\d+) (?:error|hazard|warning)", line)]
    return {"summary": summary, "clean": bool(summary) and not any(counts), "findings": dict(found.most_common(40))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), help="run this part in this process, without a tool")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=["memcheck", "racecheck"])
    parser.add_argument("--logs", type=Path, default=Path("sanitizer_logs"))
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds for all tools together")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.part:
        run_part(options.part)
        return
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    options.logs.mkdir(parents=True, exist_ok=True)

    begin = time.monotonic()
    logs = {part: options.logs / f"{part}.log" for part in options.parts}
    plain = finish({("", part): start(part, log, None) for part, log in logs.items()}, options.timeout)
    texts = {part: log.read_text(errors="replace") for part, log in logs.items()}
    launched = {name for text in texts.values() for line in re.findall(f"{RAN}(.*)", text) for name in line.split()}
    missed = sorted(every_kernel() - launched)
    print(f"without a tool, {time.monotonic() - begin:.0f} s: exit codes {[plain['', part] for part in options.parts]}")
    print(f"{len(launched)} kernels launched; not launched: {', '.join(missed) or 'none'}", flush=True)

    checked = {(tool, part): options.logs / f"{tool}_{part}.log" for tool in options.tools for part in options.parts}
    codes = finish({(tool, part): start(part, log, tool) for (tool, part), log in checked.items()}, options.timeout)
    records = []
    for (tool, part), log in checked.items():
        text = log.read_text(errors="replace")
        record = {"tool": tool, "part": part, "exit_code": codes[tool, part], "done": RAN in text, **judged(text)}
        records.append(record)
    head = machine.describe(torch.device("cuda", 0))
    version = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=False).stdout
    content = {"environment": head, "tool": version.strip().splitlines()[-1:], "not_launched": missed}
    if options.out:
        options.out.write_text(json.dumps({**content, "records": records}, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s in all")
    for record in records:
        ended = "" if record["done"] else f"  DID NOT END (exit code {record['exit_code']}; None: out of time)"
        print(f"{record['tool']:10} {record['part']:10} {'; '.join(record['summary']) or 'no summary'}{ended}")
        for finding, count in list(record["findings"].items())[:8]:
            print(f"    {count} x {finding[:180]}")
    good = not missed and all(record["clean"] and record["done"] for record in records)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
