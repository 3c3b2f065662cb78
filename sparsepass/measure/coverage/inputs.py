"""Inputs of each phase, made anew for each call: caches are written to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sparsepass.measure.coverage.architectures import Kind
from sparsepass.measure.coverage.special import VOCABULARY

BATCH = 2
NO_CACHE = "the output of the prefill has no cache"


class Phase(StrEnum):
    """What a tiny model is asked to do."""

    PREFILL = "prefill"
    PADDED = "padded"
    DECODE = "decode"
    OWN = "own"
    """The one call of a model of the user's own."""


@dataclass(frozen=True)
class Call:
    """One call of a model: ``arguments()`` makes its inputs. ``real``: bool [B, S], False at padding, if any."""

    arguments: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    real: Any = None


def phases_of(kind: Kind) -> tuple[Phase, ...]:
    """The phases that a kind of model has."""
    if kind is Kind.VISION:
        return (Phase.PREFILL,)
    if kind is Kind.DECODER:
        return (Phase.PREFILL, Phase.PADDED, Phase.DECODE)
    return (Phase.PREFILL, Phase.PADDED)


def call_for(model: Any, kind: Kind, phase: Phase, length: int) -> Call:
    """The call of a phase. Decode runs the prefill here, uncompiled, and is the next step."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if kind is Kind.VISION:
        pixels = _image(model, generator)
        return Call(lambda: ((), dict(pixels)))
    ids = torch.randint(4, VOCABULARY - 16, (BATCH, length), generator=generator)
    given: dict[str, Any] = {"input_ids": ids}
    real = None
    if phase is Phase.PADDED:
        mask = torch.ones(BATCH, length, dtype=torch.int64)
        pad = length // 4
        mask[0, slice(0, pad) if kind is Kind.DECODER else slice(length - pad, length)] = 0
        given["attention_mask"] = mask
        real = mask.bool()
    if kind is Kind.ENCODER_DECODER:
        given["decoder_input_ids"] = torch.randint(4, VOCABULARY - 16, (BATCH, length - 34), generator=generator)
        given["use_cache"] = False
        return Call(lambda: ((), dict(given)))
    if kind is Kind.DECODER:
        given["use_cache"] = False
    if phase is Phase.DECODE:
        return Call(lambda: ((), _after_prefill(model, ids)))
    return Call(lambda: ((), dict(given)), real)


def _image(model: Any, generator: Any) -> dict[str, Any]:
    """What an image classifier takes: an image for most; its patches; tokens, of pixels or of text."""
    import torch

    config = model.config
    if config.model_type in ("imagegpt", "shieldgemma2"):
        return {"input_ids": torch.randint(4, 256, (BATCH, 256), generator=generator)}
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", 3)
    if config.model_type == "siglip2":
        side = int(vision.num_patches**0.5)
        return {
            "pixel_values": torch.randn(BATCH, side * side, channels * vision.patch_size**2, generator=generator),
            "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[side, side]] * BATCH),
        }
    size = getattr(config, "image_size", getattr(vision, "image_size", 128))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    name = "inputs" if config.model_type == "perceiver" else "pixel_values"
    return {name: torch.randn(BATCH, channels, height, width, generator=generator)}


def _after_prefill(model: Any, ids: Any) -> dict[str, Any]:
    out = model(input_ids=ids, use_cache=True)
    for name in ("past_key_values", "cache_params", "mems", "state", "past_buckets_states"):
        held = getattr(out, name, None)
        if held is not None:
            return {"input_ids": ids[:, -1:], name: held, "use_cache": True}
    raise ValueError(NO_CACHE)
