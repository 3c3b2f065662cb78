"""Whether calling something enters what ``torch.compile`` made: it is then run as it is, never compiled anew."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MARK = "_torchdynamo_orig_callable"
"""What a function that ``torch.compile`` made has."""
DISABLED = "_torchdynamo_disable"
"""And what one has that ``torch.compiler.disable`` made, beside it."""


def is_compiled(target: Any) -> bool:
    """Whether ``target`` is compiled, or something inside it: a module of a model, a method, what a function names."""
    return any(_compiled_itself(one) for one in _reached(target))


def _reached(target: Any) -> Iterator[Any]:
    """What a call of ``target`` is expected to enter, as far as that can be told without running it."""
    yield target
    if isinstance(target, functools.partial):
        for one in (target.func, *target.args, *target.keywords.values()):
            yield from _reached(one)
        return
    if isinstance(target, nn.Module):
        yield from _parts(target)
        return
    owner = getattr(target, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        yield from _parts(owner)
    function = inspect.unwrap(getattr(target, "__func__", target)) if callable(target) else target
    if isinstance(function, types.FunctionType):
        for one in _named(function):
            yield one
            if isinstance(one, nn.Module) or isinstance(getattr(one, "__self__", None), nn.Module):
                yield from _parts(getattr(one, "__self__", one))
    elif owner is None and hasattr(target, "__dict__"):
        yield from _parts(target)  # an object that is called, such as a pipeline


def _parts(owner: Any) -> Iterator[Any]:
    """The modules of a model or of an object that holds models, and what was compiled among their methods."""
    holders = [owner, *(held for held in vars(owner).values() if isinstance(held, nn.Module))]
    modules = dict.fromkeys(module for held in holders if isinstance(held, nn.Module) for module in held.modules())
    for one in (owner, *modules):
        yield one
        yield from vars(one).values()
    for kind in {kind for one in (owner, *modules) for kind in type(one).__mro__}:
        yield from vars(kind).values()


def _named(function: Callable[..., Any]) -> list[Any]:
    """The values that a function's code names: those it closes over, and globals."""
    code = function.__code__
    codes = [code, *(inner for inner in code.co_consts if isinstance(inner, types.CodeType))]
    names = {name for one in codes for name in one.co_names}
    held = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    return held + [function.__globals__[name] for name in names if name in function.__globals__]


def _filled(cell: types.CellType) -> bool:
    try:
        return bool(cell.cell_contents is not None)
    except ValueError:  # not set yet
        return False


def _compiled_itself(one: Any) -> bool:
    if isinstance(one, nn.Module):
        called = getattr(one, "_compiled_call_impl", None) is not None
        return called or isinstance(one, torch._dynamo.OptimizedModule)
    if isinstance(one, types.FunctionType | types.MethodType):
        return any(hasattr(f, MARK) and not getattr(f, DISABLED, False) for f in (one, inspect.unwrap(one)))
    return False
