"""What ``tune`` measures: points of the crossover, and kernel configurations to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsepass.errors import OptionError
from sparsepass.kernels.spec import AttendTile, Capability, attend_tile
from sparsepass.measure.bench.options import option
from sparsepass.measure.bench.problem import DTYPES, Shape

K = 1024
DENSITIES = (0.03, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
QUICK_DENSITIES = (0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class TuneOptions:
    """``sparsepass tune``."""

    device: str = option("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one.", "Measurement")
    threads: int = option(0, "CPU threads; 0 leaves them as they are.", "Measurement")
    quick: bool = option(False, "Few points and rounds: minutes, for a first table.", "Measurement")
    only: str = option("", "One of the two parts.", "Measurement", choices=("", "tiles", "crossover"))
    dtypes: tuple[str, ...] = option((), "Default by device.", "Measurement", choices=tuple(DTYPES))
    head_dims: tuple[int, ...] = option((), "Default by device.", "Measurement")
    lengths: tuple[int, ...] = option((), "Of the crossover, in tokens; default by device.", "Measurement")
    rounds: int = option(0, "Rounds of each point; default 5, 2 with --quick.", "Measurement")
    budget_ms: float = option(0.0, "Per variant and round; default 60, 15 with --quick.", "Measurement")
    time_limit: float = option(0.0, "Seconds after which no further point is begun; run again to go on.", "Measurement")
    fresh: bool = option(False, "Forget an interrupted run instead of going on with it.", "Measurement")
    dry_run: bool = option(False, "List what would be measured, and end.", "Output")
    out: Path | None = option(None, "File to write; default: where it is found at run time.", "Output", use="write")


@dataclass(frozen=True, slots=True)
class CrossoverPoint:
    """One shape: dense against sparse at rising densities."""

    shape: Shape

    def __str__(self) -> str:
        return f"crossover {self.shape.dtype} {self.shape.head_dim} {self.shape.length}"


@dataclass(frozen=True, slots=True)
class TilePoint:
    """One dtype and head size: which tile of the Triton kernel is fastest over some shapes."""

    dtype: str
    head_dim: int

    def __str__(self) -> str:
        return f"tiles {self.dtype} {self.head_dim}"


Point = CrossoverPoint | TilePoint


def points(options: TuneOptions, device: torch.device) -> list[Point]:
    """All points in the order they are measured: configurations first, since the crossover depends on them."""
    found: list[Point] = []
    gpu = device.type == "cuda"
    if options.only == "tiles" and not gpu:
        raise OptionError("There are no kernel configurations to choose on the CPU; leave out --only tiles.")
    if gpu and options.only != "crossover":
        dims = options.head_dims or ((128, 64) if options.quick else (128, 64, 256, 80, 96))
        dtypes = options.dtypes or (("bf16",) if options.quick else ("bf16", "fp32"))
        found += [TilePoint(dtype, dim) for dtype in dtypes for dim in dims if (dtype, dim) not in LEFT_ALONE]
    if options.only != "tiles":
        heads, kv_heads = (32, 8) if gpu else (8, 2)
        for dtype, dim, length in _crossover(options, gpu):
            found.append(CrossoverPoint(Shape(1, heads, kv_heads, length, dim, dtype)))
    return found


def _crossover(options: TuneOptions, gpu: bool) -> list[tuple[str, int, int]]:
    powers = tuple(K << i for i in range(8 if gpu else 6))
    if options.dtypes or options.head_dims or options.lengths or options.quick:
        few = (2 * K, 8 * K, 32 * K) if gpu else (1 * K, 4 * K)
        dtypes = options.dtypes or (("bf16",) if gpu else ("fp32",) if options.quick else ("fp32", "bf16"))
        dims = options.head_dims or ((64, 128) if gpu or not options.quick else (64,))
        lengths = options.lengths or (few if options.quick else powers)
        return [(dtype, dim, length) for length in sorted(lengths) for dtype in dtypes for dim in dims]
    if not gpu:
        return [(dtype, dim, length) for length in powers for dtype in ("fp32", "bf16") for dim in (64, 128)]
    # Models of head size 64 and 128 in bf16 are most of them; the others are told from two lengths.
    main = [("bf16", dim, length) for length in powers for dim in (64, 128)]
    others = [("fp16", 128), ("bf16", 80), ("bf16", 96), ("bf16", 256), ("fp32", 64), ("fp32", 128)]
    return main + [(dtype, dim, length) for length in (4 * K, 16 * K) for dtype, dim in others]


LEFT_ALONE = {("fp32", 80), ("fp32", 96)}
"""Their tile is what keeps the error of padded float32 in bounds, not only what is fast."""

_HALF = (
    *((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 64, 4, 2)),
    *((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
)
_FLOAT = ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2), (32, 32, 4, 2))


def candidates(dtype: str, head_dim: int, capability: Capability) -> list[AttendTile]:
    """Tiles to time, the built-in one first.

    Steps at the edges and the order of sums stay as they are: they decide registers and rounding, and the main loop
    decides the time.
    """
    built_in = attend_tile(DTYPES[dtype], head_dim, capability)
    found = [built_in]
    for block_m, block_n, warps, stages in _FLOAT if dtype == "fp32" else _HALF:
        found.append(built_in._replace(block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages))
    return list(dict.fromkeys(found))
