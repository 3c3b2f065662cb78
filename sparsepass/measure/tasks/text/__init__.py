"""Tasks in words, with a model's tokenizer or bytes: the nine of The Sparse Frontier in wordings of our own.

Adding one is a file and a line here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sparsepass.measure.tasks.base import TaskError
from sparsepass.measure.tasks.text.codec import Bytes, Codec, Tokenized, codec_of
from sparsepass.measure.tasks.text.common_words import CommonWords
from sparsepass.measure.tasks.text.documents import DocumentQA, read
from sparsepass.measure.tasks.text.needles import Needle, Needles
from sparsepass.measure.tasks.text.story_filtering import StoryFiltering
from sparsepass.measure.tasks.text.story_multi_hop import StoryMultiHop
from sparsepass.measure.tasks.text.story_retrieval import StoryRetrieval
from sparsepass.measure.tasks.text.tracking import Tracking
from sparsepass.measure.tasks.text.writing import TextTask

TEXT_TASKS: tuple[type[TextTask], ...] = (
    Needle,
    Needles,
    StoryRetrieval,
    Tracking,
    StoryMultiHop,
    CommonWords,
    StoryFiltering,
)


def text_tasks(
    tokenizer: Any = None, *, chat: bool = False, template: int = 0, documents: str | Path | None = None
) -> tuple[TextTask, ...]:
    """The tasks for a transformers tokenizer, or bytes; see ``codec_of``. ``documents``: a user's file of questions.

    Raises ``TaskError``.
    """
    codec = codec_of(tokenizer, chat=chat)
    own = read(documents, codec) if documents is not None else ()
    if template not in (0, 1):
        raise TaskError(f"template={template!r}; accepted are 0 and 1.")
    written = tuple(kind(codec=codec, template=template) for kind in TEXT_TASKS)  # type: ignore[call-arg]
    return (*written, *(replace(task, template=template) for task in own))


__all__ = [
    "TEXT_TASKS",
    "Bytes",
    "Codec",
    "CommonWords",
    "DocumentQA",
    "Needle",
    "Needles",
    "StoryFiltering",
    "StoryMultiHop",
    "StoryRetrieval",
    "TextTask",
    "Tokenized",
    "Tracking",
    "codec_of",
    "read",
    "text_tasks",
]
