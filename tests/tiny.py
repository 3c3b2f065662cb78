"""Tiny random models of real transformers architectures, and policies, for the tests."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparsepass.policies.policy import Policy
from sparsepass.policies.rule import Rule
from sparsepass.types import Budget

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 16384,
}


@functools.lru_cache(maxsize=16)
def model(arch: str = "llama", attn: str = "sdpa", **changes: Any) -> Any:
    """A random causal language model (``arch``: llama, qwen2, mistral, gemma2) in eval mode, the same each time."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(arch, **{**SIZES, **changes})
    config._attn_implementation = attn
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    built.generation_config.pad_token_id = 0
    built.generation_config.eos_token_id = None
    return built


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def everything_sparse(density: float = 1.0, block: int | None = None) -> Policy:
    """Every task class but ``dense`` through the sparse kernel at one density, whatever the length."""
    params = {"density": density} if block is None else {"density": density, "block": block}
    return Policy(name=f"all {density}", rules=(Rule(None, Budget("pooled_topk", params)),))


SPARSE_OPTIONS: dict[str, Any] = {"sparsepass.always_sparse": True, "sparsepass.inductor": False}
"""Options under which the policy alone decides and the rewritten graph runs without Inductor: quick to compile."""
