"""Files that come from users and go to them: written whole or not at all, read with errors in words."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable
from typing import Any

from sparsepass.errors import SparsepassError, quoted_path, shown, shown_path

Kind = type[SparsepassError]
"""The class of the errors that are raised."""

LARGEST = 1 << 28
"""Bytes of a file that is read whole."""

DIGITS = 20
"""Of a whole number in JSON: every 64-bit number has as many at most."""

PICTURES = (".png", ".svg", ".pdf")
"""Suffixes of pictures."""


def write_whole(path: str | os.PathLike[str], content: str | bytes, error: Kind) -> None:
    """Writes a file whole, or leaves the former one as it is.

    The content goes to a new file beside it, which then takes its place with the former one's permissions. Of a link,
    the target is written. Pipes and devices are written directly. Text is UTF-8. Raises ``error``.
    """
    try:
        data = content.encode() if isinstance(content, str) else content
        target = os.path.realpath(path)
        held = _stat(target)
        if held is not None and stat.S_ISDIR(held.st_mode):
            raise IsADirectoryError(0, "it is a folder")
        if held is not None and not stat.S_ISREG(held.st_mode):
            with open(target, "wb", buffering=0) as stream:
                _write_all(stream.fileno(), data)
        elif held is not None and not os.access(target, os.W_OK):
            raise PermissionError(0, "it is read-only")
        else:
            _replace(target, data, held)
    except (OSError, ValueError) as problem:
        raise unwritable(path, problem, error) from problem


def write_json(path: str | os.PathLike[str], content: Any, error: Kind, indent: int | None = 1) -> None:
    """Writes JSON whole or not at all. Raises ``error``, also for content that JSON has no form for."""
    write_whole(path, json_text(content, error, indent=indent) + "\n", error)


def json_text(content: Any, error: Kind, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """``content`` as JSON. Raises ``error`` for values that JSON has no form for."""
    try:
        return json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    except (TypeError, ValueError, RecursionError) as problem:
        reason = f"{_reason(problem)}. Give texts, numbers, lists and objects."
        raise error(f"This cannot be written as JSON: {reason}") from problem


def write_figure(path: str | os.PathLike[str], figure: Any, dpi: int, error: Kind) -> None:
    """Writes a matplotlib figure whole or not at all; the format by the suffix. Raises ``error``."""
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=check_picture(path, error).removeprefix("."))
    write_whole(path, data.getvalue(), error)


def check_picture(path: str | os.PathLike[str], error: Kind) -> str:
    """The suffix of a picture's path, in lower case. Raises ``error`` for one that is no known format."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in PICTURES:
        raise error(f"A picture is to be written to {shown_path(path)}; accepted suffixes: {', '.join(PICTURES)}.")
    return suffix


def check_output(path: str | os.PathLike[str], error: Kind) -> None:
    """Makes sure, before anything is measured, that a file can be written later, and makes its folder.

    Raises ``error``.
    """
    try:
        target = os.path.realpath(path)
        held = _stat(target)
        if held is not None and stat.S_ISDIR(held.st_mode):
            raise IsADirectoryError(0, "it is a folder; give a file in it")
        if held is not None and not os.access(target, os.W_OK):
            raise PermissionError(0, "it is read-only")
        if held is None or stat.S_ISREG(held.st_mode):
            _check_folder(os.path.dirname(target))
    except (OSError, ValueError) as problem:
        raise unwritable(path, problem, error) from problem


def check_input(path: str | os.PathLike[str], error: Kind) -> None:
    """Makes sure, before anything is measured, that a file can be read later. Raises ``error``."""
    try:
        held = os.stat(path)
        if not stat.S_ISREG(held.st_mode):
            raise OSError(0, "it is no file")
        if not os.access(path, os.R_OK):
            raise PermissionError(0, "reading is not allowed")
    except (OSError, ValueError) as problem:
        raise error(f"{quoted_path(path)} is no file that can be read: {_reason(problem)}.") from problem


def check_folder(path: str | os.PathLike[str], error: Kind) -> None:
    """Makes sure that files can be written into a folder, which is made. Raises ``error``."""
    try:
        _check_folder(os.path.realpath(path))
    except (OSError, ValueError) as problem:
        raise unwritable(path, problem, error) from problem


