"""The models of the testbed family with an attention that takes any method, without a compiler: for measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from examples.testbed import checkpoint
from examples.testbed.network import transformers_state
from sparsepass.kernels.attend.api import block_sparse_attention
from sparsepass.kernels.types import Visible
from sparsepass.measure import testbed
from sparsepass.measure.testbed import SIZES
from sparsepass.methods.base import Method

NAME = "sparsepass_testbed_family"


class Attend:
    """An attention function for transformers: causal, by the method in force, SDPA where it is None."""

    def __init__(self) -> None:
        self.method: Method | None = None
        self.counter: torch.Tensor | None = None

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **given: Any
    ) -> tuple[torch.Tensor, None]:
        scale = given["scaling"]
        if self.method is None:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        else:
            shown = Visible(right=0)
            lists = self.method.select(query, key, scale=scale, visible=shown, counter=self.counter)
            out, _ = block_sparse_attention(query, key, value, lists, scale=scale, visible=shown, counter=self.counter)
        return out.transpose(1, 2).contiguous(), None

    @contextmanager
    def under(self, method: Method | None, device: torch.device) -> Iterator[torch.Tensor]:
        """The method in force; yields the counts int64 [3] of the calls inside: launches, computed, visible."""
        self.method, self.counter = method, torch.zeros(3, dtype=torch.int64, device=device)
        if method is not None:
            method.prepare(device)
        try:
            yield self.counter
        finally:
            self.method = self.counter = None


def load(size: str, folder: Path | None, device: torch.device) -> tuple[Any, Attend]:
    """A model of the family and its attention: float32 on the CPU, bfloat16 elsewhere.

    ``folder``: a training checkpoint, a safetensors file that ``export`` wrote, or None for the weights that ship.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    attend, dtype = Attend(), torch.float32 if device.type == "cpu" else torch.bfloat16
    name = f"{NAME}_{size}"
    AttentionInterface.register(name, attend)
    if folder is None or folder.is_file():
        model = testbed.load(size, weights=folder, dtype=dtype, device=str(device))
        model.set_attn_implementation(name)
        return model, attend
    weights, _, meta = checkpoint.read(folder)
    if meta["size"] != size:
        raise SystemExit(f"{folder} holds a model of size {meta['size']!r}, not {size!r}.")
    config = LlamaConfig(**SIZES[size].config_fields())
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=name)
    model.load_state_dict(transformers_state(weights, SIZES[size]), strict=False)
    model.tie_weights()
    return model.to(device).eval(), attend
