"""Scores of a model on a sample: its questions answered under a task hint.

What is sparse is the prefill. Four ways to answer, by how much they share and how near they are to a request:

- ``generate``: each question alone behind the context is prefilled, and the answer generated greedily; decoding is
  dense. What a user's request does.
- ``forced``: each question alone with its right answer behind it, in one prefill. An answer's token is the most likely
  one after the right ones before it, so the whole answer is right exactly where greedy generation gives it, if the
  answer's tokens were sparse too.
- ``shared``: as ``forced``, but the context is prefilled once, without a question, and its cache kept; then the
  questions follow it, side by side, each blind to the others. What a server with a prefix cache does with many
  questions on one document. Selection that looks at the last queries sees the context's; the question's own rows are
  for whoever compiled the model to decide, and few enough to stay dense.
- ``packed``: as ``forced``, with several questions behind one context, each in a query block of its own with filler
  between them. Selection that works by query block sees each question alone; selection by the last queries of all, or
  that computes the last blocks densely, does not, and looks worse than it is.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch

from sparsepass.host.environment import device_of
from sparsepass.measure.models import branch
from sparsepass.measure.tasks.base import Metric, Question, Sample, TaskError
from sparsepass.measure.tasks.metrics import exact_match
from sparsepass.request.hints import Hint, task

Mode = Literal["generate", "forced", "shared", "packed"]

ROOM = 0.25
"""Of a packed sequence, over the sample's length: what questions may add. So it stays in the same length bucket."""

TOKENS_AT_ONCE = {"cpu": 1, "cuda": 2**17}
"""Tokens of a batch; on the CPU one row at a time, as more would not be faster."""

ASKED_AT_ONCE = 2**9
"""Tokens of questions that follow a cache side by side: their mask has so many rows."""


def score(
    model: Any,
    sample: Sample,
    *,
    task_hint: Hint | None = None,
    mode: Mode | None = None,
    metric: Metric | None = None,
    align: int = 64,
) -> list[float]:
    """One score per question, 0.0 to 1.0, in the sample's order, by the sample's metric if none is given.

    ``model``: a causal language model of transformers, or what maps ids [B, S] to logits [B, S, V] (not to
    ``generate`` and ``shared``). It runs as it is compiled, without gradients. ``mode``: ``forced`` by default where
    answers must match exactly, ``generate`` elsewhere. ``align``: the query block in tokens, for ``packed``.
    Raises ``TaskError`` for an unknown mode, or to pack a sample without filler.
    """
    measure = metric or sample.metric
    chosen = mode or ("forced" if measure is exact_match else "generate")
    answers = answer(model, sample, task_hint=task_hint, mode=chosen, align=align)
    return [measure(mine, question.answer) for mine, question in zip(answers, sample.questions, strict=True)]


def answer(
    model: Any, sample: Sample, *, task_hint: Hint | None = None, mode: Mode = "generate", align: int = 64
) -> list[tuple[int, ...]]:
    """The token ids that the model answers each question with; see ``score``."""
    if mode not in get_args(Mode):
        raise TaskError(f"mode={mode!r}; accepted are {', '.join(get_args(Mode))}.")
    if mode == "packed" and not sample.gap:
        raise TaskError(f"{sample.task} brings no filler to stand between questions; take mode='forced'.")
    hinted: AbstractContextManager[Any] = nullcontext() if task_hint is None else task(task_hint)
    with torch.no_grad(), hinted:
        if mode == "packed":
            return list(_packed(model, sample, align))
        return _rows(model, sample, mode)


