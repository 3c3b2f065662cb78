"""Questions on a user's own documents, from a file of JSON lines.

One line per question: ``{"document": "...", "question": "...", "answer": "..."}``, with ``"choices": ["...", ...]``
where the answer is one of them, and a ``"title"`` if there is one. Lines with the same document are questions on it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsepass.errors import shown, shown_path
from sparsepass.host.files import json_lines, parse_json, read_text
from sparsepass.measure.tasks.base import TaskError
from sparsepass.measure.tasks.metrics import exact_match, word_f1
from sparsepass.measure.tasks.text.codec import Codec
from sparsepass.measure.tasks.text.writing import Measure, TextTask, Written
from sparsepass.request.hints import Level
from sparsepass.types import TaskClass

FIELDS = ("document", "question", "answer", "choices", "title")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASKED = (
    "Answer by document {number}, with a few of its words: {question}",
    "{question} Document {number} says it; answer in a few words.",
)
CHOSEN = (
    "Answer by document {number}, with a letter alone: {question}\n{choices}",
    "{question}\n{choices}\nDocument {number} says it; answer with a letter alone.",
)


@dataclass(frozen=True)
class Record:
    """A line of the file."""

    document: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    title: str = ""


@dataclass(frozen=True)
class DocumentQA(TextTask):
    """The document of the questions among others of the file, as many as fit; sentences that say nothing fill the rest.

    Scored by the F1 of words, or with choices by the letter.
    """

    name: str = "text_documents"
    task_class: TaskClass = TaskClass.SINGLE_QA
    scope: Level = "low"
    dispersion: Level = "low"
    measure: Measure = word_f1
    records: tuple[Record, ...] = field(default=(), repr=False)

    def write(self, size: int, questions: int, dice: random.Random) -> Written:
        if not self.records:
            raise TaskError(
                f"{self.name} has no questions; read them from a file with sparsepass.measure.tasks.text.read."
            )
        by_document: dict[str, list[Record]] = {}
        for record in self.records:
            by_document.setdefault(record.document, []).append(record)
        documents = list(by_document)
        target = dice.choice(documents)
        others = [one for one in documents if one != target]
        shown = dice.sample(others, len(others))[: size - 1]
        shown.insert(dice.randrange(len(shown) + 1), target)
        titles = [by_document[one][0].title for one in shown]
        pieces = tuple(
            f"Document {number}{': ' if title else ''}{title}\n{document.strip()}\n\n"
            for number, (title, document) in enumerate(zip(titles, shown, strict=True), start=1)
        )
        mine = by_document[target]
        number = shown.index(target) + 1
        asked = dice.sample(mine, min(questions, len(mine)))
        return Written(pieces, tuple(self._asked(record, number) for record in asked))

    def _asked(self, record: Record, number: int) -> tuple[str, str]:
        if not record.choices:
            return ASKED[self.template].format(number=number, question=record.question), record.answer
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, record.choices, strict=False))
        question = CHOSEN[self.template].format(number=number, question=record.question, choices=listed)
        return question, LETTERS[record.choices.index(record.answer)]


def read(file: str | Path, codec: Codec) -> tuple[DocumentQA, ...]:
    """The tasks in a file: ``text_documents`` for questions without choices, ``text_choices`` for those with.

    Raises ``TaskError`` naming the line that is not as the format says, or the file that is not there.
    """
    path = Path(file)
    lines = json_lines(read_text(path, "file of documents", TaskError))
    records = [_record(line, f"{shown_path(path)}, line {place}") for place, line in lines]
    if not records:
        raise TaskError(
            f"{shown_path(path)} has no questions; accepted is one JSON object per line with {', '.join(FIELDS[:3])}."
        )
    free = tuple(record for record in records if not record.choices)
    chosen = tuple(record for record in records if record.choices)
    found = []
    if free:
        found.append(DocumentQA(records=free, codec=codec))
    if chosen:
        found.append(DocumentQA(name="text_choices", records=chosen, codec=codec, measure=exact_match))
    return tuple(found)


def _record(line: str, where: str) -> Record:
    content = parse_json(line, where, TaskError)
    if not isinstance(content, Mapping):
        raise TaskError(f"{where} is a {type(content).__name__}; accepted is an object with {', '.join(FIELDS[:3])}.")
    unknown = [key for key in content if key not in FIELDS]
    if unknown:
        raise TaskError(f"{where} has {shown(unknown[0])}; accepted are {', '.join(FIELDS)}.")
    texts = {key: _text(content, key, where) for key in FIELDS[:3]}
    choices = content.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices) or len(choices) > len(LETTERS):
        raise TaskError(f"{where}: choices is {shown(choices)}; accepted is a list of at most {len(LETTERS)} texts.")
    if choices and texts["answer"] not in choices:
        raise TaskError(f"{where}: the answer {shown(texts['answer'])} is none of the choices.")
    return Record(**texts, choices=tuple(choices), title=str(content.get("title", "")))


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    found = content.get(key)
    if not isinstance(found, str) or not found.strip():
        raise TaskError(f"{where}: {key} is {shown(found)}; accepted is a text that is not empty.")
    return found
