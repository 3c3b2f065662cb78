"""``bench kernel``: attention over given block lists."""

from __future__ import annotations

from functools import partial

import torch

from sparsepass.errors import OptionError, close_names
from sparsepass.measure.bench import ours
from sparsepass.measure.bench.baselines import FLEX, default_dense, dense_names, flex_call
from sparsepass.measure.bench.check import invalid_lists
from sparsepass.measure.bench.lists import make_lists
from sparsepass.measure.bench.options import KernelOptions
from sparsepass.measure.bench.peers import Does, installed_peers, load_peers
from sparsepass.measure.bench.problem import listed_blocks, listed_flops, visible_blocks
from sparsepass.measure.bench.progress import Reporter
from sparsepass.measure.bench.result import Record, Result
from sparsepass.measure.bench.timing import graphed
from sparsepass.measure.bench.trial import Bench, measure

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


def run(options: KernelOptions, device: torch.device, result: Result, reporter: Reporter) -> Result:
    """Measures. Raises ``OptionError`` for options that do not fit together."""
    if options.block not in (64, 128):
        raise OptionError(f"--block is {options.block}; accepted are 64 and 128.")
    for density in options.densities:
        if not 0 < density <= 1:
            raise OptionError(f"--densities holds {density}; accepted is a share above 0 and at most 1.")
    check_baselines(options.baselines, (*dense_names(device), *FLEX))
    for name in options.implementations:
        ours.check_implementation(name, device)
    if options.peer_file is not None:
        load_peers(options.peer_file)
    return measure(result, options, device, reporter, partial(_add_variants, options))


def check_baselines(given: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises ``OptionError`` for a name that is no baseline."""
    for name in given:
        if name not in known and name != "none":
            raise OptionError(f"--baselines {name!r} is not known. {close_names(name, ('none', *known))}")


def _add_variants(options: KernelOptions, bench: Bench, reporter: Reporter) -> None:
    problem, shape = bench.problem, bench.problem.shape
    densities = options.densities or DENSITIES
    cases = [(kind, density) for kind in options.lists for density in ((1.0,) if kind == "full" else densities)]
    baselines = options.baselines or (*default_dense(problem), "flex")
    reporter.steps("checking", len(cases))
    bench.add_dense(baselines)
    visible = visible_blocks(shape, options.block)
    for kind, density in cases:
        lists = make_lists(kind, problem, density, options.block, options.seed)
        fault = invalid_lists(lists, problem)
        if fault:
            raise OptionError(f"The {kind} lists at density {density} are wrong: {fault}.")
        flops, needed = listed_flops(shape, lists)
        expected = bench.sample.expected(lists)
        counts = lists.kv_num_blocks
        common: Record = {
            "does": "lists",
            "lists": kind,
            "block": options.block,
            "density": density,
            "density_computed": round(listed_blocks(lists, shape.batch, shape.heads) / visible, 5),
            "counts": [int(counts.min()), int(counts.max())],
            "flops": flops,
            "flops_visible": needed,
        }
        chosen = ours.kernel_that_runs(problem, lists)
        others = tuple(name for name in ours.implementations(problem.device) if name != chosen)
        for name in options.implementations or others:
            variant = "sparsepass" if name == ours.AUTO else f"sparsepass {name}"
            call = partial(ours.attend, problem, lists, name)
            record = bench.try_out({"variant": variant, **common}, lambda call=call: call, expected)  # type: ignore[misc]
            if chosen:
                record["kernel"] = chosen if name == ours.AUTO else name
            if options.graphs and problem.device.type == "cuda" and record.get("correct"):
                bench.try_out(
                    {"variant": f"{variant}, graph", **common},
                    lambda call=call: graphed(call),  # type: ignore[misc, arg-type, return-value]
                    expected,
                )
        for name in FLEX:
            if name in baselines:
                bench.try_out({"variant": name, **common}, partial(flex_call, name, problem, lists), expected)
        for peer in installed_peers():
            if peer.does == Does.LISTS:
                entry = {"variant": peer.name, "peer": True, **common}
                bench.try_out(entry, partial(peer.build, problem, lists), expected)
        reporter.advance()
