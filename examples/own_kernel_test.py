"""Test an attention kernel of your own over block lists: one that is right, and one with a mistake.

python examples/own_kernel_test.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from sparsepass.testing import check_attention


def my_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    scale: float,
    causal: bool,
    block: int,
) -> Tensor:
    """q [B, H, S, D], k and v [B, Hkv, S, D], lists as FlexAttention's BlockMask has them. Slow and plain."""
    batch, heads, length, _ = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            # Lists may be shared: a first dimension of 1 serves the whole batch, a second one every head.
            num, indices = (x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)] for x in (kv_num_blocks, kv_indices))
            head = h // (heads // k.shape[1])
            for row, start in enumerate(range(0, length, block)):
                listed = indices[row, : int(num[row])].tolist()
                tokens = [t for i in listed for t in range(i * block, min((i + 1) * block, k.shape[2]))]
                if not tokens:
                    continue  # nothing listed: these rows stay 0
                rows = torch.arange(start, min(start + block, length), device=q.device)
                keys, values = k[b, head, tokens].float(), v[b, head, tokens].float()
                scores = q[b, h, rows].float() @ keys.T * scale
                if causal:
                    later = torch.tensor(tokens, device=q.device) > rows[:, None]
                    scores = scores.masked_fill(later, -torch.inf)
                # A row whose listed keys are all in its future sees nothing: softmax would give NaN.
                out[b, h, rows] = (scores.softmax(-1).nan_to_num() @ values).to(q.dtype)
    return out


def forgets_the_diagonal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    scale: float,
    causal: bool,
    block: int,
) -> Tensor:
    """The lists name no block in the future, so why mask? Because a query sees half of its own block."""
    return my_kernel(q, k, v, kv_num_blocks, kv_indices, scale=scale, causal=False, block=block)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=100, help="longest problem tried, in tokens (default: 100)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    for kernel in (my_kernel, forgets_the_diagonal):
        try:
            checked = check_attention(
                kernel,
                device=args.device,
                dtypes=(torch.float32, torch.float16),
                head_dims=(16, 64),
                blocks=(16, 32),
                max_len=args.length,
                examples=10,
            )
        except AssertionError as error:
            print(f"WRONG. {error}\n")
        else:
            print(f"Right. {checked}\n")


if __name__ == "__main__":
    main()
