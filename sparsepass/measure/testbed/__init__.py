"""A small Llama that was really trained, on the token-level tasks: answers that stay right or break, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsepass.errors import SparsepassError
from sparsepass.measure.testbed.sizes import SIZES, TestbedSize

if TYPE_CHECKING:
    import torch

__all__ = ["SIZES", "TestbedError", "TestbedSize", "load", "weights_file"]


class TestbedError(SparsepassError, ValueError):
    """A testbed model that is not there or is not of the size asked for."""


def weights_file(size: str) -> Path:
    """Where the weights of a size are looked for when no file is given."""
    return Path(__file__).parent / "weights" / f"{size}.safetensors"


def load(
    size: str = "small",
    *,
    weights: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    attn: str = "sdpa",
) -> Any:
    """The testbed as a ``LlamaForCausalLM`` in eval mode, bfloat16 unless ``dtype`` is given.

    ``weights``: a safetensors file that ``examples/testbed/export.py`` wrote, else those in the package. Raises
    ``TestbedError`` naming the sizes, or the file that is not there.
    """
    if size not in SIZES:
        raise TestbedError(f"No testbed size {size!r}; accepted are {', '.join(SIZES)}.")
    file = weights_file(size) if weights is None else Path(weights)
    if not file.is_file():
        raise TestbedError(f"No weights of the testbed {size!r} at {file}; train them with examples/testbed/train.py.")
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM._from_config(
        LlamaConfig(**SIZES[size].config_fields()), dtype=dtype or torch.bfloat16, attn_implementation=attn
    )
    missing, unknown = model.load_state_dict(load_file(file), strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:  # which is the embedding
        raise TestbedError(f"{file} holds no weights of the testbed {size!r}: missing {missing}, unknown {unknown}.")
    model.tie_weights()
    return model.to(device).eval()
