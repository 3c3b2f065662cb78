"""The options of each command, as dataclasses: ``arguments.py`` and the typer commands are both made from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sparsepass.errors import OptionError, quoted_path, shown
from sparsepass.host.files import check_folder, check_input, check_output, check_picture

Use = Literal["", "read", "write", "picture", "folder"]
"""What a command does with a path: reads a file, writes a file or a picture, writes files into a folder."""


def option(default: Any, help: str, panel: str = "Problem", choices: Iterable[str] = (), use: Use = "") -> Any:
    """A field that is an option of the command line. ``use``: of a path, checked by ``check_paths``."""
    return field(default=default, metadata={"help": help, "panel": panel, "choices": tuple(choices), "use": use})


def check_paths(options: Any) -> None:
    """Refuses, before anything is measured, paths that could not be read or written afterwards.

    Folders of files to be written are made. Raises ``OptionError`` naming the option.
    """
    written: dict[str, str] = {}
    for one in fields(options):
        use, flag = one.metadata.get("use", ""), "--" + one.name.replace("_", "-")
        given = getattr(options, one.name)
        for path in given if isinstance(given, tuple) else (given,):
            if not use or path is None:
                continue
            try:
                if use == "read":
                    check_input(path, OptionError)
                elif use == "folder":
                    check_folder(path, OptionError)
                else:
                    check_output(path, OptionError)
                    if use == "picture":
                        check_picture(path, OptionError)
                    if (other := written.setdefault(os.path.realpath(path), flag)) != flag:
                        raise OptionError(f"{quoted_path(path)} is given for {other}, too.")
            except OptionError as error:
                raise OptionError(f"{flag}: {error}") from error


@dataclass(frozen=True, slots=True)
class Spec:
    """One option as both command lines need it. ``kind``: the type of one value; ``many``: it may be repeated."""

    name: str
    kind: type
    many: bool
    default: Any
    help: str
    panel: str
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def specs(options: type) -> list[Spec]:
    """The options of a command, in the order of its fields."""
    hints = get_type_hints(options)
    found = []
    for one in fields(options):
        hint = hints[one.name]
        many = get_origin(hint) is tuple
        inner = get_args(hint)[0] if many else next((arg for arg in get_args(hint) if arg is not type(None)), hint)
        meta = one.metadata
        found.append(Spec(one.name, inner, many, one.default, meta["help"], meta["panel"], meta["choices"]))
    return found


def spread(arguments: Iterable[str], options: type) -> list[str]:
    """``--lengths 8K,32K 65536`` as ``--lengths 8192 --lengths 32768 --lengths 65536``: what both parsers take."""
    known = {spec.flag: spec for spec in specs(options) if spec.many or spec.kind is int}
    found: list[str] = []
    current: Spec | None = None
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag in known:
            current = known[flag]
            given = value
        elif current is None or (argument.startswith("-") and not re.match(r"-[.\d]", argument)):
            current = None
            found.append(argument)
            continue
        else:
            given = argument
        if given:
            found += _values(given, current)
            current = current if current.many else None
    return found


def _values(given: str, spec: Spec) -> Iterator[str]:
    for part in given.split(",") if spec.many and spec.kind in (int, float) else [given]:
        if part:
            yield from (spec.flag, _plain(part, spec))


def _plain(text: str, spec: Spec) -> str:
    if spec.kind is not int:
        return text
    try:
        return str(whole_number(text))
    except OptionError as error:
        raise OptionError(f"{spec.flag}: {error}") from None


_WHOLE = re.compile(r"(-?\d{1,18})([kKmM]?)", re.ASCII)


def whole_number(text: str) -> int:
    """``32K`` as 32768, ``1M`` as 1048576: how every command reads lengths and counts. Raises ``OptionError``."""
    found = _WHOLE.fullmatch(str(text).strip())
    if found is None:
        raise OptionError(
            f"{shown(text)} is no number; accepted are whole ones, such as 4096 and 4K, of 18 digits at most."
        )
    return int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()]


def make(options: type[Any], given: dict[str, Any]) -> Any:
    """The dataclass from parsed values, choices checked. Raises ``OptionError``."""
    values = {}
    for spec in specs(options):
        value = given.get(spec.name)
        if value is None or value == []:
            continue
        for one in value if spec.many else [value]:
            if spec.choices and one not in spec.choices:
                raise OptionError(f"{spec.flag} is {shown(one)}; accepted: {', '.join(spec.choices)}.")
        values[spec.name] = tuple(value) if spec.many else value
    return options(**values)


@dataclass(frozen=True)
class Machine:
    """Where and how long."""

    device: str = option("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one.", "Measurement")
    threads: int = option(0, "CPU threads; 0 leaves them as they are.", "Measurement")
    rounds: int = option(5, "Rounds; each times every variant, in an order of its own.", "Measurement")
    budget_ms: float = option(100.0, "Time per variant and round; a longer call is made once.", "Measurement")
    time_limit: float = option(0.0, "Seconds after which no further problem is begun; 0: none.", "Measurement")
    seed: int = option(0, "Of the inputs, the lists and the order.", "Measurement")
    out: Path | None = option(None, "JSON file, written after every problem.", "Output", use="write")
    as_json: bool = option(False, "The same JSON on stdout, no tables.", "Output")
    plots: Path | None = option(None, "Folder for plots, one PNG each.", "Output", use="folder")


@dataclass(frozen=True)
class Shapes(Machine):
    """Which problems."""

    lengths: tuple[int, ...] = option((), "Tokens, for instance 8K 32K; default by device.")
    batch: tuple[int, ...] = option((1,), "Batch sizes.")
    heads: int = option(0, "Query heads; default 32 on a GPU, 8 on the CPU.")
    kv_heads: tuple[int, ...] = option((), "Key/value heads: GQA groups are heads over these. Default: a quarter.")
    head_dims: tuple[int, ...] = option((), "Head sizes; default 128 on a GPU, 64 on the CPU.")
    dtypes: tuple[str, ...] = option((), "Default: bf16 on a GPU, fp32 on the CPU.", choices=("bf16", "fp16", "fp32"))
    inputs: str = option("random", "What the tensors hold.", choices=("random", "structured", "concentrated"))


_IMPLEMENTATIONS = "Kernels of our attention: auto, or by name, as hopper and triton. Default: every one."
_BASELINES = (
    "Of the dense kernels (cudnn, flash, efficient; on the CPU sdpa, sdpa_repeated), flex and flex_autotune; 'none' "
    "for none. Default: all but flex_autotune, and efficient for fp32 alone."
)


@dataclass(frozen=True)
class KernelOptions(Shapes):
    """``sparsepass bench kernel``."""

    densities: tuple[float, ...] = option((), "Computed shares of the visible blocks. Default 0.05 0.1 0.2 0.5 1.")
    lists: tuple[str, ...] = option(
        ("random",), "Kinds of block lists.", choices=("random", "uneven", "pooled", "full")
    )
    block: int = option(128, "Tokens per block of the lists: 64 or 128.")
    implementations: tuple[str, ...] = option((), _IMPLEMENTATIONS, "Variants")
    baselines: tuple[str, ...] = option((), _BASELINES, "Variants")
    peer_file: Path | None = option(
        None, "Python file that calls sparsepass.measure.bench.register_peer.", "Variants", use="read"
    )
    graphs: bool = option(False, "Time our kernels as CUDA graphs too.", "Variants")


_METHODS = (
    "Methods: a name (its own sweep), name=0.05,0.1 (values of its main parameter), or in full: "
    "'pooled_topk(density=0.1)'. Default: every method."
)


@dataclass(frozen=True)
class SelectionOptions(Shapes):
    """``sparsepass bench selection``."""

    methods: tuple[str, ...] = option((), _METHODS, "Variants")
    graphs: bool = option(False, "Time CUDA graphs too.", "Variants")


@dataclass(frozen=True)
class OpOptions(SelectionOptions):
    """``sparsepass bench op``."""

    implementations: tuple[str, ...] = option(("auto",), "Kernels of our attention, as for bench kernel.", "Variants")
    baselines: tuple[str, ...] = option((), "Of the dense kernels, as for bench kernel; 'none' for none.", "Variants")
    peer_file: Path | None = option(
        None, "Python file that calls sparsepass.measure.bench.register_peer.", "Variants", use="read"
    )


@dataclass(frozen=True)
class ModelOptions(Machine):
    """``sparsepass bench model``."""

    arch: str = option("llama", "A transformers model_type; random weights.")
    model: Path | None = option(None, "Local checkpoint folder, instead of --arch.")
    preset: str = option("tiny", "Sizes of the random model.", choices=("tiny", "small", "llama-8b"))
    lengths: tuple[int, ...] = option((), "Prompt tokens; default by device.")
    batch: int = option(1, "Batch size.")
    dtype: str = option("", "Default: bf16 on a GPU, fp32 on the CPU.", choices=("", "bf16", "fp16", "fp32"))
    hints: tuple[str, ...] = option(
        ("single_qa", "no hint", "dense"), "Task hints to run sparsepass under.", "Variants"
    )
    baselines: tuple[str, ...] = option(("eager", "inductor"), "eager, inductor; 'none' for none.", "Variants")
