"""All tasks by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsepass.errors import close_names
from sparsepass.measure.tasks.base import Task, TaskError
from sparsepass.measure.tasks.text import text_tasks
from sparsepass.measure.tasks.tokens import TOKEN_TASKS


def catalogue(tokenizer: Any = None, *, chat: bool = False, documents: str | Path | None = None) -> dict[str, Task]:
    """Every task that ships, with a user's own questions if a file is given. Raises ``TaskError``."""
    tasks: list[Task] = [*TOKEN_TASKS, *text_tasks(tokenizer, chat=chat, documents=documents)]
    return {task.name: task for task in tasks}


def task_named(name: str, tokenizer: Any = None, *, chat: bool = False, documents: str | Path | None = None) -> Task:
    """The task of this name. Raises ``TaskError`` naming close ones."""
    known = catalogue(tokenizer, chat=chat, documents=documents)
    if name not in known:
        raise TaskError(f"No task {name!r}. {close_names(name, known)}")
    return known[name]
