"""Measuring one point: the fastest tile of a head size, or dense against sparse at one shape."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sparsepass.errors import OptionError, SparsepassError
from sparsepass.kernels.spec import AttendTile, capability_of
from sparsepass.measure.bench import ours
from sparsepass.measure.bench.baselines import dense_call, dense_names
from sparsepass.measure.bench.check import Sample
from sparsepass.measure.bench.lists import make_lists
from sparsepass.measure.bench.machine import device_name
from sparsepass.measure.bench.problem import DTYPES, Shape, make_problem
from sparsepass.measure.bench.timing import Clock, Effort, Run, summary, time_variants
from sparsepass.measure.bench.trial import first_line
from sparsepass.measure.tune.grid import CrossoverPoint, TilePoint, candidates
from sparsepass.methods import PooledTopK
from sparsepass.planning.crossover_table import MARGIN

UNWORTHY = 1.02
"""Gain over the built-in tile under which that one stays: less could be noise."""
CASES = ((4096, 0.5), (16384, 0.2), (65536, 0.05))
QUICK_CASES = ((8192, 0.25),)
"""Tokens and density at which tiles are compared: a tile has to be good at each."""
HEADS, KV_HEADS = 32, 8
HOPELESS = 0.7
"""Dense over sparse time, at a first look, under which a density is not timed again, nor any higher one."""


def measure_crossover(
    point: CrossoverPoint, densities: tuple[float, ...], device: torch.device, effort: Effort
) -> dict[str, Any]:
    """``records`` of the crossover at one shape. Raises ``SparsepassError`` if a result is wrong."""
    shape = point.shape
    problem = make_problem(shape, device, effort.seed)
    sample = Sample(problem, effort.seed, pairs=3, rows=6)
    clock = Clock(device, 1 << 60)  # nothing is flushed: in a model the caches hold what the projections wrote
    dense: dict[str, Run] = {}
    for name in dense_names(device):
        try:
            call = dense_call(name, problem)
        except OptionError:
            continue
        check = sample.compare(call(), sample.dense())
        if check.correct:
            dense[name] = call
    if not dense:
        raise OptionError(f"No dense kernel here is right for {shape}.")
    looks = {name: _look(call, clock) for name, call in dense.items()}
    best = min(looks, key=lambda name: looks[name])
    runs: dict[Any, Run] = {name: dense[name] for name in looks if looks[name] < 1.3 * looks[best]}
    for density in densities:
        method = PooledTopK(density)
        method.prepare(device)
        run = partial(ours.operator, problem, method)
        check = sample.compare(run(), sample.expected(ours.select(problem, method)))
        if not check.correct:
            raise SparsepassError(f"The sparse result is wrong for {shape} at density {density}: {check.why}.")
        runs[density] = run
        if looks[best] / _look(run, clock) < HOPELESS:
            break
    times = {key: statistics.median(_flat(rounds)) for key, rounds in time_variants(runs, clock, effort).items()}
    fastest = min((key for key in times if isinstance(key, str)), key=lambda key: times[key])
    common = {"device": device_name(device), "device_type": device.type, "dtype": _long(shape.dtype)}
    return {
        "records": [
            {
                **common,
                "head_dim": shape.head_dim,
                "length": shape.length,
                "density": density,
                "sparse_ms": round(times[density], 5),
                "dense_ms": round(times[fastest], 5),
                "dense_kernel": fastest,
            }
            for density in runs
            if isinstance(density, float)
        ]
    }


def measure_tiles(
    point: TilePoint,
    device: torch.device,
    effort: Effort,
    quick: bool,
    say: Callable[[str], None],
    anyway: bool = False,
) -> dict[str, Any]:
    """The ``tile`` that is fastest over some shapes, and the times of all (``tried``). CUDA only.

    Nothing, where a kernel without tiles to choose is the one that runs, unless ``anyway``.
    """
    from sparsepass.kernels.attend.triton.launch import attend_launches
    from sparsepass.kernels.runtime.launch import run_all

    cases = QUICK_CASES if quick else CASES
    tiles = candidates(point.dtype, point.head_dim, capability_of(device))
    gains: dict[AttendTile, list[float]] = {tile: [] for tile in tiles}
    faults: dict[AttendTile, str] = {}
    for length, density in cases:
        shape = Shape(1, HEADS, KV_HEADS, length, point.head_dim, point.dtype)
        problem = make_problem(shape, device, effort.seed)
        lists = make_lists("random", problem, density, 128, effort.seed)
        if not anyway and ours.kernel_that_runs(problem, lists) not in ("", "triton"):
            say(f"{point}: left alone, another kernel runs here")
            return {}
        sample = Sample(problem, effort.seed, pairs=3, rows=6)
        expected = sample.expected(lists)
        runs: dict[AttendTile, Run] = {}
        for tile in tiles:
            if tile in faults:
                continue
            try:
                launches, out, _ = attend_launches(
                    problem.query,
                    problem.key,
                    problem.value,
                    lists.kv_num_blocks,
                    lists.kv_indices,
                    scale=shape.scale,
                    **problem.visible.arguments(),
                    q_block=128,
                    kv_block=128,
                    return_lse=False,
                    counter=None,
                    tile=tile,
                    implementation="triton",
                )
                run_all(launches, device)
                check = sample.compare(out, expected)
            except Exception as error:  # a tile that does not fit this GPU: the compiler's errors have no common base
                faults[tile] = f"{type(error).__name__}: {first_line(error)}"
                continue
            if not check.correct:
                faults[tile] = check.why
                continue
            runs[tile] = partial(run_all, launches, device)
        if tiles[0] not in runs:
            raise SparsepassError(f"The built-in tile fails for {shape}: {faults[tiles[0]]}")
        times = time_variants(runs, Clock(device, 1 << 60), effort)
        medians = {tile: summary(rounds)["median_ms"] for tile, rounds in times.items()}
        for tile, median in medians.items():
            gains[tile].append(medians[tiles[0]] / median)
    means = {tile: statistics.geometric_mean(each) for tile, each in gains.items() if len(each) == len(cases)}
    best = max(means, key=lambda tile: means[tile])
    if means[best] < UNWORTHY or min(gains[best]) < 1.0:
        best = tiles[0]  # no tile may make a case slower
    tried = [
        {"tile": tile._asdict(), "gains": [round(gain, 4) for gain in gains[tile]], "fault": faults.get(tile, "")}
        for tile in tiles
    ]
    say(
        f"{point}: {'built-in' if best is tiles[0] else f'{best}, {means[best]:.3f} times as fast as the built-in one'}"
    )
    chosen = {"dtype": _long(point.dtype), "head_dim": point.head_dim, "tile": best._asdict()}
    return {"tile": {**chosen, "gain": round(means[best], 4), "built_in": best == tiles[0]}, "tried": tried}


def text(point: CrossoverPoint, outcome: dict[str, Any]) -> str:
    """One line about a measured crossover point."""
    records = outcome["records"]
    ratios = ", ".join(f"{one['density']:g}: {one['dense_ms'] / one['sparse_ms']:.2f}" for one in records)
    won = [one["density"] for one in records if one["dense_ms"] / one["sparse_ms"] >= MARGIN]
    verdict = f"sparse to {max(won):g}" if won else "dense"
    return f"{point}: dense {records[0]['dense_ms']:.4g} ms ({records[0]['dense_kernel']}); {ratios}; {verdict}"


def _look(run: Run, clock: Clock) -> float:
    """A first time, of the better of two calls."""
    clock.once(run)
    return min(clock.repeated(run, 2))


def _flat(rounds: list[list[float]]) -> list[float]:
    return [time for taken in rounds for time in taken]


def _long(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
