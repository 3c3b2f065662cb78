"""The testbed family: one architecture, three sizes, as transformers Llama configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsepass.measure.tasks.tokens.vocabulary import BOS, PAD, SIZE


@dataclass(frozen=True)
class TestbedSize:
    """Sizes of a Llama of the family. Six layers at least, since three hops take four."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64
    vocabulary: int = SIZE
    rope_base: float = 1e7
    """Large, so that some 24 of a head's 64 dimensions hardly turn over 16K tokens: those carry what is looked up."""
    longest: int = 32768
    norm_epsilon: float = 1e-5

    def config_fields(self) -> dict[str, Any]:
        """Keyword arguments of ``transformers.LlamaConfig``."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.longest,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_base},
            "rms_norm_eps": self.norm_epsilon,
            "tie_word_embeddings": True,
            "bos_token_id": BOS,
            "eos_token_id": None,
            "pad_token_id": PAD,
        }


SIZES = {
    "tiny": TestbedSize(hidden=128, intermediate=384, layers=6, heads=4, kv_heads=2),
    "small": TestbedSize(hidden=256, intermediate=704, layers=6, heads=8, kv_heads=4),
    "large": TestbedSize(hidden=512, intermediate=1408, layers=8, heads=16, kv_heads=8),
}
"""2.0, 6.7 and 32 million parameters. ``small`` ships with its weights."""
