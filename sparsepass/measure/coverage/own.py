"""Models of the user's own: a function that returns one, or a checkpoint whose configuration is made small."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from sparsepass.errors import OptionError
from sparsepass.measure.coverage.architectures import Kind
from sparsepass.measure.coverage.inputs import Call


def is_function(text: str) -> bool:
    """Whether ``--model`` names a function, not a checkpoint."""
    return ":" in text and not Path(text).exists()


def own_model(text: str) -> tuple[Any, Call]:
    """A model of the user's own: ``module:function`` or ``file.py:function`` names what returns (model, inputs).

    The inputs are a dict of keyword arguments, a tuple of positional ones, or one tensor. Raises ``OptionError``.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise OptionError(f"--model is {text!r}; accepted is module:function, file.py:function, or a folder.")
    try:
        if place.endswith(".py"):
            file = Path(place).resolve()
            sys.path.insert(0, str(file.parent))
            place = file.stem
        elif "" not in sys.path:
            sys.path.insert(0, "")
        made = getattr(importlib.import_module(place), name)()
        model, inputs = made
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise OptionError(f"--model {text!r}: {error}. Accepted is a function that returns (model, inputs).") from error
    if isinstance(inputs, dict):
        return model, Call(lambda: ((), dict(inputs)))
    return model, Call(lambda: (inputs if isinstance(inputs, tuple) else (inputs,), {}))


def checkpoint_kind(source: str, trust: bool) -> Kind:
    """What is built of a checkpoint folder, or of a name on the Hub: by its ``auto_map``, or its class's name.

    ``trust`` lets transformers run the checkpoint's own code. Raises ``OptionError``.
    """
    config = checkpoint_config(source, trust)
    remote = getattr(config, "auto_map", None) or {}
    names = getattr(config, "architectures", None) or []
    for kind in Kind:
        # AutoModelForCausalLM in auto_map, or LlamaForCausalLM in architectures
        ending = kind.auto_class.removeprefix("AutoModel")
        if kind.auto_class in remote or any(name.endswith(ending) for name in names):
            return kind
    if getattr(config, "is_encoder_decoder", False):
        return Kind.ENCODER_DECODER
    raise OptionError(
        f"--model {source!r}: neither auto_map nor architectures ({', '.join(names) or 'none'}) of its config.json "
        "says what to build. Accepted are a causal or masked language model, an encoder-decoder and an image "
        "classifier; for anything else give a function: --model file.py:function."
    )


def checkpoint_config(source: str, trust: bool) -> Any:
    """The configuration of a checkpoint. Raises ``OptionError``."""
    try:
        import transformers
    except ImportError as error:
        raise OptionError('This needs transformers: pip install "sparsepass[demo]".') from error
    try:
        return transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text and not trust:
            raise OptionError(
                f"--model {source!r} has code of its own. Read it, then run this again with --trust-remote-code."
            ) from error
        raise OptionError(f"--model {source!r}: {text[:300]}") from error
