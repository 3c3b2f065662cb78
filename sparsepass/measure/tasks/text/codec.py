"""From text to token ids and back: a model's own tokenizer, or bytes where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparsepass.measure.tasks.base import TaskError


class Codec(Protocol):
    """What text tasks write with. ``head`` stands in front of each context, ``tail`` between question and answer."""

    @property
    def head(self) -> tuple[int, ...]: ...
    @property
    def tail(self) -> tuple[int, ...]: ...
    def encode(self, text: str) -> tuple[int, ...]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Bytes:
    """UTF-8, a token per byte: 256 ids."""

    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(one for one in ids if one < 256).decode(errors="replace")


@dataclass(frozen=True)
class Tokenized:
    """A tokenizer of transformers. Pieces are encoded one by one, so that lengths add up."""

    tokenizer: Any = field(repr=False)
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    _known: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, text: str) -> tuple[int, ...]:
        found = self._known.get(text)
        if found is None:
            found = self._known[text] = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


MARK = "\x02context and question\x03"


def codec_of(tokenizer: Any = None, *, chat: bool = False) -> Codec:
    """The codec of a transformers tokenizer, bytes for None.

    ``chat``: the context and the question are a user's message in the tokenizer's chat template, and the answer is the
    assistant's. Else the context starts with the tokenizer's BOS if it has one. Raises ``TaskError``.
    """
    if tokenizer is None:
        if chat:
            raise TaskError("chat=True without a tokenizer; bytes have no chat template.")
        return Bytes()
    if not chat:
        first = getattr(tokenizer, "bos_token_id", None)
        return Tokenized(tokenizer, head=() if first is None else (int(first),))
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError("chat=True, but the tokenizer has no chat template; give chat=False.")
    message = [{"role": "user", "content": MARK}]
    written = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    before, found, after = written.partition(MARK)
    if not found:
        raise TaskError("The tokenizer's chat template changes the message, so it cannot be cut around it.")
    plain = Tokenized(tokenizer)
    return Tokenized(tokenizer, head=plain.encode(before) if before else (), tail=plain.encode(after) if after else ())
