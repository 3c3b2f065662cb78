"""Train the testbed: a small Llama on the token-level tasks, from scratch or from a checkpoint, for some minutes.

    python -m examples.testbed.train --size small --minutes 8 --out runs/first
    python -m examples.testbed.train --size small --minutes 8 --resume runs/first --out runs/second --cooldown 0.5

Prints a line per evaluation and writes everything to ``OUT/log.jsonl``. On CUDA the step is compiled and recorded as a
CUDA graph per length; where that fails it says so and goes on without.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.testbed import checkpoint, evaluate
from examples.testbed.batches import PARTS
from examples.testbed.curriculum import Curriculum
from examples.testbed.network import Network, new_weights
from examples.testbed.optimizer import Optimizer
from examples.testbed.step import Pool, Step
from sparsepass.measure.testbed.sizes import SIZES, TestbedSize

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BACKENDS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "any": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def part_weight(text: str) -> tuple[int, float]:
    """``aggregation=2`` as the part's number and its weight."""
    name, _, weight = text.partition("=")
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"no part {name!r}; accepted are {', '.join(PARTS)}")
    return PARTS.index(name), float(weight)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate; default %(default)s")
    parser.add_argument("--warmup", type=int, default=300, help="steps, also after resuming; default %(default)s")
    parser.add_argument("--cooldown", type=float, default=0.0, help="last share of this run in which the rate falls")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this run, all included; default %(default)s")
    parser.add_argument("--steps", type=int, default=0, help="of this run; default as many as the minutes allow")
    parser.add_argument("--tokens", type=int, default=32768, help="per step, at least 4 sequences; default %(default)s")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS[:-1], help="the curriculum's")
    parser.add_argument("--mix", type=float, nargs="+", default=(), help="how often each length, in place of it")
    parser.add_argument("--shares", type=float, nargs=4, default=(1.0, 1.0, 1.0, 1.0), help="of sequences, per task")
    parser.add_argument("--weigh", type=part_weight, nargs="+", default=(), help="PART=WEIGHT in the loss; others 1")
    parser.add_argument("--patience", type=int, default=4000, help="steps that a slow task holds the others back")
    parser.add_argument("--every", type=int, default=100, help="steps between looks at accuracy; default %(default)s")
    parser.add_argument("--evaluate", type=float, default=75.0, help="seconds between evaluations; default %(default)s")
    parser.add_argument("--budget", type=int, default=2**18, help="tokens per evaluated class and length")
    parser.add_argument("--attention", choices=BACKENDS, default="flash", help="SDPA kernel on CUDA")
    parser.add_argument("--no-graph", action="store_true", help="compile, but record no CUDA graphs")
    parser.add_argument("--eager", action="store_true", help="neither compile nor record CUDA graphs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and log.jsonl")
    parser.add_argument("--state", choices=("light", "full"), default="light", help="what the checkpoint holds")
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size, for a try on a small machine")
    parser.add_argument("--layers", type=int, default=6, help="with --hidden; default %(default)s")
    options = parser.parse_args(given)
    if options.mix and len(options.mix) != len(options.lengths):
        parser.error(f"--mix has {len(options.mix)} numbers for {len(options.lengths)} --lengths; give one for each")
    return options


