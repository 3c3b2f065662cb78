"""Reasons in a form that is the same for every architecture: names of nodes and sizes of one model taken out."""

from __future__ import annotations

import re

CAPTURED_LESS = "not in a captured graph, or without a softmax or SDPA node there (graph break, loop, other spelling)"
NOT_SEEN = (
    "a captured softmax that is not taken for attention: no matmul of queries and keys is seen shortly before it "
    "(baddbmm, einsum, a longer way, scores from another graph)"
)
CAPTURED_MORE = "{seen} sites in the captured graphs, {expected} counted in the eager run"
CAPTURED_OTHERWISE = "equal to torch.compile alone: this model computes something else when it is traced"
HIDDEN_ROWS = "equal to eager's where rows that see nothing give zero: this model lets padding reach other rows"
NOTHING_LEFT_OUT = "the block-sparse op ran, but its mask has too few blocks to leave any out"


def general(reason: str) -> str:
    """``expected mul, found add at 'add_7'`` of one graph as ``expected mul, found add at 'add'``."""
    text = re.sub(r"'([A-Za-z_]\w*?)(?:_\d+)+'", r"'\1'", reason)
    text = re.sub(r"'(?:l|L)_[A-Za-z_]\w*'", "'an input'", text)
    text = re.sub(r"'(?!an input')[a-z]\w*\.[\w.]+'", "'a site'", text)
    return text.strip()
