"""Scoring: every mode asks what it says, by models that solve the tasks, and a testbed that was trained."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import sparsepass
from sparsepass.measure import testbed
from sparsepass.measure.tasks import Sample, TaskError
from sparsepass.measure.tasks.score import ROOM, answer, score
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from tests.measure.test_tasks_tokens import solve
from tests.tiny import model

SIZE = 4096
by_task = pytest.mark.parametrize("task", TOKEN_TASKS, ids=lambda task: task.name)


class Oracle:
    """Gives the right next token after every prompt of the sample; ``wrong`` questions get another last token."""

    def __init__(self, sample: Sample, task: TokenTask, wrong: frozenset[int] = frozenset()) -> None:
        self.sample, self.task = sample, task
        self.seen: list[torch.Tensor] = []
        self.answers = {}
        for number, question in enumerate(sample.questions):
            right = solve(task.name, sample.context, question.prompt)
            self.answers[question.prompt] = (*right[:-1], right[-1] - 1) if number in wrong else right

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(ids)
        logits = torch.zeros(*ids.shape, SIZE)
        asked = self.task.prompt_size
        for row, tokens in enumerate(ids.tolist()):
            for end in range(asked, len(tokens) + 1):
                for place, token in enumerate(self.answers.get(tuple(tokens[end - asked : end]), ())):
                    if end - 1 + place < len(tokens):
                        logits[row, end - 1 + place, token] = 1.0
        return logits

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        self.seen.append(ids)
        rows = [self.answers[tuple(row[-self.task.prompt_size :])][:max_new_tokens] for row in ids.tolist()]
        return torch.cat([ids, torch.tensor(rows)], dim=1)


@by_task
@pytest.mark.parametrize("mode", ["generate", "forced", "packed"])
def test_right_answers_score_one_and_wrong_ones_nothing(task: TokenTask, mode: str) -> None:
    sample = task.draw(700, 3, questions=4)
    model = Oracle(sample, task, frozenset({1}))
    assert len({question.prompt for question in sample.questions}) == 4
    assert score(model, sample, task_hint="multi_hop", mode=mode) == [1.0, 0.0, 1.0, 1.0]  # type: ignore[arg-type]


@by_task
@pytest.mark.parametrize("align", [16, 64])
def test_packed_questions_stand_in_blocks_of_their_own(task: TokenTask, align: int) -> None:
    """Nothing of the context is lost, no two questions share a block, and the sequence stays within its room."""
    sample = task.draw(900, 1, questions=40)
    sample = dataclasses.replace(sample, questions=tuple(dict.fromkeys(sample.questions)))
    model = Oracle(sample, task)
    assert set(score(model, sample, mode="packed", align=align)) == {1.0}
    found = 0
    for ids in model.seen:
        assert ids.shape[0] == 1
        tokens = tuple(ids[0].tolist())
        assert tokens[: len(sample.context)] == sample.context
        assert len(tokens) <= sample.length * (1 + ROOM) + align
        used: set[int] = set()
        for question in sample.questions:
            asked = (*question.prompt, *question.answer)
            starts = [at for at in range(len(tokens)) if tokens[at : at + len(asked)] == asked]
            if starts:
                found += 1
                blocks = {place // align for place in range(starts[-1], starts[-1] + len(asked))}
                assert not blocks & used
                used |= blocks
    assert found == len(sample.questions)


def test_forced_rows_are_context_question_and_answer() -> None:
    sample = TOKEN_TASKS[1].draw(300, 0, questions=3)
    model = Oracle(sample, TOKEN_TASKS[1])
    assert score(model, sample, mode="forced") == [1.0] * 3
    rows = [tuple(row) for ids in model.seen for row in ids.tolist()]
    assert rows == [(*sample.context, *question.prompt, *question.answer) for question in sample.questions]
    assert {len(row) for row in rows} == {300}


def test_the_hint_is_in_force_while_the_model_runs() -> None:
    sample = TOKEN_TASKS[0].draw(200, 0)
    hints = []

    def model(ids: torch.Tensor) -> torch.Tensor:
        hints.append(sparsepass.current_task())
        return torch.zeros(*ids.shape, SIZE)

    score(model, sample, task_hint="multi_hop", mode="forced")
    score(model, sample, mode="forced")
    assert [str(hint) for hint in hints] == ["multi_hop", "unknown"]


def test_a_users_own_metric_and_samples_that_cannot_be_packed() -> None:
    task = TOKEN_TASKS[1]
    sample = task.draw(300, 0, questions=2)
    model = Oracle(sample, task, frozenset({0}))

    def share(mine: object, gold: object) -> float:
        return sum(a == b for a, b in zip(mine, gold, strict=True)) / len(gold)  # type: ignore[call-overload, arg-type]

    assert score(model, sample, mode="forced", metric=share) == [0.75, 1.0]
    with pytest.raises(TaskError, match="take mode='forced'"):
        answer(model, dataclasses.replace(sample, gap=()), mode="packed")
    with pytest.raises(TaskError, match="accepted are generate, forced, shared, packed"):
        answer(model, sample, mode="fast")  # type: ignore[arg-type]


def test_the_testbed_answers() -> None:
    """The weights that ship answer each class, asked one at a time or together."""
    pytest.importorskip("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = testbed.load(dtype=torch.float32, device=device)
    for task in TOKEN_TASKS:
        sample = task.draw(320, 11, questions=4)
        for mode in ("forced", "shared", "packed", "generate"):
            scores = score(model, sample, mode=mode)  # type: ignore[arg-type]
            assert sum(scores) >= 3, (task.name, mode, scores)
        forced = answer(model, sample, mode="forced")
        assert forced == answer(model, sample, mode="shared") == answer(model, sample, mode="generate")


def test_models_that_return_an_object_with_logits() -> None:
    sample = TOKEN_TASKS[0].draw(200, 0)
    oracle = Oracle(sample, TOKEN_TASKS[0])

    def wrapped(ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=oracle(ids))

    assert score(wrapped, sample, mode="forced") == [1.0]


def test_questions_side_by_side_do_not_see_each_other() -> None:
    """A random model answers each as alone behind the context, though they are of two lengths and share one cache."""
    pytest.importorskip("transformers")
    net = model("llama", vocab_size=4096)
    one, many = (task.draw(400, 3, questions=7) for task in (TOKEN_TASKS[0], TOKEN_TASKS[1]))
    sample = dataclasses.replace(one, questions=(*one.questions, *many.questions))
    assert answer(net, sample, mode="shared") == answer(net, sample, mode="forced")


def test_a_model_with_windows_of_its_own_is_asked_one_question_at_a_time() -> None:
    """A mask would take the place of its windows."""
    pytest.importorskip("transformers")
    net = model("mistral", vocab_size=4096, sliding_window=100)
    sample = TOKEN_TASKS[0].draw(300, 3, questions=4)
    assert answer(net, sample, mode="shared") == answer(net, sample, mode="forced")
