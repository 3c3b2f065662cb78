"""``@sparsepass.sparse``: compile a forward function, a method, a module or a module class with sparsepass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from sparsepass.pipeline import backend
from sparsepass.planning import options as names
from sparsepass.policies.policy import Policy
from sparsepass.request.hints import Hints, resolve_hints

_Target = TypeVar("_Target", bound=Callable[..., Any])


@overload
def sparse(
    target: _Target,
    /,
    *,
    task: Hints = None,
    policy: str | Path | Policy | None = None,
    options: dict[str, Any] | None = None,
    **compile_arguments: Any,
) -> _Target: ...
@overload
def sparse(
    target: None = None,
    /,
    *,
    task: Hints = None,
    policy: str | Path | Policy | None = None,
    options: dict[str, Any] | None = None,
    **compile_arguments: Any,
) -> Callable[[_Target], _Target]: ...


def sparse(
    target: Any = None,
    /,
    *,
    task: Hints = None,
    policy: str | Path | Policy | None = None,
    options: dict[str, Any] | None = None,
    **compile_arguments: Any,
) -> Any:
    """Compile what it decorates with the sparsepass backend.

    On a function or method: returns the compiled function. On an ``nn.Module``: compiles its call in place and returns
    it. On a module class: its ``forward`` is compiled, so every instance is. ``task`` is the hint that holds where no
    ``with sparsepass.task(...)`` is in force; ``policy`` and ``options`` are those of the backend, and further keyword
    arguments (``mode``, ``dynamic``, ``fullgraph``) go to ``torch.compile``. Errors are raised here, not at the first
    call.
    """
    if target is None:
        return functools.partial(_apply, task=task, policy=policy, options=options, compile_arguments=compile_arguments)
    return _apply(target, task=task, policy=policy, options=options, compile_arguments=compile_arguments)


def _apply(
    target: Any,
    *,
    task: Hints,
    policy: str | Path | Policy | None,
    options: dict[str, Any] | None,
    compile_arguments: dict[str, Any],
) -> Any:
    chosen = dict(options or {})
    if task is not None:
        chosen[names.TASK] = resolve_hints(task)
    if policy is not None:
        chosen[names.POLICY] = policy
    mode = compile_arguments.pop("mode", None) if "mode" in compile_arguments else None
    names.parse(mode, chosen)
    arguments = {**compile_arguments, "backend": functools.partial(backend, mode=mode, options=chosen)}
    if isinstance(target, nn.Module):
        target.compile(**arguments)
        return target
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"@sparsepass.sparse takes a function, an nn.Module or a module class, not {target!r}")
        target.forward = torch.compile(target.forward, **arguments)
        return target
    if not callable(target):
        raise TypeError(f"@sparsepass.sparse takes a function, an nn.Module or a module class, not {target!r}")
    return torch.compile(target, **arguments)