class Run:
    """A training run: the model, its optimizer, the pools of batches and the log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cuda = self.device.type == "cuda"
        size = SIZES[options.size]
        if options.hidden:
            heads = max(2, options.hidden // 64)
            size = TestbedSize(options.hidden, 2 * options.hidden, options.layers, heads, heads // 2)
        self.plain = self.network = Network(size)
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.curriculum = Curriculum(tuple(options.lengths), options.patience, options.seed, tuple(options.mix))
        self.steps, self.seconds_before = 0, 0.0
        weights = new_weights(size, torch.Generator().manual_seed(options.seed))
        state: dict[str, torch.Tensor] = {}
        meta: dict[str, Any] = {}
        if options.resume:
            read, state, meta = checkpoint.read(options.resume)
            weights = {name: read[name] for name in weights}  # the order counts for the last bit of sums over them
        self.weights = {name: weight.to(self.device).requires_grad_() for name, weight in weights.items()}
        self.optimizer = Optimizer(self.weights, options.optimizer)
        self.pools = {length: self._pool(length) for length in options.lengths}
        self.sums = torch.zeros(len(options.lengths), len(PARTS), 3, dtype=torch.float64, device=self.device)
        weigh = torch.ones(len(PARTS))
        for part, weight in options.weigh:
            weigh[part] = weight
        self.weigh = (weigh / weigh.sum()).to(self.device)
        self.stepping: dict[int, Step] = {}
        self.memory: Any = None  # that CUDA graphs share
        self.warm_from = 0
        options.out.mkdir(parents=True, exist_ok=True)
        self.log_file = (options.out / "log.jsonl").open("w")
        if meta:
            self._restore(state, meta)
        self.first = self.steps

    def _pool(self, length: int) -> Pool:
        rows = max(4, self.options.tokens // length // 4 * 4)
        ahead = max(4, min(64, 2**21 // (rows * length))) if self.cuda else 4
        seed = 1000 * (self.options.seed + 1) + length
        generator = torch.Generator(self.device).manual_seed(seed)
        return Pool(length, rows, ahead, generator, tuple(self.options.shares))

    def _restore(self, state: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        self.steps, self.seconds_before = meta["steps"], meta["seconds"]
        self.curriculum.restore(meta["curriculum"])
        self.warm_from = meta["warm_from"] if state else self.steps
        if state:
            self.optimizer.restore({name: tensor for name, tensor in state.items() if not name.startswith("pool ")})
        for name, tensor in state.items():
            pool = self.pools.get(int(name[5:])) if name.startswith("pool ") else None
            if pool is not None:
                pool.before, pool.cursor = tensor, meta["cursors"][str(pool.length)]
        if not state:  # the same seeds would give the same samples again
            for length, pool in self.pools.items():
                pool.generator.manual_seed(1000 * (self.options.seed + 1) + length + 1_000_003 * self.steps)
                pool.before = pool.generator.get_state()

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def say(self, kind: str, **content: Any) -> None:
        line = {"kind": kind, "step": self.steps, "level": self.curriculum.longest, **content}
        self.log_file.write(json.dumps(line) + "\n")
        self.log_file.flush()

    def rate(self) -> float:
        """Linear warm-up, then constant, then in the cool-down linear to a twentieth."""
        done = self.elapsed() / (60 * self.options.minutes) if not self.options.steps else 0.0
        if self.options.steps:
            done = (self.steps - self.first) / self.options.steps
        warm = min(1.0, (self.steps - self.warm_from + 1) / max(1, self.options.warmup))
        cool = self.options.cooldown
        return float(self.options.rate * warm * (max(0.05, (1.0 - done) / cool) if cool and done > 1.0 - cool else 1.0))

    def stepper(self, length: int) -> Step:
        """The step at this length, compiled and recorded at its first use."""
        if length in self.stepping:
            return self.stepping[length]
        sums = self.sums[self.options.lengths.index(length)]
        fast = self.cuda and not self.options.eager
        if fast and self.network is self.plain:
            self.network = self.plain.compiled()
        step = Step(self.network, self.weights, self.optimizer, self.pools[length], sums, self.dtype, self.weigh)
        self.stepping[length] = step
        if fast and not self.options.no_graph:
            start = time.monotonic()
            try:
                self.memory = step.capture(self.memory)
                self.say("recorded", length=length, seconds=round(time.monotonic() - start, 1))
            except Exception as error:  # a slow run is worth more than none
                step.graph = None
                self.say("not recorded", length=length, error=f"{type(error).__name__}: {error}"[:600])
                print(f"no CUDA graph at {length}: {error}"[:300], flush=True)
        return step

    def train(self) -> None:
        options, last = self.options, (self.elapsed(), self.elapsed(), self.steps)
        reserve = 25.0 if self.cuda and options.minutes > 2 else 0.0
        while True:
            self.optimizer.rate.fill_(self.rate())
            self.stepper(self.curriculum.next_length()).run()
            self.steps += 1
            if (self.steps - self.first) % options.every:
                continue
            self.look()
            now = self.elapsed()
            over = now > 60 * options.minutes - reserve or (options.steps and self.steps - self.first >= options.steps)
            if over or now - last[0] > options.evaluate:
                speed = (self.steps - last[2]) / (now - last[1])
                self.report(speed, final=bool(over))
                last = (self.elapsed(), self.elapsed(), self.steps)
                self.save()
            if over:
                return

    def look(self) -> None:
        """Read what was right since the last look, and let the curriculum go on by it."""
        sums = self.sums.to("cpu", copy=True)
        self.sums.zero_()
        used = dict(zip(self.options.lengths, sums, strict=True))
        right = {
            length: {part: round(float(row[1] / row[0]), 4) for part, row in zip(PARTS, rows, strict=True) if row[0]}
            for length, rows in used.items()
        }
        total = sums.sum(0)
        losses = total[:, 2] / total[:, 0].clamp(min=1)
        if not bool(losses.isfinite().all()):
            self.say("not finite", losses=losses.tolist())
            print(f"The loss is not finite at step {self.steps}; the last checkpoint in {self.options.out} stays.")
            raise SystemExit(0)
        top = right[self.curriculum.longest]
        if self.options.mix:
            share = total[:, 1] / total[:, 0].clamp(min=1)
            top = {part: round(float(one), 4) for part, one in zip(PARTS, share, strict=True)}
        loud = (self.steps - self.first) // self.options.every % 5 == 0 or self.options.every < 100
        if loud:
            loss = {part: round(float(one), 4) for part, one in zip(PARTS, losses, strict=True)}
            self.say("train", seconds=round(self.seconds_before + self.elapsed(), 1), loss=loss, right=top)
        if self.curriculum.advance(top):
            self.say("longer", right=top, seconds=round(self.seconds_before + self.elapsed(), 1))

    @torch.no_grad()
    def report(self, speed: float, final: bool) -> None:
        cast = {name: weight.to(self.dtype) for name, weight in self.weights.items()}

        def predict(tokens: torch.Tensor, last: int) -> torch.Tensor:
            batch, length = tokens.shape
            turns = self.plain.positions(batch, length, self.device)
            hidden = self.plain.hidden(cast, tokens, turns).unflatten(0, (batch, length))
            return F.linear(hidden[:, -last - 1 : -1], cast["embedding"]).argmax(-1)

        lengths = list(self.options.lengths[: self.curriculum.level + 1])
        if final and self.cuda:
            lengths = [*[one for one in LENGTHS if one >= 512]]
        budget = self.options.budget * (4 if final and self.cuda else 1)
        found = evaluate.table(predict, lengths, budget, self.device, 2**17 if self.cuda else 2**12)
        self.say(
            "evaluation", seconds=round(self.seconds_before + self.elapsed(), 1), speed=round(speed, 2), right=found
        )
        print(f"{self.options.out.name} step {self.steps} at {self.elapsed():.0f} s, {speed:.1f} steps/s", flush=True)
        for task, row in found.items():
            cells = " ".join(f"{length}:{whole:.2f}/{first:.2f}" for length, (whole, first) in row.items())
            print(f"  {task:12} {cells}", flush=True)

    def save(self) -> None:
        state = self.optimizer.tensors() | {f"pool {length}": pool.before for length, pool in self.pools.items()}
        meta = {
            "size": self.options.size,
            "optimizer": self.options.optimizer,
            "steps": self.steps,
            "seconds": self.seconds_before + self.elapsed(),
            "warm_from": self.warm_from,
            "curriculum": self.curriculum.state(),
            "cursors": {str(length): pool.cursor for length, pool in self.pools.items()},
        }
        checkpoint.write(self.options.out, self.weights, state, meta, full=self.options.state == "full")


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    options.lengths = tuple(options.lengths)
    torch.set_float32_matmul_precision("high")
    run = Run(options)
    backends = BACKENDS[options.attention if run.cuda else "any"]
    run.say("options", **{name: str(value) for name, value in vars(options).items()}, torch=torch.__version__)
    with sdpa_kernel(backends):
        run.train()


if __name__ == "__main__":
    main(sys.argv[1:])
