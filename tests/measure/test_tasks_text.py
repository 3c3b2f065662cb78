"""Tasks in words: exact lengths with any tokenizer, answers that follow from the text, metrics, a user's documents."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.measure.tasks import TaskError, metrics
from sparsepass.measure.tasks.base import Sample, Task
from sparsepass.measure.tasks.catalogue import catalogue, task_named
from sparsepass.measure.tasks.intervals import bootstrap
from sparsepass.measure.tasks.text import TextTask, codec_of, read, text_tasks
from sparsepass.measure.tasks.text.story import EVENTS
from sparsepass.request.hints import TaskHint
from sparsepass.types import TaskClass

TASKS = text_tasks()
by_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
ITEM = {
    0: r"Chapter (\d+)\. .* (\w+) traded what was held so far for the ([a-z ]+)\.",
    1: r"Chapter (\d+)\. .* The ([a-z ]+) came to (\w+),",
}


def asked(sample: Sample) -> list[tuple[str, str, str]]:
    """Context, question and answer as text, by bytes."""
    context = bytes(sample.context).decode()
    return [(context, bytes(one.prompt).decode(), bytes(one.answer).decode().strip()) for one in sample.questions]


def trades(context: str, template: int) -> list[tuple[str, str]]:
    """Who got what, in order."""
    found = re.findall(ITEM[template], context)
    return [(who, item) for _, who, item in found] if template == 0 else [(who, item) for _, item, who in found]


def solve(name: str, template: int, context: str, question: str) -> list[str]:
    """The answer, read out of the text; shares no code with the generators."""
    if name in ("text_needle", "text_needles"):
        said = (r"The code of the ([\w ]+) is (\d+)\.", r"Whoever opens the ([\w ]+) needs the number (\d+)\.")
        codes = dict(re.findall(said[template], context))
        return [codes[one] for one in re.findall(r"the (\w+ \w+ of \w+)", question)]
    if name == "text_tracking":
        said = (r"Let (\w+) = (\w+)\.", r"(\w+) (?:is set to|takes what) (\w+)(?: has)?\.")
        (value,) = re.findall(r"\d+", question)
        ends: dict[str, str] = {}
        for target, source in re.findall(said[template], context):
            ends[target] = ends.get(source, source)  # each source was set before it was copied
        return sorted(target for target, end in ends.items() if end == value)
    if name == "text_common_words":
        words = Counter(word for line in context.splitlines() if "." not in line for word in line.split())
        ranked = words.most_common(11)
        assert ranked[9][1] == 10 * ranked[10][1]
        return sorted(word for word, _ in ranked[:10])
    if name == "text_story_retrieval":
        first = re.findall(r"Chapter (\d+)\. .*?(\w+) was in (\w+), and (\w+) was in (\w+)\.", context)
        second = re.findall(r"Chapter (\d+)\. (\w+) saw (\w+) .*?; (\w+) stayed in (\w+)\.", context)
        chapters = [*first, *((number, who, here, *rest) for number, here, who, *rest in second)]
        places = {(one[0], one[1]): one[2] for one in chapters} | {(one[0], one[3]): one[4] for one in chapters}
        pairs = re.findall(r"(\w+) in chapter (\d+)", question) if template == 0 else []
        pairs = pairs or [(who, number) for number, who in re.findall(r"chapter (\d+) for (\w+)", question)]
        return [places[number, who].casefold() for who, number in pairs]
    if name == "text_story_multi_hop":
        one = re.search(r"did (\w+) (?:hold right before|let go for) the ([a-z ]+)\?", question)
        assert one is not None
        mine = [item for who, item in trades(context, template) if who == one[1]]
        return [mine[mine.index(one[2]) - 1]]
    (event,) = (event for event in EVENTS if re.search(rf"(?:no|without a) {event}", question))
    chapters = re.findall(r"Chapter (\d+)\.(.*)", context)
    return sorted(number for number, text in chapters if EVENTS[event] not in text)


@by_task
@given(length=st.integers(2400, 9000), seed=st.integers(0, 2**40), template=st.integers(0, 1))
def test_length_is_exact_and_answers_follow_from_the_text(
    task: TextTask, length: int, seed: int, template: int
) -> None:
    (task,) = (one for one in text_tasks(template=template) if one.name == task.name)
    sample = task.draw(length, seed, questions=3)
    assert sample == task.draw(length, seed, questions=3)
    assert (sample.task, sample.length, sample.seed) == (task.name, length, seed)
    assert max(len(sample.context) + len(one.prompt) + len(one.answer) for one in sample.questions) == length
    for (context, question, answer), one in zip(asked(sample), sample.questions, strict=True):
        gold = [item.casefold() for item in answer.split(", ")]
        unordered = task.measure is metrics.iou
        found = [item.casefold() for item in solve(task.name, template, context, question)]
        assert found == (sorted(gold) if unordered else gold)
        assert sample.metric(one.answer, one.answer) == 1.0
        assert sample.metric((*one.answer, *b"\nmore, text"), one.answer) == 1.0
        assert sample.metric(tuple(b" nothing of it"), one.answer) == 0.0


@by_task
def test_classes_are_those_of_scope_and_dispersion(task: TextTask) -> None:
    queries = 4 if task.task_class == TaskClass.MULTI_QA else 1
    assert TaskHint(task.scope, task.dispersion, queries).task_class == task.task_class


@by_task
def test_most_of_a_context_is_the_tasks_own(task: TextTask) -> None:
    """What fills the last tokens is less than a few sentences."""
    context = asked(task.draw(6000, 5))[0][0]
    lines = context.splitlines()
    if task.name == "text_tracking":
        assert sum("=" in line for line in lines) == 40
        return
    own = re.compile(r"Chapter|The code|(\w+ ){11}\w+$")
    filled = itertools.takewhile(lambda line: not own.match(line), reversed(lines))
    assert sum(map(len, filled)) < 500


@by_task
def test_a_length_without_room_is_refused(task: TextTask) -> None:
    with pytest.raises(TaskError, match=r"100 tokens are too few; with this codec it takes \d+ or more"):
        task.draw(100, 0)
    with pytest.raises(TaskError, match="questions=0"):
        task.draw(8000, 0, questions=0)


TEMPLATE = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE with a few hundred merges, trained here, as a transformers tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    own = tokenizers.ByteLevelBPETokenizer()
    text = [asked(task.draw(4000, 0))[0][0] for task in TASKS]
    own.train_from_iterator(text, vocab_size=700, special_tokens=["<s>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own._tokenizer, bos_token="<s>", chat_template=TEMPLATE
    )


@pytest.mark.parametrize("chat", [False, True])
def test_a_tokenizers_length_is_exact(tokenizer: Any, chat: bool) -> None:
    for task in text_tasks(tokenizer, chat=chat):
        sample = task.draw(2500, 3, questions=2)
        assert max(len(sample.context) + len(one.prompt) + len(one.answer) for one in sample.questions) == 2500
        question = sample.questions[0]
        text = tokenizer.decode([*sample.context, *question.prompt, *question.answer])
        assert text.startswith("<u>" if chat else "<s>")
        assert ("</u><a> " if chat else "\nAnswer: ") in text
        assert sample.metric(question.answer, question.answer) == 1.0
        plain = text.removeprefix("<s>").removeprefix("<u>").replace("</u><a>", "")
        context, _, rest = plain.rpartition("\n" + tokenizer.decode(question.prompt).strip().split("\n")[0])
        gold = [item.casefold() for item in tokenizer.decode(question.answer).strip().split(", ")]
        found = [item.casefold() for item in solve(task.name, 0, context, tokenizer.decode(question.prompt))]
        assert rest
        assert sorted(found) == sorted(gold)


def test_a_chat_needs_a_template(tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="bytes have no chat template"):
        text_tasks(chat=True)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    with pytest.raises(TaskError, match="no chat template"):
        text_tasks(tokenizer, chat=True)
    assert codec_of(tokenizer).head == ()
    with pytest.raises(TaskError, match="template=2"):
        text_tasks(template=2)


def test_metrics() -> None:
    assert metrics.iou("abc", "bcd") == 0.5
    assert metrics.in_place("abxd", "abcd") == 0.75
    assert metrics.in_place("", "abcd") == 0.0
    assert metrics.in_place("", "") == 1.0
    assert metrics.word_f1(["The Old, gray mill!"], ["old mill"]) == pytest.approx(0.8)
    assert metrics.word_f1([], ["old mill"]) == 0.0


LINES: list[dict[str, Any]] = [
    {"document": "The mill stands by the river. " * 9, "question": "Where is the mill?", "answer": "by the river"},
    {"document": "The mill stands by the river. " * 9, "question": "What stands there?", "answer": "the mill"},
    {"document": "Ada keeps bees. " * 15, "question": "Who keeps bees?", "answer": "Ada", "title": "Bees"},
    {
        "document": "Ships left at noon. " * 12,
        "question": "When did ships leave?",
        "answer": "noon",
        "choices": ["dawn", "noon", "dusk"],
    },
]


def test_a_users_documents(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text("\n\n".join(map(json.dumps, LINES)))
    free, chosen = read(file, codec_of())
    assert (free.name, chosen.name) == ("text_documents", "text_choices")
    seen = set()
    for seed in range(8):
        sample = free.draw(1500, seed, questions=2)
        for context, question, answer in asked(sample):
            seen.add(answer)
            (number,) = re.findall(r"document (\d)", question)
            (record,) = (one for one in LINES if one["answer"] == answer)
            title = f": {record['title']}" if "title" in record else ""
            assert f"Document {number}{title}\n{record['document'].strip()}\n" in context
            assert record["question"] in question
        assert max(len(sample.context) + len(one.prompt) + len(one.answer) for one in sample.questions) == 1500
    assert seen == {"by the river", "the mill", "Ada"}
    assert free.metric(tuple(b" River."), tuple(b" by the river")) == pytest.approx(2 / 3)
    ((_, question, answer),) = asked(chosen.draw(700, 0, questions=3))
    assert answer == "B"
    assert "\nA. dawn\nB. noon\nC. dusk" in question
    assert {"text_documents", "text_choices", "token_needle"} < set(catalogue(documents=file))
    with pytest.raises(TaskError, match=r"200 tokens are too few"):
        free.draw(200, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ('{"document": "a", "question": "b"}', "line 2: answer is None"),
        ('{"document": " ", "question": "b", "answer": "c"}', "line 2: document is ' '"),
        ('{"document": "a", "question": "b", "answer": "c", "label": 1}', "line 2 has 'label'"),
        ('{"document": "a", "question": "b", "answer": "c", "choices": ["d"]}', "'c' is none of the choices"),
        ('{"document": "a", "question": "b", "answer": "c", "choices": "c"}', "accepted is a list"),
    ],
)
def test_lines_that_are_not_as_the_format_says(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(f"{json.dumps(LINES[0])}\n{line}\n")
    with pytest.raises(TaskError, match=re.escape(message)):
        read(file, codec_of())


def test_files_without_questions(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        read(tmp_path / "none", codec_of())
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(TaskError, match="has no questions"):
        read(tmp_path / "empty", codec_of())


def test_tasks_by_name() -> None:
    names = [task.name for task in TASKS]
    assert len(set(names)) == 7
    task: Task = task_named("text_tracking")
    assert task.task_class == TaskClass.MULTI_HOP
    with pytest.raises(TaskError, match="text_tracking"):
        task_named("text_trackin")


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Contexts differ in difficulty, so intervals that resampled questions alone would be too narrow."""
    dice = random.Random(0)
    held = 0
    for trial in range(200):
        chances = [dice.choice((0.5, 0.9)) for _ in range(40)]
        scores = [[float(dice.random() < chance) for _ in range(8)] for chance in chances]
        found = bootstrap(scores, level=0.9, rounds=300, seed=trial)
        held += found.low <= 0.7 <= found.high
    assert 0.82 <= held / 200 <= 0.96
    assert str(bootstrap([[1.0], [1.0]])) == "1.000 (1.000 to 1.000)"
    with pytest.raises(ValueError, match="0 contexts"):
        bootstrap([[]])
