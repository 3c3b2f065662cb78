"""The ``sparsepass`` command: explain a model, look at policies, describe the environment."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from sparsepass.cli.bench import add_commands
from sparsepass.cli.policy import policy_app
from sparsepass.errors import OptionError, SparsepassError, close_names, shown
from sparsepass.measure.bench.options import whole_number

if TYPE_CHECKING:
    import torch

    from sparsepass.reports.report import Report


class ErrorsInWords(TyperGroup):
    """Prints a SparsepassError as its message alone and exits with 2; any other exception is a bug and is raised."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SparsepassError as error:
            message = Text("Error: ", style="bold red").append(str(error), style="not bold default")
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=ErrorsInWords,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Block-sparse attention by torch.compile, with budgets that follow the task and the length.",
)
app.add_typer(policy_app, name="policy")
add_commands(app)


class Attention(StrEnum):
    """``attn_implementation`` of transformers."""

    SDPA = "sdpa"
    EAGER = "eager"


class Side(StrEnum):
    """Where a batch is padded."""

    LEFT = "left"
    RIGHT = "right"
    NONE = "none"


class Dtype(StrEnum):
    """Floating-point types of a model."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


_TORCH_DTYPES = {Dtype.FP32: "float32", Dtype.BF16: "bfloat16", Dtype.FP16: "float16"}
_MODEL, _INPUT, _RUN, _OUTPUT = "Model", "Input", "Budget", "Output"


def _tokens(text: str) -> int:
    try:
        if (count := whole_number(text)) >= 1:
            return count
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.BadParameter(f"{count} is given; accepted is 1 or more.")


@app.command(
    epilog="Example: sparsepass explain --arch qwen2 --layers 2 --length 16384 --task single_qa --draw graph.png"
)
def explain(
    arch: Annotated[
        str,
        typer.Option(help="A transformers model_type; built small, random weights.", rich_help_panel=_MODEL),
    ] = "llama",
    model: Annotated[
        Path | None, typer.Option(help="Local checkpoint folder, instead of --arch.", rich_help_panel=_MODEL)
    ] = None,
    layers: Annotated[int, typer.Option(min=1, rich_help_panel=_MODEL)] = 4,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.", rich_help_panel=_MODEL)] = 8,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads (GQA).", rich_help_panel=_MODEL)] = 2,
    head_dim: Annotated[int, typer.Option(min=1, rich_help_panel=_MODEL)] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.", rich_help_panel=_MODEL)] = 256,
    attn: Annotated[
        Attention, typer.Option(help="How the model writes its attention.", rich_help_panel=_MODEL)
    ] = Attention.SDPA,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bf16 on an accelerator, else fp32.", rich_help_panel=_MODEL)
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1; auto takes an accelerator if there is one.", rich_help_panel=_MODEL)
    ] = "auto",
    length: Annotated[
        int, typer.Option(parser=_tokens, metavar="INTEGER", help="Prompt tokens, such as 4K.", rich_help_panel=_INPUT)
    ] = 4096,
    batch: Annotated[int, typer.Option(min=1, rich_help_panel=_INPUT)] = 1,
    padding: Annotated[
        Side, typer.Option(help="Pad the rows to different real lengths.", rich_help_panel=_INPUT)
    ] = Side.NONE,
    task: Annotated[
        str | None,
        typer.Option(help="Task hint; none is the hardest class. With commas: one per row.", rich_help_panel=_RUN),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file; default: the built-in prior.", rich_help_panel=_RUN)
    ] = None,
    always_sparse: Annotated[
        bool,
        typer.Option("--always-sparse", help="Sparse even where it was measured to be slower.", rich_help_panel=_RUN),
    ] = False,
    inductor: Annotated[
        bool, typer.Option("--inductor", help="Compile with Inductor, as in production (slower).", rich_help_panel=_RUN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout; with --verbose the graphs too.", rich_help_panel=_OUTPUT)
    ] = False,
    draw: Annotated[
        Path | None, typer.Option(help="Picture of the graphs: .png, .svg or .pdf.", rich_help_panel=_OUTPUT)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="One row per site, with near misses.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """List every attention site of a model's prefill: matched or not and why, plan, guards, density achieved."""
    from sparsepass.measure.models import ModelShape, build_random_model, load_model
    from sparsepass.policies.policy import resolve_policy
    from sparsepass.warmup import random_inputs

    if draw is not None:
        from sparsepass.reports.draw import check_path

        check_path(draw)  # before minutes of work, not after
    if policy is not None:
        resolve_policy(policy)
    place = _device(device)
    kind = _dtype(dtype, place)
    with Console(stderr=True).status("building the model"):
        if model is not None:
            built = load_model(str(model), attn=attn.value, dtype=kind, device=place)
        else:
            shape = ModelShape(layers, heads, kv_heads, head_dim, hidden, max_length=length)
            built = build_random_model(arch, shape, attn=attn.value, dtype=kind, device=place)
        hint = task.split(",") if task is not None and "," in task else task
        rows = len(hint) if isinstance(hint, list) and batch == 1 else batch
        inputs = random_inputs(built, length=length, batch=rows, padding=padding.value)
    options = {name: True for name, on in (("always_sparse", always_sparse), ("inductor", inductor)) if on}
    report = _explain(built, inputs, hint, policy, {f"sparsepass.{name}": on for name, on in options.items()})
    if as_json:
        typer.echo(report.to_json(nodes=verbose))
    else:
        _print(report, verbose)
    if draw is not None:
        Console(stderr=True).print(Text(f"Picture: {report.draw(draw)}"))


def _explain(
    model: Any, inputs: dict[str, Any], task: str | list[str] | None, policy: Path | None, options: dict[str, Any]
) -> Report:
    import torch

    import sparsepass

    with Console(stderr=True).status("compiling and running"):
        try:
            report: Report = sparsepass.explain(model, **inputs, task=task, policy=policy, options=options or None)
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"Out of memory on {inputs['input_ids'].device}: {str(error).splitlines()[0]} "
                "Give a smaller --length, --batch or model."
            ) from error
    return report


def _print(report: Report, verbose: bool) -> None:
    console = Console()
    if console.is_terminal:
        console.print(report.table(verbose=verbose))
    else:
        # Piped: rich would take 80 columns, too few for the table.
        typer.echo(report.text(width=120, verbose=verbose))


@app.command()
def version() -> None:
    """Print the version of sparsepass."""
    from sparsepass.host.environment import package_version

    typer.echo(f"sparsepass {package_version()}")


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False) -> None:
    """Versions, devices and kernels: paste this into a bug report."""
    from sparsepass.host.environment import environment

    sections = environment()
    if as_json:
        typer.echo(json.dumps(sections, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for section, values in sections.items():
        if values:
            table.add_row(Text(section, style="bold"), "")
        for name, value in values.items():
            table.add_row(Text(f"  {name}"), Text(value))
    Console().print(table)


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _device(given: str) -> str:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if given == "auto":
        return "cpu" if accelerator is None else accelerator.type
    known = {"auto", "cpu"} | ({accelerator.type} if accelerator is not None else set())
    if accelerator is not None:
        known |= {f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())}
    if given not in known:
        raise OptionError(f"--device {shown(given)} is not there. {close_names(given, known)}")
    return given


def _dtype(given: Dtype | None, device: str) -> torch.dtype:
    import torch

    kind = given or (Dtype.FP32 if device == "cpu" else Dtype.BF16)
    found: torch.dtype = getattr(torch, _TORCH_DTYPES[kind])
    return found


def main() -> None:
    """Entry point of the ``sparsepass`` script."""
    app()
