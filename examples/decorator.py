"""@sparsepass.sparse on a function, a method, a module and a module class.

python examples/decorator.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import sparsepass

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


@sparsepass.sparse(task="single_qa", dynamic=True)
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A function: query [B, 8, S, 64], key and value [B, 2, S, 64]."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Causal attention with grouped queries over hidden states [B, S, 512]."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.project = nn.Linear(width, width + 2 * KV_HEADS * HEAD_DIM, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        heads = self.project(hidden).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
        query, key, value = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return torch.as_tensor(self.output(out.transpose(1, 2).reshape(batch, length, width)))


@sparsepass.sparse(task="multi_qa", dynamic=True)
class SparseAttention(Attention):
    """A class: every instance's forward is compiled."""


class Reader(nn.Module):
    """A method: only what it computes is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    @sparsepass.sparse(task="single_qa", dynamic=True)
    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + torch.as_tensor(self.attention(hidden))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens (default: 16384)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    query = torch.randn(1, HEADS, args.length, HEAD_DIM)
    key, value = torch.randn(2, 1, KV_HEADS, args.length, HEAD_DIM).unbind(0)
    hidden = torch.randn(1, args.length, HEADS * HEAD_DIM)
    module = sparsepass.sparse(Attention().eval(), task="single_qa", dynamic=True)  # a module: compiled in place

    # Outputs need no gradients: a site that does stays dense, and the report says so.
    report = sparsepass.explain(attend, query, key, value)
    print(f"function, by its own task:  {report.summary()}")
    report = sparsepass.explain(attend, query, key, value, task="multi_hop")
    print(f"function, hint multi_hop:   {report.summary()}")  # a hint in force overrules the decorator's
    print(f"method:                     {sparsepass.explain(Reader().eval().read, hidden).summary()}")
    print(f"module:                     {sparsepass.explain(module, hidden).summary()}")
    print(f"class:                      {sparsepass.explain(SparseAttention().eval(), hidden).summary()}")


if __name__ == "__main__":
    main()
