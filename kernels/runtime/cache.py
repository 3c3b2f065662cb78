"""Where compiled libraries are kept between processes, and how they get from there into this one.

What lies in the folder is run as code. So it must belong to this user (or to root), no one else may write to it, and a
file's last bytes are the digest of the others: one that was cut or changed is built again. What was checked is loaded
from memory, so that nothing can change in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sparsepass.kernels.runtime.tuned import cache_home, warn_once

MARK = b"sparsepass sha256 "
"""Before the digest at a kept file's end."""

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def not_private(found: os.stat_result) -> str | None:
    """None where nobody but this user and root can have written a file or folder, else the reason."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
    if found.st_mode & WRITABLE_BY_OTHERS:
        return f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def say_not_kept(reason: str) -> None:
    """Logs, once, that libraries are not kept, why, and what to do."""
    warn_once(
        f"the compiled CPU kernels are not kept, so each process builds them: {reason}. Set SPARSEPASS_CACHE_DIR to a "
        "folder of your own that nobody else may write to."
    )


def usable_folder() -> Path | None:
    """``cache_home()``, made if it is not there, private to this user; None, with the reason logged, if it is not."""
    folder = cache_home()
    if folder is None:
        say_not_kept("there is no home folder")
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = not_private(folder.stat())
    except OSError as error:
        reason = f"cannot be used ({error.strerror})"
    if reason is not None:
        say_not_kept(f"{str(folder)!r} {reason}")
    return folder if reason is None else None


def read(file: Path) -> bytes | None:
    """A kept library's bytes; None where there is none, or it is not as it was written."""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode) or not_private(found) is not None:
                return None
            content = opened.read()
    except OSError:
        return None
    library, mark, digest = content.rpartition(MARK)
    return library if mark and digest == hashlib.sha256(library).hexdigest().encode() else None


def keep(file: Path, library: bytes) -> None:
    """Write a library and its digest under a name, both at once or not at all. Raises ``OSError``."""
    handle, part = tempfile.mkstemp(prefix=".part-", dir=file.parent)
    try:
        with open(handle, "wb") as opened:
            opened.write(library + MARK + hashlib.sha256(library).hexdigest().encode())
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)


@contextlib.contextmanager
def build_folder(inside: Path | None) -> Iterator[Path]:
    """A private folder to build in, in the cache or, without one, where temporary files go; removed afterwards.

    What a killed process left in the cache is removed, too: nobody holds its lock. Raises ``OSError``.
    """
    if inside is None or not os.access(inside, os.W_OK | os.X_OK):
        with tempfile.TemporaryDirectory(prefix="sparsepass-") as private:
            yield Path(private)
        return
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=inside))
    lock = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder = new.rename(inside / new.name.replace(".new-", ".build-"))  # locked before anyone looks at it
        yield folder
    finally:
        for left in (new, inside / new.name.replace(".new-", ".build-")):
            shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def remove_left_over(folder: Path) -> None:
    """Remove what processes that were killed while they built have left in a cache."""
    for left in folder.glob(".build-*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def load(library: bytes) -> ctypes.CDLL:
    """Load a library from its bytes. Raises ``OSError``."""
    executable = (
        0x10  # MFD_EXEC: kernels from 6.3 on may be set to refuse code without it; older ones know no such flag
    )
    try:
        handle = os.memfd_create("sparsepass", os.MFD_CLOEXEC | executable)
    except OSError:
        handle = os.memfd_create("sparsepass", os.MFD_CLOEXEC)
    # The file stays open: the loader knows a library by its path, which nothing else may then have.
    with open(handle, "wb", closefd=False) as opened:
        opened.write(library)
    return ctypes.CDLL(f"/proc/{os.getpid()}/fd/{handle}")
