"""Register a pattern from outside the package: attention whose mask multiplies the scores, as GPT-1 writes it.

python examples/own_pattern.py

The package's own reader refuses it: that the mask holds nothing but 0 and 1 is not in the graph. Whoever wrote the
model knows. A package registers such a pattern in its pyproject.toml:

    [project.entry-points."sparsepass.patterns"]
    gpt1 = "my_package.patterns:MULTIPLIED_MASK"
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import sparsepass
from sparsepass.patterns.pattern import Attention, Form, Match, Pattern, Term, shape
from sparsepass.types import Skip

T = torch.Tensor


def multiplied(query: T, key: T, value: T, shown: T, scale: float) -> T:
    """The attention as the model writes it. Parameters are roles; those in ``scalars`` below are numbers."""
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    scores = scores * shown + -1e4 * (1 - shown)
    return torch.matmul(F.softmax(scores, dim=-1), value)


def check(match: Match) -> Attention | Skip:
    """What was matched as an ``Attention``, or a sentence for the report."""
    roles = match.roles
    if any(len(shape(roles[name])) != 4 for name in ("query", "key", "value", "shown")):
        return Skip("query, key, value and mask need four dimensions each", (match.output.name,))
    seen = match.maker.call("bool", roles["shown"])  # no node of the graph: added when the graph is rewritten
    return Attention(
        spelling="multiplied_mask",
        query=roles["query"],
        key=roles["key"],
        value=roles["value"],
        output=match.output,
        scale=roles["scale"],
        masks=(Term(seen),),
        region=frozenset(match.nodes.values()),
    )


MULTIPLIED_MASK = Pattern(name="multiplied_mask", anchor="softmax", check=check, forms=(Form(multiplied),))


class Attend(torch.nn.Module):
    """The model: a mask of 0 and 1 as a buffer."""

    shown: T

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("shown", torch.ones(length, length).tril()[None, None])

    def forward(self, x: T) -> T:
        w = torch.matmul(x, x.transpose(-1, -2)) / 4.0
        w = w * self.shown + -1e4 * (1 - self.shown)
        return torch.matmul(F.softmax(w, dim=-1), x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    args = parser.parse_args(argv)

    x = torch.randn(1, 4, args.length, 16)
    report = sparsepass.explain(Attend(args.length), x, task="single_qa", options={"sparsepass.always_sparse": True})
    print(report)
    for graph in report.graphs:
        for skip in graph.refused:
            print(f"\nWithout the entry point: {skip.reason}")


if __name__ == "__main__":
    main()
