"""Who may import whom: each module only what stands in a layer before its own, so that the parts stay replaceable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(f"sparsepass.{name}" for name in names.split())
    for names in (
        "types errors",
        "files",
        # Facts about the outside world, and plain tools.
        "kernels counters compile_time dynamo environment versions jsonable drawgraph canon mask_ir rowinputs watch",
        "made surroundings",
        "hints methods crossover_table marked match drawlayout mask_values mask_mutation models",
        "patterns ops strides crossover policy_rules draw mask_read mix tasks",
        "testbed policy functional mask_views mask_segments report",
        "mask_terms policy_file report_table testing",
        "mask cli_policy",
        "sites fingerprint",
        "layer_numbers",
        "entries",
        "ranges options verify",
        "plan rewrite inline",
        "watchplan record compiled_inside callsizes",
        "elsewhere",
        "pipeline",
        "decorator inspection warmup monitor",
        "monitor_table",
        "bench",
        "calibrate",
        "auto",
        "tune coverage",
        "cli_bench",
        "cli",
    )
)
"""From the bottom up. A package (kernels, patterns, methods, testing) is one entry: its files may import each other."""

RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

UPWARD_WHEN_RUN = {
    ("sparsepass.policy", "sparsepass.policy_file"),  # reading files needs jsonschema, which the pass does not
    ("sparsepass.report", "sparsepass.report_table"),  # Report.table(): the data knows nothing of how it is printed
    ("sparsepass.monitor", "sparsepass.monitor_table"),  # likewise
}
"""Imports inside a function that point up, each for a reason; everything else points down there too."""

MUTATES_GRAPHS = {"sparsepass.rewrite", "sparsepass.inline"}
GRAPH_EDITS = {
    "call_function",
    "call_method",
    "create_node",
    "erase_node",
    "inserting_after",
    "inserting_before",
    "replace_all_uses_with",
    "replace_input_with",
}
NEVER = "eliminate_dead_code"
"""Deletes cache writes (``index_copy_``) that no node of a Dynamo graph reads: wrong tokens."""

PRIVATE_PACKAGES = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch._guards")
PRIVATE_ALLOWED = {
    "sparsepass.dynamo",
    "sparsepass.marked",  # maybe_mark_dynamic: documented, in spite of its place
}


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    when_run: bool
    """Inside a function, so not when the importing module is loaded."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "sparsepass" else ("sparsepass", *parts))


FILES = [
    path
    for folder in (
        *("sparsepass", "sparsepass/bench", "sparsepass/coverage", "sparsepass/methods", "sparsepass/testing"),
        *("sparsepass/tasks", "sparsepass/tasks/text", "sparsepass/tasks/tokens", "sparsepass/testbed"),
        *("sparsepass/tune", "sparsepass/calibrate", "sparsepass/auto"),
        *("kernels", "patterns"),
    )
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"  # it re-exports the public names, from every layer
]


def imports(tree: ast.AST, when_run: bool = False) -> Iterator[Import]:
    """Every import in a module but those for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, when_run)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                # "from sparsepass import plan" and "from sparsepass.plan import f" both name a module to us.
                yield Import(f"{node.module}.{alias.name}", node.lineno, when_run)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        else:
            inside = when_run or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, inside)


def unit(module: str) -> str:
    """``sparsepass.kernels.blocks.ceil_div`` is of the unit ``sparsepass.kernels``, ``sparsepass.plan`` its own."""
    return ".".join(module.split(".")[:2])


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    mine = unit(module_of(path))
    assert mine in RANK, f"{mine} stands in no layer: add it to LAYERS in {Path(__file__).name}"
    for found in imports(parse(path)):
        theirs = unit(found.module)
        if theirs not in RANK or theirs == mine or (found.when_run and (mine, theirs) in UPWARD_WHEN_RUN):
            continue
        assert RANK[theirs] < RANK[mine], f"{path.name}:{found.line}: {mine} imports {theirs}, which is not below it"


def test_no_module_is_listed_that_does_not_exist() -> None:
    known = {unit(module_of(path)) for path in FILES}
    assert set(RANK) - known == set()
    assert {name for pair in UPWARD_WHEN_RUN for name in pair} <= known


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_rewrite_edits_graphs(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != NEVER, f"{path.name}:{node.lineno}: {NEVER} drops writes that no node reads"
            if module_of(path) not in MUTATES_GRAPHS:
                assert node.func.attr not in GRAPH_EDITS, f"{path.name}:{node.lineno}: {node.func.attr} edits a graph"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_private_torch_api_is_used_in_one_place(path: Path) -> None:
    if unit(module_of(path)) in PRIVATE_ALLOWED:
        return
    for found in imports(parse(path)):
        assert not found.module.startswith(PRIVATE_PACKAGES), (
            f"{path.name}:{found.line} imports {found.module}: put what it is for into sparsepass/dynamo.py"
        )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_triton_is_imported_by_kernels_alone(path: Path) -> None:
    if "triton" in path.stem or module_of(path).startswith("sparsepass.kernels."):
        return
    assert not any(found.module.split(".")[0] == "triton" for found in imports(parse(path)))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_hypothesis_is_imported_by_the_test_kit_alone(path: Path) -> None:
    if unit(module_of(path)) != "sparsepass.testing":
        assert not any(found.module.split(".")[0] == "hypothesis" for found in imports(parse(path)))


def test_the_checks_see_what_they_are_for() -> None:
    """The reader finds each kind of import, and tells loading from running from annotations."""
    source = """
from sparsepass import plan
from sparsepass.types import Plan
import sparsepass.kernels.blocks
if TYPE_CHECKING:
    from sparsepass.cli import app
class A:
    def f(self):
        from torch._inductor import config
"""
    found = list(imports(ast.parse(source)))
    assert [one.module for one in found] == [
        "sparsepass.plan",
        "sparsepass.types.Plan",
        "sparsepass.kernels.blocks",
        "torch._inductor.config",
    ]
    assert [one.when_run for one in found] == [False, False, False, True]
    assert [unit(one.module) for one in found][:3] == ["sparsepass.plan", "sparsepass.types", "sparsepass.kernels"]
