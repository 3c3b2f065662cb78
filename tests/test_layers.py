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
        "moved types errors",
        "host graph kernels.blocks kernels.spec kernels.types",
        "request kernels.arguments kernels.scores kernels.support",
        "kernels.runtime",
        "kernels.attend",
        "kernels.select kernels.mass",
        "kernels.slash",
        "methods",
        "patterns",
        "masks policies",
        "sites",
        "planning",
        "rewriting",
        "pipeline functional",
        "decorator warmup reports testing",
        "monitoring",
        # Nothing but the command line imports what measures.
        "measure.models",
        "measure.tasks",
        "measure.testbed measure.bench",
        "measure.calibrate",
        "measure.auto",
        "measure.tune measure.coverage",
        "cli",
        "__main__",
    )
)
"""From the bottom up. A folder is one entry: its files may import each other."""

RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

MUTATES_GRAPHS = {"sparsepass.rewriting.rewriter", "sparsepass.rewriting.inline"}
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
    "sparsepass.graph.torch_private",
    "sparsepass.graph.marked",  # maybe_mark_dynamic: documented, in spite of its place
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
    for folder in ("sparsepass", "kernels", "patterns")
    for path in sorted((ROOT / folder).rglob("*.py"))
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
                # "from sparsepass import planning" and "from sparsepass.planning import plan" both name a module to us.
                yield Import(f"{node.module}.{alias.name}", node.lineno, when_run)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        else:
            inside = when_run or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, inside)


def unit(module: str) -> str:
    """The entry of ``LAYERS`` that a module or a name in one belongs to; of none, the module itself."""
    parts = module.split(".")
    heads = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((head for head in heads if head in RANK), module)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    mine = unit(module_of(path))
    assert mine in RANK, f"{mine} stands in no layer: add it to LAYERS in {Path(__file__).name}"
    for found in imports(parse(path)):
        theirs = unit(found.module)
        if theirs not in RANK or theirs == mine:
            continue
        assert RANK[theirs] < RANK[mine], f"{path.name}:{found.line}: {mine} imports {theirs}, which is not below it"


def test_no_module_is_listed_that_does_not_exist() -> None:
    known = {unit(module_of(path)) for path in FILES}
    assert set(RANK) - known == set()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_rewrite_edits_graphs(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != NEVER, f"{path.name}:{node.lineno}: {NEVER} drops writes that no node reads"
            if module_of(path) not in MUTATES_GRAPHS:
                assert node.func.attr not in GRAPH_EDITS, f"{path.name}:{node.lineno}: {node.func.attr} edits a graph"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_private_torch_api_is_used_in_one_place(path: Path) -> None:
    if module_of(path) in PRIVATE_ALLOWED:
        return
    for found in imports(parse(path)):
        assert not found.module.startswith(PRIVATE_PACKAGES), (
            f"{path.name}:{found.line} imports {found.module}: that belongs into sparsepass/graph/torch_private.py"
        )


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_triton_is_imported_by_kernels_alone(path: Path) -> None:
    if module_of(path).startswith("sparsepass.kernels."):
        return
    assert not any(found.module.split(".")[0] == "triton" for found in imports(parse(path)))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_hypothesis_is_imported_by_the_test_kit_alone(path: Path) -> None:
    if unit(module_of(path)) != "sparsepass.testing":
        assert not any(found.module.split(".")[0] == "hypothesis" for found in imports(parse(path)))


def test_the_checks_see_what_they_are_for() -> None:
    """The reader finds each kind of import, and tells loading from running from annotations."""
    source = """
from sparsepass import planning
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
        "sparsepass.planning",
        "sparsepass.types.Plan",
        "sparsepass.kernels.blocks",
        "torch._inductor.config",
    ]
    assert [one.when_run for one in found] == [False, False, False, True]
    assert [unit(one.module) for one in found][:3] == [
        "sparsepass.planning",
        "sparsepass.types",
        "sparsepass.kernels.blocks",
    ]
