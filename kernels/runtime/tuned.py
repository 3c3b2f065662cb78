"""Where measurements of the user's own device lie, and the kernel configurations in them.

``sparsepass tune`` writes the file. Its crossover curves are read by ``sparsepass.planning.crossover``. No Triton
import.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsepass.errors import OptionError, quoted_path, shown
from sparsepass.host.files import read_json
from sparsepass.kernels.spec import AttendTile, attend_tile, capability_of

log = logging.getLogger(__name__)

TUNING_ENV = "SPARSEPASS_TUNING"
"""Environment variable: a file of measurements in place of the default one; ``off``: none but the shipped ones."""

FORMAT, VERSION = "sparsepass.tuning", 1
OFF = ("off", "none", "0")
HALF = {"float16": "bfloat16", "bfloat16": "float16"}
"""Both run at one rate, on the same tiles."""


def cache_home() -> Path | None:
    """The folder that ``SPARSEPASS_CACHE_DIR`` names, by default ``~/.cache/sparsepass``; None without a home."""
    named = os.environ.get("SPARSEPASS_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification says
        base = os.path.expanduser("~/.cache")
    return Path(base, "sparsepass") if os.path.isabs(base) else None


def default_file() -> Path:
    """``tuning.json`` in ``cache_home()``. Raises ``OptionError`` without one."""
    home = cache_home()
    if home is None:
        raise OptionError("There is no home folder; set SPARSEPASS_CACHE_DIR to a folder of your own.")
    return home / "tuning.json"


def tuning_file() -> Path | None:
    """The file in force: the one that ``SPARSEPASS_TUNING`` names, else the default one if it is there."""
    named = os.environ.get(TUNING_ENV, "")
    if named.lower() in OFF:
        return None
    if named:
        return Path(named)
    file = None if cache_home() is None else default_file()
    return file if file is not None and file.is_file() else None


def named_by_user() -> bool:
    """Whether the file in force was named by the environment: it must then be readable."""
    return bool(os.environ.get(TUNING_ENV))


@functools.lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """Logs a warning, once per process."""
    log.warning(text)


def tuning_json(file: Path) -> Any:
    """The content of a file in force, read again only if it changed. Raises ``OptionError``."""
    try:
        stat = file.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"{TUNING_ENV} names {quoted_path(file)}, which cannot be read ({reason}); name a file that "
            "sparsepass tune wrote, 'off', or unset it."
        ) from error
    return _read(os.path.abspath(file), _stamp(file, stat))


SETTLED_NS = 2_000_000_000
"""Nanoseconds after a change of a file within which another one may leave the same time."""


def _stamp(file: Path, stat: os.stat_result) -> tuple[int | bytes, ...]:
    """What differs where the content does. Its time of change alone does not: copies keep it, clocks are coarse."""
    settled = time.time_ns() - max(stat.st_ctime_ns, stat.st_mtime_ns) > SETTLED_NS
    try:
        content = b"" if settled else file.read_bytes()
    except OSError:
        content = b""  # then it cannot be parsed either, which says why
    return stat.st_dev, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size, content


@functools.lru_cache(maxsize=16)
def _read(path: str, stamp: tuple[int | bytes, ...]) -> Any:
    return read_json(path, "tuning file", OptionError)


def devices(data: Any, where: str) -> list[Mapping[str, Any]]:
    """The entries of a tuning file, one per device. Raises ``OptionError``."""
    if data.get("version") != VERSION:
        raise OptionError(
            f"{where}: version is {shown(data.get('version'))}, and this sparsepass reads {VERSION}; "
            "run sparsepass tune again."
        )
    found = data.get("devices")
    if not isinstance(found, list) or not all(isinstance(one, dict) and "device" in one for one in found):
        raise OptionError(f"{where}: 'devices' is no list of objects with a 'device'; run sparsepass tune again.")
    return found


def is_tuning(data: Any) -> bool:
    """Whether a file's content says that ``sparsepass tune`` wrote it."""
    return isinstance(data, dict) and data.get("format") == FORMAT


def tile_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttendTile:
    """The attention kernel's configuration: the tuned one of this device, else the built-in one."""
    tuned = tuned_tile(device, dtype, head_dim) if device.type == "cuda" else None
    return attend_tile(dtype, head_dim, capability_of(device)) if tuned is None else tuned


_forced: dict[tuple[str, int], AttendTile] = {}


def force_tiles(tiles: Mapping[tuple[str, int], AttendTile]) -> None:
    """Use these tiles, by (dtype, head size), whatever the file says: while it is being measured. Empty: no more."""
    _forced.clear()
    _forced.update(tiles)


def tuned_tile(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttendTile | None:
    """The tile that was fastest on a device when it was measured, for just this head size; None if none was.

    A tile that fits one version of Triton may not fit the next, so those of another version do not count.
    """
    name = str(dtype).removeprefix("torch.")
    if _forced:
        return _forced.get((name, head_dim)) or _forced.get((HALF.get(name, name), head_dim))
    file = tuning_file()
    if file is None:
        return None
    try:
        data = tuning_json(file)
        entries = devices(data, str(file)) if is_tuning(data) else []
        tiles = _tiles(entries, torch.cuda.get_device_name(device), _triton_version())
    except OptionError as error:
        if named_by_user():
            raise
        warn_once(f"the tuning file is not used: {error}")
        return None
    return tiles.get((name, head_dim)) or tiles.get((HALF.get(name, name), head_dim))


def _tiles(
    entries: list[Mapping[str, Any]], device_name: str, triton_version: str
) -> dict[tuple[str, int], AttendTile]:
    found = {}
    for entry in entries:
        if str(entry["device"]).casefold() != device_name.casefold():
            continue
        if entry.get("environment", {}).get("versions", {}).get("triton") != triton_version:
            continue
        for one in entry.get("tiles", []):
            try:
                found[str(one["dtype"]), int(one["head_dim"])] = parse_tile(one["tile"])
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                if isinstance(error, OptionError):
                    raise
                raise OptionError(f"{shown(one)} is no entry of a tile; run sparsepass tune again.") from error
    return found


def parse_tile(data: Any) -> AttendTile:
    """A tile from its fields. Raises ``OptionError``."""
    try:
        tile = AttendTile(**data)
    except TypeError as error:
        raise OptionError(f"{shown(data)} is no tile ({error}); run sparsepass tune again.") from error
    sizes = (tile.block_m, tile.block_n, tile.edge_n, tile.dim_step, tile.num_warps)
    powers = all(isinstance(n, int) and n > 0 and n & (n - 1) == 0 for n in sizes)
    counts = all(isinstance(n, int) and 1 <= n <= 8 for n in (tile.num_stages, tile.edge_stages))
    if not powers or not counts or tile.precision not in ("tf32x3", "ieee"):
        raise OptionError(
            f"{shown(data)} is no tile: sizes are powers of two, stages 1 to 8. Run sparsepass tune again."
        )
    return tile


@functools.cache
def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
