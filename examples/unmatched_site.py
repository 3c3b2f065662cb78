"""The report of a model of which one site is not matched: its second layer divides the scores by a number from data.

python examples/unmatched_site.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import sparsepass

WIDTH, HEADS = 64, 4


class Layer(nn.Module):
    """Causal self-attention; with ``temperature`` its scores are divided by the length of the queries."""

    def __init__(self, temperature: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature = temperature

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1)
        scores = scores / (q.norm(dim=-1, keepdim=True) if self.temperature else 4.0)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = F.softmax(scores.masked_fill(later, float("-inf")), dim=-1)
        y: torch.Tensor = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return y


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    args = parser.parse_args(argv)

    model = nn.Sequential(Layer(False), Layer(True), Layer(False)).eval()
    print(sparsepass.explain(model, torch.randn(1, args.length, WIDTH), task="single_qa"))


if __name__ == "__main__":
    main()
