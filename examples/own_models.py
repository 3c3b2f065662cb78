"""Attention as people write it by hand, and what becomes of each: nanoGPT, einops and timm style, nn modules, SDPA.

python examples/own_models.py

No model is changed. The last one returns its probabilities, so its attention stays as it is; the report says so.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import sparsepass

T = torch.Tensor
WIDTH, HEADS = 64, 4


class NanoGPT(nn.Module):
    """One projection, split; a triangular buffer; masked_fill."""

    bias: T

    def __init__(self, length: int) -> None:
        super().__init__()
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x: T) -> T:
        b, t, c = x.size()
        q, k, v = self.attn(x).split(WIDTH, dim=2)
        q, k, v = (one.view(b, t, HEADS, c // HEADS).transpose(1, 2) for one in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y: T = F.softmax(att, dim=-1) @ v
        y = self.proj(y.transpose(1, 2).contiguous().view(b, t, c))
        return y


class Einops(nn.Module):
    """``rearrange(x, 'b n (h d) -> b h n d')`` and einsum, as x-transformers and lucidrains write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: T) -> T:
        q, k, v = (one.unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3) for one in self.qkv(x).chunk(3, dim=-1))
        sim = torch.einsum("b h i d, b h j d -> b h i j", q * 0.25, k)
        i, j = sim.shape[-2:]
        causal = torch.ones((i, j), dtype=torch.bool).triu(j - i + 1)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)
        y: T = self.out(out.permute(0, 2, 1, 3).flatten(2))
        return y


class Timm(nn.Module):
    """``qkv.reshape(..).permute(2, 0, 3, 1, 4).unbind(0)``, as timm's vision transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: T) -> T:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attn = ((q * (c // HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        y: T = self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))
        return y


class Batched(nn.Module):
    """``bmm`` with the heads in the batch, as fairseq writes it, and a relative bias."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = nn.Parameter(torch.randn(HEADS, 2 * length - 1))

    def forward(self, x: T) -> T:
        b, n, c = x.shape
        q, k, v = (y.view(b, n, HEADS, -1).transpose(1, 2).reshape(b * HEADS, n, -1) for y in self.qkv(x).chunk(3, -1))
        place = torch.arange(n)[None, :] - torch.arange(n)[:, None] + n - 1
        w = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, n) / math.sqrt(c // HEADS) + self.bias[:, place]
        w = F.softmax(w.view(b * HEADS, n, n), dim=-1)
        return torch.bmm(w, v).view(b, HEADS, n, -1).transpose(1, 2).reshape(b, n, c)


class MultiHead(nn.Module):
    """nn.MultiheadAttention with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: T) -> T:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y: T = self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y


class Sdpa(nn.Module):
    """SDPA of three dimensions with a float mask."""

    def forward(self, x: T) -> T:
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=-0.1 * distance.abs().float())


class Probabilities(NanoGPT):
    """Returns its probabilities too: they are needed whole, so this attention stays as it is."""

    def forward(self, x: T) -> tuple[T, T]:  # type: ignore[override]
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in self.attn(x).split(WIDTH, dim=2))
        att = F.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1)
        return self.proj((att @ v).transpose(1, 2).flatten(2)), att


def models(length: int) -> dict[str, nn.Module]:
    made = {
        "nanoGPT": NanoGPT(length),
        "einops": Einops(),
        "timm": Timm(),
        "bmm and a bias": Batched(length),
        "nn.MultiheadAttention": MultiHead(),
        "SDPA": Sdpa(),
        "returns probabilities": Probabilities(length),
    }
    return {name: model.eval() for name, model in made.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens (default: 2048)")
    args = parser.parse_args(argv)

    for name, model in models(args.length).items():
        report = sparsepass.explain(
            model, torch.randn(2, args.length, WIDTH), task="single_qa", options={"sparsepass.always_sparse": True}
        )
        for graph in report.graphs:
            for site in graph.sites:
                print(f"{name}: {site.outcome.words}, mask {site.entry.site.mask} {site.entry.reason}".rstrip())
            for skip in graph.refused:
                print(f"{name}: not matched: {skip.reason}")


if __name__ == "__main__":
    main()
