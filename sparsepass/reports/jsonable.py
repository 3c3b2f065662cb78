"""Frozen dataclasses to plain JSON values and back, driven by their annotations."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints


class DecodeError(ValueError):
    """A JSON value of another type than annotated; the message says where, what was found and what is expected."""


def encode(value: object) -> Any:
    """Nested dataclasses, mappings and sequences as dicts, lists and scalars; anything else as its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return encode(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [encode(item) for item in value]
    return str(value)  # a report is printed while something else is being debugged: better a text than an exception


def decode(annotation: Any, value: Any, where: str = "$") -> Any:
    """``value`` (from ``json.loads``) as an instance of ``annotation``.

    Understands what the data types of this package use: dataclasses, enums, unions, ``tuple[X, ...]``,
    ``tuple[X, Y]``, ``Mapping[str, X]``, ``Any`` and scalars. Raises DecodeError on anything else.
    """
    if annotation is Any:
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _decode_dataclass(annotation, value, where)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        try:
            return annotation(value)
        except ValueError:
            raise _wrong(where, value, "one of " + ", ".join(repr(m.value) for m in annotation)) from None
    return _decode_scalar(annotation, value, where)


def _decode_scalar(annotation: Any, value: Any, where: str) -> Any:
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation in (types.NoneType, None):
        fits = value is None
    elif annotation is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, annotation)
    if not fits:
        raise _wrong(where, value, getattr(annotation, "__name__", str(annotation)))
    return value


def _decode_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    for arg in args:
        try:
            return decode(arg, value, where)
        except DecodeError:
            continue
    raise _wrong(where, value, " or ".join(getattr(arg, "__name__", str(arg)) for arg in args))


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, value, "a list")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise _wrong(where, value, f"a list of {len(args)}")
    return tuple(decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _decode_dataclass(annotation: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, value, f"an object with the fields of {annotation.__name__}")
    hints = _hints(annotation)
    fields = {f.name: f for f in dataclasses.fields(annotation)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise DecodeError(
            f"{where}: unknown field {unknown[0]!r} of {annotation.__name__}; known: {', '.join(fields)}."
        )
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise DecodeError(f"{where}: field {name!r} of {annotation.__name__} is missing.")
    return annotation(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@functools.cache
def _hints(annotation: type) -> dict[str, Any]:
    return get_type_hints(annotation)


def _wrong(where: str, value: Any, expected: str) -> DecodeError:
    return DecodeError(f"{where}: got {str(value)[:80]!r} ({type(value).__name__}), expected {expected}.")
