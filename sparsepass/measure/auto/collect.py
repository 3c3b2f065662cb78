"""Run a model on tasks under cheap budgets; note the signals of each prefill and whether its answer was right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparsepass.host.environment import device_of
from sparsepass.measure.auto.error import AutoError
from sparsepass.measure.auto.probe import Probe, probe
from sparsepass.measure.auto.records import THEN, TOLD, UNTRIED, Place
from sparsepass.measure.auto.router import FIRST
from sparsepass.measure.calibrate.setting import Setting, policy_setting
from sparsepass.measure.calibrate.switch import BudgetSwitch, counted
from sparsepass.measure.models import branch
from sparsepass.measure.tasks.base import stable_seed
from sparsepass.measure.tasks.score import TOKENS_AT_ONCE
from sparsepass.measure.tasks.tokens.drawing import TokenTask
from sparsepass.methods import encode_budget
from sparsepass.policies.policy import Policy
from sparsepass.types import Budget, TaskClass


def collect(
    model: Any,
    tasks: Sequence[TokenTask],
    lengths: Sequence[int],
    budgets: Sequence[Budget],
    *,
    templates: Sequence[int] = (0, 1),
    requests: int = 128,
    seed: int = 0,
    settings: Probe | None = None,
    policy: Policy | None = None,
    time_limit: float = 0.0,
    done: Callable[[Place], None] = lambda place: None,
) -> list[Place]:
    """The places of every task, template and length under dense and each of ``budgets``.

    ``model``, of transformers, is compiled in place. Requests are prompts without answers; their answers follow on the
    cache by teacher forcing, so they are right exactly where greedy decoding gives them. ``policy``: what requests run
    again under, and what it gives those that are told the class, is run, too. ``time_limit``: seconds after which no
    further task and template is begun; 0: none. Raises ``AutoError`` if the policy gives ``single_qa``, which
    a router begins with, another budget than the first of ``budgets``.
    """
    if policy is not None:
        _check_first(policy, lengths, budgets[0])
    switch = BudgetSwitch()
    model.compile(backend=switch, dynamic=True)
    chosen = settings or Probe()
    places: list[Place] = []
    started = time.monotonic()
    for length in sorted(lengths):
        for task in tasks:
            for template in templates:
                if time_limit and time.monotonic() - started > time_limit:
                    return places
                ids, answers = draw(replace(task, template=template), length, requests, seed, device_of(model))
                at_all: dict[str, Setting | None] = {"dense": None}
                at_all |= {encode_budget(budget): budget for budget in budgets}
                if policy is not None:
                    at_all[THEN] = _setting(model, policy, TaskClass.UNKNOWN, length)
                    at_all[TOLD] = _setting(model, policy, task.task_class, length)
                for text, setting in at_all.items():
                    switch.active = setting
                    looks = None if text in UNTRIED else chosen
                    before = counted()
                    right, signals = measure(model, ids, answers, looks)
                    density = 1.0 if setting is None else (counted() - before).density or 1.0
                    places.append(
                        Place(task.name, str(task.task_class), template, length, text, density, right, signals)
                    )
                    done(places[-1])
    return places


def _setting(model: Any, policy: Policy, task: TaskClass, length: int) -> Setting | None:
    config = model.config
    return policy_setting(policy, task, length, config.num_hidden_layers, config.num_attention_heads)


def _check_first(policy: Policy, lengths: Sequence[int], cheap: Budget) -> None:
    for length in lengths:
        given = policy.site_budget(FIRST, policy.bucket(length), 0, 1)
        if given != cheap:
            raise AutoError(
                f"Policy {policy.name!r} gives {FIRST} {encode_budget(given)} at {length} tokens, and "
                f"{encode_budget(cheap)} is to be tried first. Give that as the cheap budget, or other lengths."
            )


def draw(
    task: TokenTask, length: int, requests: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [N, S] and answers [N, A], int64; with the answer a request has ``length`` tokens."""
    generator = torch.Generator(device).manual_seed(stable_seed("auto", task.name, task.template, length, seed))
    drawn = task.draw_many(requests, length, generator)
    return torch.cat([drawn.context, drawn.prompts[:, 0]], -1), drawn.answers[:, 0]


def measure(
    model: Any, ids: torch.Tensor, answers: torch.Tensor, settings: Probe | None
) -> tuple[tuple[bool, ...], dict[str, tuple[float, ...]]]:
    """Whether each answer is right, and the signals of its prefill by name; none without settings."""
    right: list[bool] = []
    signals: dict[str, list[float]] = {}
    with torch.no_grad():
        for rows in _batches(len(ids), ids.shape[1], ids.device):
            asked, wanted = ids[rows], answers[rows]
            out = model(input_ids=asked, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1]
            right += _right(model, logits, out.past_key_values, wanted).tolist()
            if settings is not None:
                found = probe(model, asked, out.past_key_values, logits, settings)
                for name, column in found.items():
                    signals.setdefault(name, []).extend(column.tolist())
    rounded = {name: tuple(round(value, 5) for value in column) for name, column in signals.items()}
    return tuple(right), rounded


def _right(model: Any, logits: torch.Tensor, cache: Any, answers: torch.Tensor) -> torch.Tensor:
    """Whether each answer [B, A] is the most likely one, token by token, after the right ones before it; bool [B]."""
    right = logits.argmax(-1) == answers[:, 0]
    if answers.shape[1] > 1:
        rest = type(model).forward(model, input_ids=answers[:, :-1], past_key_values=branch(cache), use_cache=True)
        right &= (rest.logits.argmax(-1) == answers[:, 1:]).all(-1)
    return right


def _batches(count: int, length: int, device: torch.device) -> Iterator[slice]:
    size = max(1, min(count, TOKENS_AT_ONCE.get(device.type, 2**17) // length))
    for start in range(0, count, size):
        yield slice(start, start + size)
