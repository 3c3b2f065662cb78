"""One training step: forward, loss, gradients, optimizer. On CUDA the whole of it is one graph per sequence length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from examples.testbed.batches import PARTS, Batches, draw_batches
from examples.testbed.network import Network, Weights
from examples.testbed.optimizer import Optimizer
from sparsepass.measure.tasks.tokens import TOKEN_TASKS
from sparsepass.measure.tasks.tokens.drawing import IGNORED


@dataclass
class Pool:
    """Batches of one length, drawn many steps ahead; ``state`` redraws those in use."""

    length: int
    rows: int
    steps: int
    generator: torch.Generator
    shares: tuple[float, ...] = (1.0,) * len(TOKEN_TASKS)
    cursor: int = 0
    drawn: Batches | None = None
    before: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        self.before = self.generator.get_state()

    def next(self) -> tuple[Batches, int]:
        """The batches and the number of the one to use."""
        if self.drawn is None or self.cursor == self.steps:
            if self.drawn is not None:
                self.cursor = 0
                self.before = self.generator.get_state()
            else:  # after a restart: the batches in use then
                self.generator.set_state(self.before)
            self.drawn = draw_batches(self.steps, self.rows, self.length, self.generator, self.shares)
        self.cursor += 1
        return self.drawn, self.cursor - 1


class Step:
    """Steps at one sequence length. ``sums`` float64 [parts, 3] collects scored, right and loss per part.

    ``weigh`` float32 [parts]: what each part counts in the loss.
    """

    def __init__(
        self,
        network: Network,
        weights: Weights,
        optimizer: Optimizer,
        pool: Pool,
        sums: torch.Tensor,
        dtype: torch.dtype,
        weigh: torch.Tensor,
    ) -> None:
        self.network, self.weights, self.optimizer = network, weights, optimizer
        self.pool, self.sums, self.dtype, self.weigh = pool, sums, dtype, weigh
        self.turns = network.positions(pool.rows, pool.length, sums.device)
        self.inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.parts = torch.empty(0)
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """The next batch's step, waiting for nothing."""
        batches, number = self.pool.next()
        batch = (batches.tokens[number], batches.places[number], batches.targets[number])
        if self.inputs is None:
            self.inputs, self.parts = tuple(one.clone() for one in batch), batches.parts  # type: ignore[assignment]
        assert self.inputs is not None
        for mine, new in zip(self.inputs, batch, strict=True):
            mine.copy_(new)
        self.graph.replay() if self.graph else self.compute()

    def compute(self) -> None:
        assert self.inputs is not None
        tokens, places, targets = self.inputs
        cast = {name: weight.to(self.dtype) for name, weight in self.weights.items()}
        hidden = self.network.hidden(cast, tokens, self.turns).index_select(0, places)
        logits = F.linear(hidden, cast["embedding"]).float()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        scored = (targets != IGNORED).float()
        zeros = torch.zeros(len(PARTS), device=losses.device)
        counts = zeros.index_add(0, self.parts, scored)
        totals = zeros.index_add(0, self.parts, losses)
        loss = (totals / counts.clamp(min=1.0)) @ self.weigh
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        self.optimizer.step(gradients)
        right = zeros.index_add(0, self.parts, (logits.argmax(-1) == targets).float())
        self.sums += torch.stack([counts, right, totals.detach()], dim=-1)

    def capture(self, memory: Any) -> Any:
        """Record the step as a CUDA graph, after three real steps that warm everything up.

        ``memory``: the pool that an earlier graph returned, None for the first. Graphs run one after another, so they
        can share it.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self.compute()
        self.graph = graph
        return graph.pool()
