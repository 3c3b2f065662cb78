"""``sparsepass tune``: every point, one after the other, then the file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from sparsepass.errors import OptionError
from sparsepass.host.files import check_output
from sparsepass.kernels.runtime.tuned import force_tiles, parse_tile
from sparsepass.measure.bench import machine
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.options import Machine, check_paths
from sparsepass.measure.bench.progress import Reporter, reporter
from sparsepass.measure.bench.timing import Effort
from sparsepass.measure.bench.trial import device_of, first_line
from sparsepass.measure.tune import store
from sparsepass.measure.tune.grid import DENSITIES, QUICK_DENSITIES, Point, TilePoint, TuneOptions, points
from sparsepass.measure.tune.measure import measure_crossover, measure_tiles, text
from sparsepass.planning.crossover import provenance


def run(options: TuneOptions) -> int:
    """Measures what is not measured yet and writes the file. Returns the exit status: 1 if something is left to do."""
    check_paths(options)
    device = device_of(Machine(device=options.device, threads=options.threads))
    wanted = points(options, device)
    out = options.out or store.default_out()
    check_output(out, OptionError)
    if out.exists():
        store.held_devices(out)  # before minutes of work, not after
    environment = machine.describe(device)
    chosen = {"quick": options.quick, "threads": torch.get_num_threads()}
    # What an earlier part of a run must agree in to be gone on with.
    key = {"device": environment["device"], "versions": environment["versions"], **chosen}
    progress = store.Progress(out, key, options.fresh)
    effort = Effort(options.rounds or (2 if options.quick else 5), options.budget_ms or (15 if options.quick else 60))
    left = [point for point in wanted if str(point) not in progress.done]
    if options.dry_run:
        _list(wanted, left, effort, options, str(out), provenance(device))
        return 0
    began = time.monotonic()
    failed: list[str] = []
    finished = True
    with reporter(len(left)) as bars, torch.no_grad():
        if len(left) < len(wanted):
            bars.say(f"Going on with {progress.file}: {len(wanted) - len(left)} of {len(wanted)} points are there.")
        for point in left:
            if options.time_limit and time.monotonic() - began > options.time_limit:
                bars.say(f"The time limit of {options.time_limit:g} s was reached; run the command again to go on.")
                finished = False
                break
            bars.problem(str(point))
            try:
                progress.add(str(point), _measure(point, options, device, effort, progress, bars))
            except torch.OutOfMemoryError as error:
                failed.append(f"{point}: out of memory: {first_line(error)}")
                bars.say(failed[-1])
    force_tiles({})
    outcomes = {str(point): progress.done[str(point)] for point in wanted if str(point) in progress.done}
    if not finished or not outcomes:
        return 1
    environment["power_after"] = machine.power_state(device)
    settings = json.loads(json.dumps(asdict(options), default=str)) | {"failed": failed}
    content = store.merged(out, store.entry(environment, settings, outcomes))
    store.validate(content)
    store.write(out, store.to_text(content))
    progress.clear()
    print(f"Wrote {out}.")
    if out == store.default_out():
        print(provenance(device))
    else:
        print(f"To use it: export SPARSEPASS_TUNING={out}")
    return 0


def _measure(
    point: Point,
    options: TuneOptions,
    device: torch.device,
    effort: Effort,
    progress: store.Progress,
    bars: Reporter,
) -> dict[str, Any]:
    if isinstance(point, TilePoint):
        return measure_tiles(point, device, effort, options.quick, bars.say, anyway=options.only == "tiles")
    # The crossover is that of the tiles just chosen: the file in force is not asked while it is being replaced.
    tiles = [outcome["tile"] for outcome in progress.done.values() if "tile" in outcome]
    force_tiles({(one["dtype"], one["head_dim"]): parse_tile(one["tile"]) for one in tiles})
    outcome = measure_crossover(point, QUICK_DENSITIES if options.quick else DENSITIES, device, effort)
    bars.say(text(point, outcome))
    return outcome


def _list(wanted: list[Point], left: list[Point], effort: Effort, options: TuneOptions, out: str, now: str) -> None:
    print(now)
    print(f"Would write {out}, after {len(left)} points of {len(wanted)}:")
    for point in wanted:
        print(f"  {point}" + ("" if point in left else " (measured already)"))
    variants = len(QUICK_DENSITIES if options.quick else DENSITIES) + 2
    most = len(left) * variants * effort.rounds * effort.budget_ms * 2 / 1e3
    print(f"Some {most:.0f} s at most, and what compiling and calls longer than {effort.budget_ms:g} ms take.")


COMMAND = Command(
    "tune",
    TuneOptions,
    run,
    "Measure this device: kernel configurations, and from where on sparse beats dense. Interrupted, it goes on where "
    "it was.",
    "Example: sparsepass tune --quick",
)
