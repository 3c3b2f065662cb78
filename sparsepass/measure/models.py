"""Random-weight causal language models from transformers configs, for ``sparsepass explain`` and for tests."""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepass.errors import SparsepassError
from sparsepass.warmup import random_inputs as random_inputs

if TYPE_CHECKING:
    import torch


class ModelError(SparsepassError, ValueError):
    """A model that cannot be built or loaded as asked."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a random model; the defaults make one that two CPU cores run in a second at 4K tokens."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 256
    vocab: int = 512
    max_length: int = 4096
    intermediate: int = 0
    """Of the feed-forward layers; 0 makes it twice the hidden size."""

    def longest(self, length: int) -> ModelShape:
        """The same model with room for this many tokens."""
        return replace(self, max_length=max(self.max_length, length))

    def config_fields(self) -> dict[str, int]:
        """The sizes under the names that most transformers configs use (others map them by ``attribute_map``)."""
        return {
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate or 2 * self.hidden,
            "vocab_size": self.vocab,
            "max_position_embeddings": max(self.max_length, 4096),
            # The defaults point past a small vocabulary, which nn.Embedding refuses.
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def build_random_model(arch: str, shape: ModelShape, *, attn: str, dtype: torch.dtype, device: str) -> Any:
    """A causal language model with random weights, in eval mode.

    Args:
        arch: a transformers ``model_type``, such as ``llama``; of a multimodal one, the text part is built.
        attn: ``attn_implementation``, ``sdpa`` or ``eager``.

    Raises:
        ModelError: transformers is missing, the architecture is unknown or no causal language model, the sizes do not
            fit together, or the architecture lacks that attention implementation.
    """
    if shape.heads % shape.kv_heads:
        raise ModelError(
            f"{shape.heads} query heads cannot share {shape.kv_heads} key/value heads evenly; "
            "give a number of query heads that is a multiple of the key/value heads."
        )
    transformers = _transformers()
    import torch

    attn = str(attn)  # Dynamo breaks the graph on an enum there, even one that is a str
    config = _config(transformers, arch, shape)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=dtype)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a random {arch!r} model: {_first_line(error)}{_advice(error)}"
        ) from error
    return model.to(device).eval()


def load_model(path: str, *, attn: str, dtype: torch.dtype, device: str) -> Any:
    """A causal language model from a local checkpoint folder; nothing is downloaded.

    Raises:
        ModelError: transformers is missing, or the folder holds no such model.
    """
    if not Path(path).is_dir():
        raise ModelError(
            f"Cannot load a model from {path!r}: no such folder. Give a local checkpoint folder; nothing is downloaded."
        )
    transformers = _transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=str(attn), dtype=dtype, local_files_only=True
        )
    except Exception as error:
        raise ModelError(f"Cannot load a model from {path!r}: {_first_line(error)}{_advice(error)}") from error
    return model.to(device).eval()


def branch(cache: Any) -> Any:
    """A ``DynamicCache`` that grows by itself from what this one holds.

    It shares the tensors: layers that grow bind new ones, and write into none.
    """
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError('This needs transformers: pip install "sparsepass[demo]".') from error
    transformers.logging.set_verbosity_error()
    return transformers


def _config(transformers: Any, arch: str, shape: ModelShape) -> Any:
    known = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING.keys())
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=4, cutoff=0.5)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else "Try 'llama', 'qwen2' or 'mistral'."
        raise ModelError(
            f"transformers {transformers.__version__} knows no architecture {arch!r}. {hint} "
            "Any model_type that AutoConfig knows is accepted."
        )
    fields: dict[str, int] = shape.config_fields()
    try:
        text = transformers.AutoConfig.for_model(arch).get_text_config(decoder=True)
    except Exception as error:
        raise ModelError(f"transformers has no default configuration for {arch!r}: {_first_line(error)}") from error
    # Some sizes are derived from others and have no setter (head_dim in Falcon): leave those to the config.
    kind = type(text)
    derived = [n for n in fields if isinstance(p := getattr(kind, n, None), property) and p.fset is None]
    for name in derived:
        del fields[name]
    try:
        return kind(**fields)
    except Exception as error:
        raise ModelError(f"These sizes do not make a {arch!r} configuration: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = re.sub(r"\s+", " ", lines[0])[:300] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _advice(error: BaseException) -> str:
    return " Try --attn eager." if "scaled_dot_product_attention" in str(error) else ""
