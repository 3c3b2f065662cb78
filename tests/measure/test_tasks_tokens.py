"""The token-level tasks: exact lengths, answers that follow from the context alone, one distribution everywhere."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepass.measure.tasks import Sample, TaskError
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from sparsepass.measure.tasks.tokens import vocabulary as v
from sparsepass.measure.tasks.tokens.drawing import IGNORED, SHORTEST
from sparsepass.request.hints import TaskHint
from sparsepass.types import TaskClass

by_task = pytest.mark.parametrize("task", TOKEN_TASKS, ids=lambda task: task.name)


def pairs(context: tuple[int, ...]) -> dict[int, int]:
    """What stands behind each name, and behind each value that another name was linked to."""
    found = {}
    for token, after in itertools.pairwise(context):
        if token in v.NAMES and after in v.VALUES:
            found[token] = after
    return found


def links(context: tuple[int, ...]) -> dict[int, int]:
    """From each name to the name or value that it was set to."""
    triples = zip(context, context[1:], context[2:], strict=False)
    return {target: source for marker, source, target in triples if marker in v.LINK}


def solve(name: str, context: tuple[int, ...], prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The answer, found in plain Python by what the task says; shares no code with the generators."""
    if name == "token_needle":
        return (pairs(context)[prompt[1]],)
    if name == "token_needles":
        return tuple(pairs(context)[key] for key in prompt[1:5])
    if name == "token_chains":
        walked, sets = [prompt[1]], links(context)
        while walked[-1] in sets:
            walked.append(sets[walked[-1]])
        return tuple(reversed(walked[1:]))
    kind = next(ids.index(prompt[0]) for ids in v.ASK_TOP if prompt[0] in ids)
    counts = Counter(token for token in context if token in v.GROUPS[kind])
    ranked = counts.most_common(4)
    assert all(more[1] > less[1] for more, less in itertools.pairwise(ranked)), "the ranking is not unique"
    return tuple(token for token, _ in ranked[:3])


@by_task
@given(length=st.integers(SHORTEST, 1400), seed=st.integers(0, 2**40), template=st.integers(0, 1))
def test_length_is_exact_and_answers_follow_from_the_context(
    task: TokenTask, length: int, seed: int, template: int
) -> None:
    sample = dataclasses.replace(task, template=template).draw(length, seed, questions=3)
    assert sample == dataclasses.replace(task, template=template).draw(length, seed, questions=3)
    assert (sample.task, sample.length, sample.seed) == (task.name, length, seed)
    for question in sample.questions:
        tokens = (*sample.context, *question.prompt, *question.answer)
        assert len(tokens) == length
        assert all(0 <= token < v.SIZE for token in tokens)
        assert solve(task.name, sample.context, question.prompt) == question.answer


@by_task
def test_chance_is_at_most_two_percent(task: TokenTask) -> None:
    """Guessing among what the context has of the answer's kind is right in at most 1 of 50."""
    sample = task.draw(1024, 0)
    if task.task_class == TaskClass.AGGREGATION:
        assert len({token for token in sample.context if token in v.GROUPS[0]}) > 100
    elif task.task_class == TaskClass.MULTI_HOP:
        assert len(links(sample.context)) == 3 * 64
    else:
        assert len(pairs(sample.context)) == 128


@by_task
def test_classes_are_those_of_scope_and_dispersion(task: TokenTask) -> None:
    queries = 4 if task.task_class == TaskClass.MULTI_QA else 1
    assert TaskHint(task.scope, task.dispersion, queries).task_class == task.task_class


def statistics(samples: list[Sample]) -> tuple[float, float, float]:
    """Where the answer stands, how often its token does, and the mean token: each over the samples."""
    places, counts, tokens = [], [], []
    for sample in samples:
        first = sample.questions[0].answer[0]
        places.append(sample.context.index(first) / len(sample.context))
        counts.append(sample.context.count(first))
        tokens.append(sum(sample.context) / len(sample.context))
    return tuple(sum(one) / len(one) for one in (places, counts, tokens))  # type: ignore[return-value]


@by_task
def test_training_and_evaluation_draw_alike(task: TokenTask) -> None:
    """One at a time on the CPU, or many at once by training's call: the same distribution, and the same answers."""
    alone = [task.draw(256, seed) for seed in range(150)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = task.draw_many(600, 256, torch.Generator(device).manual_seed(1))
    together = [
        dataclasses.replace(
            alone[0],
            context=tuple(context),
            questions=(dataclasses.replace(alone[0].questions[0], prompt=tuple(prompt), answer=tuple(answer)),),
        )
        for context, prompt, answer in zip(
            drawn.context.tolist(), drawn.prompts[:, 0].tolist(), drawn.answers[:, 0].tolist(), strict=True
        )
    ]
    for sample in together:
        question = sample.questions[0]
        assert solve(task.name, sample.context, question.prompt) == question.answer
    for mine, theirs in zip(statistics(alone), statistics(together), strict=True):
        assert mine == pytest.approx(theirs, rel=0.15, abs=0.08)


@by_task
def test_easier_samples_have_a_quarter_of_the_items_or_more(task: TokenTask) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = task.draw_many(60, 512, generator, questions=4, easier=True, mixed_templates=True, context=400)
    sizes = set()
    for context, prompts, answers in zip(
        drawn.context.tolist(), drawn.prompts.tolist(), drawn.answers.tolist(), strict=True
    ):
        assert len(context) == 400
        for prompt, answer in zip(prompts, answers, strict=True):
            assert solve(task.name, tuple(context), tuple(prompt)) == tuple(answer)
        if task.task_class != TaskClass.AGGREGATION:
            sizes.add(len(pairs(tuple(context))) or len(links(tuple(context))))
    if sizes:
        full = 64 if task.items(512) == 64 else 32 * 3
        assert full / 4 <= min(sizes) < full / 3
        assert full * 0.9 < max(sizes) <= full
    assert len({prompts[0][0] for prompts in drawn.prompts.tolist()}) > 1


def test_links_are_supervised_with_the_value_that_their_name_ends_at() -> None:
    task = TOKEN_TASKS[2]
    drawn = task.draw_many(5, 256, torch.Generator().manual_seed(0), easier=True)
    assert drawn.link_places is not None
    assert drawn.link_targets is not None
    scored = 0
    for context, places, targets in zip(
        drawn.context.tolist(), drawn.link_places.tolist(), drawn.link_targets.tolist(), strict=True
    ):
        sets = links(tuple(context))
        for place, target in zip(places, targets, strict=True):
            if target == IGNORED:
                continue
            scored += 1
            end, hops = context[place], 0
            while end in sets:
                end, hops = sets[end], hops + 1
            assert end == target
            assert hops in (2, 3)
    assert scored > 50


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(TaskError, match="accepted are 1 or more questions and 96 tokens or more"):
        TOKEN_TASKS[0].draw(40, 0)
    with pytest.raises(TaskError, match="0 questions"):
        TOKEN_TASKS[0].draw(400, 0, questions=0)
