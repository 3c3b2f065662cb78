"""The testbed's Llama as functions of stacked weights, written for fast training of a small model.

Everything but attention works on [tokens, hidden], so one compiled function serves every sequence length. The result
equals transformers' ``LlamaForCausalLM`` with the exported weights, which a test checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparsepass.measure.testbed.sizes import TestbedSize

Weights = dict[str, torch.Tensor]
"""``qkv`` [L, (H + 2 K) D, E], ``out`` [L, E, H D], ``gate_up`` [L, 2 I, E], ``down`` [L, E, I], ``norm_attention`` and
``norm_mlp`` [L, E], ``norm_final`` [E], ``embedding`` [V, E], which is also the output layer."""

MATRICES = ("qkv", "out", "gate_up", "down")


def new_weights(size: TestbedSize, generator: torch.Generator) -> Weights:
    """Random float32 weights: unit gain per matrix, what adds to the residual stream scaled down by depth."""

    def normal(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (gain / math.sqrt(shape[-1]))

    layers, hidden, inner = size.layers, size.hidden, size.intermediate
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    quiet = (2 * layers) ** -0.5
    return {
        "qkv": normal(layers, queries + 2 * keys, hidden),
        "out": normal(layers, hidden, queries, gain=quiet),
        "gate_up": normal(layers, 2 * inner, hidden),
        "down": normal(layers, hidden, inner, gain=quiet),
        "norm_attention": torch.ones(layers, hidden),
        "norm_mlp": torch.ones(layers, hidden),
        "norm_final": torch.ones(hidden),
        "embedding": normal(size.vocabulary, hidden),
    }


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    normed: torch.Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D] turned by position; cosine and sine [T, D / 2]."""
    low, high = x.float().chunk(2, dim=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1).to(x.dtype)


def before_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    qkv: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    size: TestbedSize,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, E] to q, k, v [T, H, D]; keys and values are repeated to all heads, so any SDPA kernel takes them."""
    heads = F.linear(norm(x, weight, size.norm_epsilon), qkv).unflatten(-1, (-1, size.head_dim))
    q, k, v = heads.split([size.heads, size.kv_heads, size.kv_heads], dim=1)
    group = size.heads // size.kv_heads
    k, v = rotate(k, cosine, sine).repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return rotate(q, cosine, sine), k, v


def after_attention(
    x: torch.Tensor,
    attended: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    size: TestbedSize,
) -> torch.Tensor:
    """x [T, E] plus attention [T, H D], then plus the feed-forward layer."""
    x = x + F.linear(attended, out)
    gate, up = F.linear(norm(x, weight, size.norm_epsilon), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


@dataclass(frozen=True)
class Network:
    """The forward pass of a size; ``compiled`` for training, at one number of tokens per step."""

    size: TestbedSize
    before: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = before_attention
    after: Callable[..., torch.Tensor] = after_attention

    def compiled(self) -> Network:
        return Network(
            self.size,
            torch.compile(before_attention, fullgraph=True, dynamic=False),
            torch.compile(after_attention, fullgraph=True, dynamic=False),
        )

    def positions(self, batch: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [batch * length, D / 2], float32."""
        half = self.size.head_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=device)
        frequency = 1.0 / self.size.rope_base ** (steps / half)
        angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
        return angle.cos().repeat(batch, 1), angle.sin().repeat(batch, 1)

    def hidden(self, weights: Weights, tokens: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """tokens int64 [B, S] to the normed last hidden states [B * S, E], in the weights' dtype."""
        batch, length = tokens.shape
        x = F.embedding(tokens.flatten(), weights["embedding"])
        layers = zip(
            *(weights[name].unbind() for name in ("norm_attention", "qkv", "out", "norm_mlp", "gate_up", "down")),
            strict=True,
        )
        for norm_attention, qkv, out, norm_mlp, gate_up, down in layers:
            heads = self.before(x, norm_attention, qkv, *turns, self.size)
            q, k, v = (one.unflatten(0, (batch, length)).transpose(1, 2) for one in heads)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self.after(
                x, attended.transpose(1, 2).reshape(batch * length, -1), out, norm_mlp, gate_up, down, self.size
            )
        return norm(x, weights["norm_final"], self.size.norm_epsilon)


def transformers_state(weights: Weights, size: TestbedSize) -> Weights:
    """The weights under the names of ``LlamaForCausalLM``, each contiguous; ``lm_head`` is tied and not among them."""
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    state = {"model.embed_tokens.weight": weights["embedding"], "model.norm.weight": weights["norm_final"]}
    for layer in range(size.layers):
        q, k, v = weights["qkv"][layer].split([queries, keys, keys])
        gate, up = weights["gate_up"][layer].chunk(2)
        parts = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": weights["out"][layer],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": weights["down"][layer],
            "input_layernorm": weights["norm_attention"][layer],
            "post_attention_layernorm": weights["norm_mlp"][layer],
        }
        state |= {f"model.layers.{layer}.{name}.weight": part for name, part in parts.items()}
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}
