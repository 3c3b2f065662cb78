"""AdamW, or Muon for the matrices with AdamW for the rest, with the learning rate on the device for CUDA graphs.

Muon (Jordan et al. 2024) with the step size of Moonlight (arXiv 2502.16982), so that both take steps of like size.
``torch.optim.Muon`` works on one matrix at a time; here all layers' are orthogonalized together.
"""

from __future__ import annotations

from typing import Any

import torch

from examples.testbed.network import MATRICES, Weights

DECAY = 0.1
MUON_FACTOR = 3.0
"""Muon's learning rate over AdamW's."""


class Optimizer:
    """Steps on ``weights`` by gradients of their order; ``rate`` is a scalar tensor that the caller sets."""

    def __init__(self, weights: Weights, kind: str) -> None:
        self.weights = weights
        device = weights["embedding"].device
        self.rate = torch.zeros((), device=device)
        self.momentum = {name: torch.zeros_like(weights[name]) for name in MATRICES} if kind == "muon" else {}
        decayed = [weights[name] for name in MATRICES if name not in self.momentum]
        plain = [weight for name, weight in weights.items() if name not in MATRICES]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}],
            lr=self.rate,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
            foreach=False,
            capturable=device.type == "cuda",
        )
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)

    def step(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One step by gradients clipped to norm 1; returns their norm before."""
        total = torch.nn.utils.get_total_norm(gradients)
        scale = (1.0 / (total + 1e-6)).clamp(max=1.0)
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            assert weight.grad is not None
            torch.mul(gradient, scale, out=weight.grad)
        with torch.no_grad():
            for name, momentum in self.momentum.items():
                self._muon(self.weights[name], momentum)
        self.adam.step()
        return total

    def _muon(self, weight: torch.Tensor, momentum: torch.Tensor) -> None:
        assert weight.grad is not None
        momentum.lerp_(weight.grad, 0.05)
        update = orthogonal(torch.lerp(weight.grad, momentum, 0.95))
        rate = self.rate * MUON_FACTOR
        weight.mul_(1.0 - rate * DECAY)
        weight.sub_(update * (rate * 0.2 * max(weight.shape[-2:]) ** 0.5))

    def tensors(self) -> Weights:
        """The state, by name: for a checkpoint. Empty before the first step but for Muon's."""
        state = {f"momentum {name}": momentum for name, momentum in self.momentum.items()}
        for name, weight in self.weights.items():
            state |= {f"{kind} {name}": value for kind, value in self.adam.state.get(weight, {}).items()}
        return state

    def restore(self, state: Weights) -> None:
        for name, momentum in self.momentum.items():
            momentum.copy_(state[f"momentum {name}"])
        for name, weight in self.weights.items():
            kinds = [kind for kind in ("step", "exp_avg", "exp_avg_sq") if f"{kind} {name}" in state]
            if kinds:
                own: dict[str, Any] = {kind: state[f"{kind} {name}"].clone() for kind in kinds}
                device = weight.device if self.adam.defaults["capturable"] else torch.device("cpu")
                own["step"] = own["step"].to(device)
                self.adam.state[weight] = own | {k: own[k].to(weight.device) for k in ("exp_avg", "exp_avg_sq")}


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, roughly: five Newton-Schulz steps in bfloat16 on [n, rows, columns]."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    found: torch.Tensor = x.mT if tall else x
    return found.to(matrices.dtype)