def read_bytes(path: str | os.PathLike[str], what: str, error: Kind, most: int = LARGEST) -> bytes:
    """The content of a regular file of at most ``most`` bytes. ``what``: what it should be, for errors.

    Raises ``error``; its ``__cause__`` is the system's own.
    """
    try:
        held = os.stat(path)
        if stat.S_ISDIR(held.st_mode):
            raise IsADirectoryError(0, "it is a folder")
        if not stat.S_ISREG(held.st_mode):
            raise OSError(0, "it is a pipe or a device; give a file")
        if held.st_size > most:
            raise OSError(0, f"it has {held.st_size} bytes, and at most {most} are read")
        with open(path, "rb") as stream:
            return stream.read()
    except (OSError, ValueError) as problem:
        raise error(f"The {what} {quoted_path(path)} cannot be read: {_reason(problem)}.") from problem


def read_text(path: str | os.PathLike[str], what: str, error: Kind, most: int = LARGEST) -> str:
    """The text of a file in UTF-8, without its byte order mark. Raises ``error``."""
    return decode(read_bytes(path, what, error, most), path, what, error)


def decode(content: bytes, path: object, what: str, error: Kind) -> str:
    """UTF-8 as text, without its byte order mark. Raises ``error``."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"The {what} {quoted_path(path)} cannot be read: byte {problem.start} is not UTF-8. Save it in UTF-8."
        ) from problem


def read_json(path: str | os.PathLike[str], what: str, error: Kind, *, finite: bool = True, most: int = LARGEST) -> Any:
    """The JSON in a file; see ``parse_json``. Raises ``error``."""
    return parse_json(read_text(path, what, error, most), shown_path(path), error, finite=finite)


def parse_json(text: str, where: str, error: Kind, *, finite: bool = True) -> Any:
    """The value of a JSON text. ``where`` begins each error's text. Raises ``error``.

    Refused besides what is not JSON: a field given twice, texts that are not Unicode, whole numbers of over ``DIGITS``
    digits, and, if ``finite``, NaN and Infinity.
    """
    number, constant = (_finite, _no_constant) if finite else (float, float)
    try:
        if not text.strip():
            raise ValueError("it is empty")
        data = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_int=_whole_number,
            parse_float=number,
            parse_constant=constant,
        )
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except json.JSONDecodeError as problem:
        raise error(
            f"{where} is not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}."
        ) from problem
    except UnicodeEncodeError as problem:
        raise error(f"{where}: a text has \\u{ord(problem.object[problem.start]):x}, half a character.") from problem
    except RecursionError as problem:
        raise error(f"{where}: lists or objects are nested too deep.") from problem
    except ValueError as problem:
        raise error(f"{where}: {problem}.") from problem


def json_lines(text: str) -> Iterable[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines that are not blank.

    A line ends at a line feed alone: U+2028 and others, at which ``str.splitlines`` cuts, may stand in a JSON text.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def unwritable(path: object, problem: BaseException, error: Kind) -> SparsepassError:
    """The error for a file or folder that cannot be written."""
    return error(f"{quoted_path(path)} cannot be written: {_reason(problem)}; give a path that can be.")


def _reason(problem: BaseException) -> str:
    if isinstance(problem, UnicodeEncodeError):
        return f"character {problem.object[problem.start]!r} has no form in UTF-8"
    if isinstance(problem, OSError):
        return problem.strerror or type(problem).__name__
    if isinstance(problem, RecursionError):
        return "it is nested too deep"
    return str(problem).rstrip(".")


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _check_folder(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    trial = os.path.join(folder, f".{secrets.token_hex(8)}.part")
    os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(trial)


def _replace(target: str, data: bytes, held: os.stat_result | None) -> None:
    folder = os.path.dirname(target)
    part = os.path.join(folder, f".{secrets.token_hex(8)}.part")
    number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            _write_all(number, data)
            os.fsync(number)
        finally:
            os.close(number)
        if held is not None:
            _keep_owner(part, held)
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    _sync_folder(folder)


def _keep_owner(part: str, held: os.stat_result) -> None:
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):  # the former file is another's, in a folder of ours
            os.chown(part, held.st_uid, held.st_gid)
    os.chmod(part, stat.S_IMODE(held.st_mode))


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # some file systems, and Windows, have no way to
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _write_all(number: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the field {shown(name)} is given twice in one object; keep one")
        seen[name] = value
    return seen


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number; accepted are finite numbers")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large; accepted are numbers up to 1.8e308")
    return number


def _whole_number(text: str) -> int:
    if len(text.lstrip("-")) > DIGITS:
        raise ValueError(f"a number has {len(text.lstrip('-'))} digits; accepted are {DIGITS} at most")
    return int(text)
