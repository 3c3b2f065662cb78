"""One variant on one problem: built, called once, checked; and the problems of a command, one after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsepass.errors import OptionError, SparsepassError, close_names
from sparsepass.measure.bench import machine
from sparsepass.measure.bench.baselines import default_dense, dense_call, dense_names
from sparsepass.measure.bench.check import Expected, Sample
from sparsepass.measure.bench.options import Machine, Shapes
from sparsepass.measure.bench.peers import Does, installed_peers
from sparsepass.measure.bench.problem import Problem, Shape, make_problem
from sparsepass.measure.bench.progress import Reporter
from sparsepass.measure.bench.result import Record, Result, add_speedups, fit_lines
from sparsepass.measure.bench.timing import Clock, Effort, Run, summary, time_variants


def device_of(options: Machine) -> torch.device:
    """The device asked for, made current; threads set. Raises ``OptionError`` if it is not there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    there = torch.cuda.is_available()
    name = ("cuda" if there else "cpu") if options.device == "auto" else options.device
    known = ["auto", "cpu", *(["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if there else [])]
    if name not in known:
        raise OptionError(f"--device {name!r} is not there. {close_names(name, known)}")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def shapes_of(options: Shapes, device: torch.device) -> list[Shape]:
    """Every combination of the sizes asked for, longest last. Raises ``OptionError``."""
    gpu = device.type == "cuda"
    heads = options.heads or (32 if gpu else 8)
    kv_heads = options.kv_heads or (max(1, heads // 4),)
    lengths = options.lengths or ((8192, 32768, 131072) if gpu else (1024, 4096))
    dims = options.head_dims or ((128,) if gpu else (64,))
    dtypes = options.dtypes or (("bf16",) if gpu else ("fp32",))
    for name, values in (
        ("--lengths", lengths),
        ("--batch", options.batch),
        ("--head-dims", dims),
        ("--heads", (heads,)),
    ):
        if min(values) < 1:
            raise OptionError(f"{name} is {min(values)}; accepted is 1 or more.")
    for one in kv_heads:
        if one < 1 or heads % one:
            raise OptionError(f"--kv-heads {one} does not divide the {heads} query heads; give a divisor of --heads.")
    return [
        Shape(batch, heads, kv, length, dim, dtype)
        for length, batch, kv, dim, dtype in itertools.product(sorted(lengths), options.batch, kv_heads, dims, dtypes)
    ]


@dataclass(slots=True)
class Bench:
    """The variants of one problem: records, and the calls to time by the record's place."""

    problem: Problem
    sample: Sample
    records: list[Record] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)

    def try_out(
        self, record: Record, build: Callable[[], Callable[[], Tensor]], expected: Expected, judge: bool = True
    ) -> Record:
        """Adds a variant. It is timed only if its output is right, or if it is not to be judged.

        Whatever a foreign implementation raises ends up in its record: the others are still measured.
        """
        record = {"variant": "", **self.problem.shape.fields(), **record}
        self.records.append(record)
        try:
            run = build()
            check = self.sample.compare(run(), expected)
        except OptionError as error:
            record["skipped"] = str(error)
        except torch.OutOfMemoryError as error:
            record["failed"] = f"out of memory: {first_line(error)}"
        except Exception as error:
            if isinstance(error, SparsepassError):
                record["skipped"] = str(error)
            else:
                record["failed"] = f"{type(error).__name__}: {first_line(error)}"
        else:
            record |= {"correct": check.correct or (not judge and check.error == check.error)}
            record |= {"error": _digits(check.error), "max_error": _digits(check.max_error)}
            if judge:
                record["allowed_error"] = _digits(check.allowed)
            if check.why and not record["correct"]:
                record["why"] = check.why
            if record["correct"]:
                self.runs[len(self.records) - 1] = run
        return record

    def add_dense(self, wanted: Sequence[str]) -> None:
        """The dense kernels among ``wanted`` (if empty, those worth it), and dense peers, checked against float64."""
        chosen = wanted or default_dense(self.problem)
        for name in dense_names(self.problem.device):
            if name in chosen:
                self.try_out(
                    {"variant": name, "does": "dense", "density": 1.0, "density_computed": 1.0},
                    lambda name=name: dense_call(name, self.problem),  # type: ignore[misc]
                    self.sample.dense(),
                )
        for peer in installed_peers():
            if peer.does == Does.DENSE:
                self.try_out(
                    {"variant": peer.name, "does": "dense", "density": 1.0, "density_computed": 1.0, "peer": True},
                    lambda peer=peer: peer.build(self.problem, None),  # type: ignore[misc]
                    self.sample.dense(),
                )

    def add_times(self, clock: Clock, effort: Effort, reporter: Reporter) -> None:
        """Times what is right and adds the times to the records."""
        reporter.steps("timing", len(self.runs) * effort.rounds)
        for index, rounds in time_variants(self.runs, clock, effort, reporter.advance).items():
            record = self.records[index]
            record |= summary(rounds)
            flops = record.get("flops", self.problem.shape.dense_flops if record.get("does") == "dense" else None)
            if flops:
                record["tflops"] = float(f"{flops / record['median_ms'] / 1e9:.4g}")


def measure(
    result: Result,
    options: Shapes,
    device: torch.device,
    reporter: Reporter,
    add_variants: Callable[[Bench, Reporter], None],
    finish: Callable[[list[Record]], None] = lambda records: None,
) -> Result:
    """Every problem of a command: variants added and checked, then timed; the file is written after each."""
    effort = Effort(options.rounds, options.budget_ms, options.seed)
    for shape in until(options.time_limit, shapes_of(options, device), result, reporter):
        reporter.problem(str(shape))
        _forget(device)
        before = machine.power_state(device)
        try:
            problem = make_problem(shape, device, options.seed, options.inputs)
            bench = Bench(problem, Sample(problem, options.seed))
            add_variants(bench, reporter)
            size = sum(x.numel() * x.element_size() for x in (problem.query, problem.query, problem.key, problem.value))
            clock = Clock(device, size)
            bench.add_times(clock, effort, reporter)
        except torch.OutOfMemoryError as error:
            result.notes.append(f"{shape}: out of memory: {first_line(error)}")
            reporter.say(result.notes[-1])
            continue
        result.environment.setdefault("problems", []).append(
            {"problem": str(shape), "flushed": clock.flushes, "before": before, "after": machine.power_state(device)}
        )
        made = bench.records
        finish(made)
        result.records += made
        del bench, problem, clock  # room for the next
        add_speedups(result.records)
        result.fits = fit_lines(result.records)
        if options.out is not None:
            result.save(options.out)
    return result


def until(seconds: float, shapes: Sequence[Shape], result: Result, reporter: Reporter) -> Iterator[Shape]:
    """The shapes that can be begun within the time limit; the result notes those left out."""
    start = time.monotonic()
    for index, shape in enumerate(shapes):
        if seconds and time.monotonic() - start > seconds:
            left = len(shapes) - index
            result.notes.append(
                f"The time limit of {seconds:g} s was reached: {left} of {len(shapes)} problems left out."
            )
            reporter.say(result.notes[-1])
            return
        yield shape


def _forget(device: torch.device) -> None:
    """No compiled FlexAttention of other shapes (Dynamo would give up specializing), no cached memory."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _digits(value: float) -> Any:
    return float(f"{value:.3g}") if value == value else None
