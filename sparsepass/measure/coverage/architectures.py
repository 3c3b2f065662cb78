"""Which architectures the installed transformers has, by what their tiny model is built as."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Any

from sparsepass.errors import OptionError


class Kind(StrEnum):
    """What is built of an architecture."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_DECODER = "encoder_decoder"
    VISION = "vision"

    @property
    def auto_class(self) -> str:
        """Name of the transformers class that builds it."""
        return _AUTO[self][0]


_AUTO = {
    Kind.DECODER: ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    Kind.ENCODER: ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    Kind.ENCODER_DECODER: ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    Kind.VISION: ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
}


def architectures(kinds: tuple[str, ...], names: tuple[str, ...] = ()) -> list[tuple[Kind, str]]:
    """Every (kind, model_type) asked for, decoders first; an architecture may be there under several kinds.

    Raises ``OptionError`` for a name that is of none of the kinds.
    """
    auto: Any = _modeling_auto()
    every = [
        (kind, name)
        for kind in Kind
        if not kinds or kind in kinds
        for name in getattr(auto, _AUTO[kind][1], {})
        if not names or name in names
    ]
    missing = [name for name in names if all(name != known for _, known in every)]
    if missing:
        known = sorted({name for _, mapping in _AUTO.values() for name in getattr(auto, mapping, {})})
        near = difflib.get_close_matches(missing[0], known, n=4, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise OptionError(
            f"--arch {missing[0]!r} is no causal language model, masked language model, encoder-decoder or image "
            f"classifier of the installed transformers.{hint}"
        )
    return every


def class_name(kind: Kind, arch: str) -> str:
    """Name of the transformers class of an architecture; of several the first."""
    name: str | tuple[str, ...] = getattr(_modeling_auto(), _AUTO[kind][1], {}).get(arch, "")
    return name if isinstance(name, str) else name[0]


def _modeling_auto() -> Any:
    try:
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise OptionError('This needs transformers: pip install "sparsepass[demo]".') from error
    return modeling_auto