def _packed(model: Any, sample: Sample, align: int) -> Iterator[tuple[int, ...]]:
    for group in _groups(sample, align):
        tokens, places = list(sample.context), []
        for number, question in enumerate(group):
            asked = len(question.prompt) + len(question.answer)
            if number:
                end = (-(-len(tokens) // align) - (-asked // align)) * align  # whole blocks after those in use
                tokens += itertools.islice(itertools.cycle(sample.gap), end - asked - len(tokens))
            tokens += question.prompt
            places += [len(tokens) - 1 + place for place in range(len(question.answer))]
            tokens += question.answer
        best = best_tokens(model, torch.tensor([tokens]), places)[0].tolist()
        for question in group:
            yield tuple(best[: len(question.answer)])
            best = best[len(question.answer) :]


def questions_at_once(length: int, align: int = 64) -> int:
    """How many questions share one packed sequence behind a context of ``length`` tokens, if each takes a block."""
    return 1 + int(ROOM * length) // align


def _groups(sample: Sample, align: int) -> Iterator[list[Question]]:
    """Questions that share a sequence: at least one, and as many as ``ROOM`` has blocks for."""
    room, group = int(ROOM * sample.length), list[Question]()
    taken = 0
    for question in sample.questions:
        asked = len(question.prompt) + len(question.answer)
        blocks = -(-asked // align) * align
        if group and taken + blocks > room:
            yield group
            group, taken = [], 0
        taken += blocks if group else 0  # the first stands where it stands alone
        group.append(question)
    if group:
        yield group


def _rows(model: Any, sample: Sample, mode: Mode) -> list[tuple[int, ...]]:
    """Each question by itself; those of one length in batches of one size, so that none compiles anew."""
    answers: list[tuple[int, ...]] = [()] * len(sample.questions)
    sizes: dict[tuple[int, int], list[int]] = {}
    cache = _prefilled(model, sample.context) if mode == "shared" else None
    for number, question in enumerate(sample.questions):
        sizes.setdefault((len(question.prompt), len(question.answer)), []).append(number)
    for (asked, size), numbers in sizes.items():
        if cache is None:
            most = TOKENS_AT_ONCE.get(device_of(model).type, 2**17) // (len(sample.context) + asked)
        else:
            most = ASKED_AT_ONCE // (asked + size) if _takes_masks(model, cache) else 1
        batch = min(len(numbers), max(1, most))
        for start in range(0, len(numbers), batch):
            mine = numbers[start : start + batch]
            filled = mine + [mine[-1]] * (batch - len(mine))
            questions = [sample.questions[number] for number in filled]
            if cache is None:
                found = _batch(model, sample, questions, size, mode)
            else:
                found = _behind(model, cache, len(sample.context), questions, size)
            for number, row in zip(mine, found, strict=False):
                answers[number] = tuple(row)
    return answers


def _batch(model: Any, sample: Sample, questions: Sequence[Question], size: int, mode: Mode) -> list[list[int]]:
    rows = [[*sample.context, *question.prompt] for question in questions]
    start = len(rows[0])
    if mode == "generate":
        ids = torch.tensor(rows, device=device_of(model))
        new = size if sample.metric is exact_match else size + max(8, size // 2)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        generated: list[list[int]] = out[:, start:].tolist()
        return generated
    ids = torch.tensor([[*row, *question.answer] for row, question in zip(rows, questions, strict=True)])
    forced: list[list[int]] = best_tokens(model, ids, [start - 1 + place for place in range(size)]).tolist()
    return forced


def _behind(model: Any, cache: Any, start: int, questions: Sequence[Question], size: int) -> list[list[int]]:
    """The answers to questions of one length behind a cache of ``start`` tokens, with which they share nothing else.

    Many stand side by side in one row, each at the positions that it has alone, and see the cache and themselves
    (the mask of tree attention, SpecInfer, arXiv 2305.09781).
    """
    ids = torch.tensor([[*question.prompt, *question.answer] for question in questions])
    count, length = ids.shape
    answered = torch.arange(count)[:, None] * length + torch.arange(length - size - 1, length - 1)
    extra: dict[str, Any] = {}
    if count > 1:
        owner, place = torch.arange(count * length) // length, torch.arange(count * length) % length
        own = (owner[:, None] == owner) & (place[:, None] >= place)
        seen = torch.cat([torch.ones(count * length, start, dtype=torch.bool), own], dim=-1)
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
        extra = {"attention_mask": hidden[None, None], "position_ids": start + place[None]}
    best = best_tokens(model, ids.view(1, -1), answered.flatten().tolist(), branch(cache), **extra)
    return best.view(count, size).tolist()  # type: ignore[no-any-return]


def _takes_masks(model: Any, cache: Any) -> bool:
    """Whether a model can be told what each row behind a cache sees: transformers', without windows of its own."""
    given = inspect.signature(getattr(model, "forward", model)).parameters
    whole = all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
    return whole and {"attention_mask", "position_ids"} <= given.keys()


def _prefilled(model: Any, context: Sequence[int]) -> Any:
    """The cache of the context, one row."""
    ids = torch.tensor([context], device=device_of(model))
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def best_tokens(
    model: Any, tokens: torch.Tensor, places: Sequence[int], cache: Any = None, **extra: torch.Tensor
) -> torch.Tensor:
    """The most likely tokens [B, N] at places [N] of ids [B, S]; logits are worked out there only, if the model can.

    On the model's device; nothing waits for it. ``extra``: further inputs of the model, behind a cache.
    """
    device = device_of(model)
    where = torch.tensor(places, device=device)
    ids = tokens.to(device)
    if "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters:
        also = {name: given.to(device) for name, given in extra.items()}
        out = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=where, **also)
        return out.logits.argmax(-1)  # type: ignore[no-any-return]
    out = model(ids)
    return getattr(out, "logits", out)[:, where].argmax(-1)  # type: ignore[no-any-return]
