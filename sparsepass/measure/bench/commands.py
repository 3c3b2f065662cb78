"""The commands of ``sparsepass bench``, whichever command line they were given on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsepass.measure.bench import kernel, machine, model, op
from sparsepass.measure.bench.arguments import Command
from sparsepass.measure.bench.options import (
    KernelOptions,
    ModelOptions,
    OpOptions,
    SelectionOptions,
    Shapes,
    check_paths,
)
from sparsepass.measure.bench.progress import Reporter, reporter
from sparsepass.measure.bench.result import Result
from sparsepass.measure.bench.tables import show
from sparsepass.measure.bench.trial import device_of, shapes_of

Measure = Callable[[Any, torch.device, Result, Reporter], Result]


@dataclass(frozen=True, slots=True)
class _Run:
    """Runs one command: measures, prints, writes, plots. Returns the exit status: 1 if any result was wrong."""

    what: str
    measure: Measure

    def __call__(self, options: Any) -> int:
        check_paths(options)
        device = device_of(options)
        problems = (
            len(shapes_of(options, device)) if isinstance(options, Shapes) else len(model.lengths_of(options, device))
        )
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
        result = Result(self.what, machine.describe(device), settings)
        with reporter(problems, quiet=options.as_json) as bars, torch.no_grad():
            self.measure(options, device, result, bars)
        result.environment["power_after"] = machine.power_state(device)
        if options.as_json:
            sys.stdout.write(result.to_text())
            sys.stdout.flush()
        else:
            show(result)
        if options.out is not None:
            result.save(options.out)
        if options.plots is not None:
            from sparsepass.measure.bench.plots import draw

            for picture in draw(result, options.plots):
                print(f"Plot: {picture}", file=sys.stderr)
        return int(any(record.get("correct") is False for record in result.records))


COMMANDS = (
    Command(
        "kernel",
        KernelOptions,
        _Run("kernel", kernel.run),
        "Attention over given block lists, against dense kernels and FlexAttention with the same blocks.",
        "Example: sparsepass bench kernel --lengths 32K 128K --densities 0.05 0.1 1 --out kernel.json",
    ),
    Command(
        "selection",
        SelectionOptions,
        _Run("selection", op.run_selection),
        "What each method's selection takes, beside the attention over what it selects.",
        "Example: sparsepass bench selection --methods pooled_topk=0.1 --lengths 8K 128K",
    ),
    Command(
        "op",
        OpOptions,
        _Run("op", op.run_op),
        "Selection and attention together against dense kernels, with the error that leaving blocks out makes.",
        "Example: sparsepass bench op --inputs structured --lengths 128K --plots plots",
    ),
    Command(
        "model",
        ModelOptions,
        _Run("model", model.run),
        "Prefill of a whole model: eager, Inductor, and sparsepass under task hints.",
        "Example: sparsepass bench model --preset small --lengths 4K 16K",
    ),
)
