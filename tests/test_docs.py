"""The documents: links lead somewhere, commands and names exist, figures are those of the measurement files."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import sparsepass
from examples import unmatched_site
from sparsepass.cli.commands import app
from sparsepass.planning import options
from sparsepass.types import TaskClass

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = [path for folder in ("sparsepass", "kernels", "patterns") for path in (ROOT / folder).rglob("*.py")]


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(document), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (document.parent / name).resolve() if name else document
        assert linked.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{document.name} links to {target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_exist(document: Path) -> None:
    invented = {"your_form.py", "your_kernel.py", "your_script.py", "serve.py", "NAME.py", "tuning.json"}
    text = text_of(document)
    for name in re.findall(r"`?\b((?:sparsepass|kernels|patterns|tests|examples|docs)/[\w/.]+\.\w+)", text):
        assert Path(name).name in invented or (ROOT / name).exists(), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_public_names_exist(document: Path) -> None:
    for name in re.findall(r"\bsparsepass\.([A-Za-z_]+)\b(?!\.json|\.schema)", text_of(document)):
        known = hasattr(sparsepass, name) or importlib.util.find_spec(f"sparsepass.{name}") is not None
        assert known or f"sparsepass.{name}" in options.KNOWN, f"{document.name} names sparsepass.{name}"


def test_make_targets_named_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.M))
    named = {name for document in DOCUMENTS for name in re.findall(r"`make ([a-z]+)", text_of(document))}
    assert {"demo", "test"} <= named <= targets


def test_commands_named_in_documents_exist() -> None:
    runner = CliRunner()
    commands = {
        match
        for document in DOCUMENTS
        for match in re.findall(r"^(?:.*`)?sparsepass ([a-z]+(?: [a-z]+)?)[ `\n]", text_of(document), re.M)
    }
    assert "explain" in commands
    for command in commands:
        result = runner.invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, f"sparsepass {command}: {result.output}"


def test_options_of_commands_exist() -> None:
    runner = CliRunner()
    for document in DOCUMENTS:
        for line in re.findall(r"^sparsepass explain (.*)$", text_of(document), re.M):
            accepted = runner.invoke(app, ["explain", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
            for flag in re.findall(r"--[a-z-]+", line):
                assert flag in accepted, f"{document.name}: sparsepass explain {flag}"


def test_environment_variables_named_exist() -> None:
    source = "".join(text_of(path) for path in SOURCES)
    for document in DOCUMENTS:
        for name in set(re.findall(r"\bSPARSEPASS_[A-Z_]+\b", text_of(document))):
            assert f'"{name}"' in source, f"{document.name} names {name}, which nothing reads"


def test_task_classes_are_all_documented() -> None:
    policy = text_of(ROOT / "docs" / "policy.md")
    assert [str(task) for task in TaskClass if f"`{task}`" not in policy] == []


def test_reasons_in_the_table_are_those_given() -> None:
    """The troubleshooting table quotes the beginnings of reasons; they have to be in the code."""
    source = " ".join(text_of(path) for path in SOURCES)
    table = text_of(ROOT / "docs" / "troubleshooting.md").split("| reason begins with")[1].split("\n\n")[0]
    quoted = ["the policy is dense", "gradients are needed here", "attention dropout is", "decode site"]
    for reason in quoted:
        assert reason in table
        assert reason in source


def results() -> ModuleType:
    path = ROOT / "docs" / "measurements" / "results.py"
    spec = importlib.util.spec_from_file_location("results", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_have_the_figures_of_the_measurement_files() -> None:
    assert results().main(["--check"]) == 0


def test_results_are_written_between_the_markers(tmp_path: Path) -> None:
    module = results()
    records = [
        {"length": 4096, "variant": "eager", "median_s": 0.2},
        {"length": 4096, "variant": "inductor", "error": "out of memory: tried"},
        {"length": 4096, "variant": "single_qa", "median_s": 0.1},
    ]
    content = {"hardware": "a GPU", "threads": 2, "versions": {"torch": "2.11"}, "command": "python x.py"}
    table = "\n".join(module.end_to_end({**content, "records": records}))
    assert "| eager | 200 ms |" in table
    assert "| Inductor | out of memory |" in table
    assert "| sparsepass, `single_qa` | 100 ms (2.0x, -) |" in table
    assert table.endswith("```\npython x.py\n```")
    body = module.updated(f"before\n{module.BEGIN}\nold\n{module.END}\nafter", "new\n")
    assert body == f"before\n{module.BEGIN}\nnew\n{module.END}\nafter"
    with pytest.raises(ValueError, match="needs each of these lines once"):
        module.updated("no markers", "")


def test_tables_of_curves_and_lines_say_what_was_measured() -> None:
    module = results()
    environment = {"device": "a GPU", "versions": {"torch": "2.11"}, "command": "python x.py"}
    found = {"length": 131072, "curve": "Theirs", "variant": "alpha 0.08", "default": True, "error": 0.03}
    found |= {"median_ms": 28.0, "over_dense": 8.8, "ours": "threshold", "our_error": 0.029, "our_ms": 14.0}
    found |= {"our_over_dense": 17.6, "times_faster": 2.0}
    table = module.error_time({"environment": environment, "comparisons": [found]})
    row = "| 128K | Theirs, alpha 0.08 (default) | 0.03 | 28 ms | 8.8x | `threshold` | 0.029 | 14 ms | 17.6x | 2.0 |"
    assert row in table
    assert module.error_time({"environment": environment, "comparisons": []}) == []
    line = {"length": 32768, "variant": "auto", "slope_ms": 13.0, "slope_ms_interval": [12.9, 13.1]}
    line |= {"constant_ms": 0.05, "constant_ms_interval": [0.01, 0.09]}
    line |= {"constant_as_density": 0.0038, "largest_residual": 0.02}
    table = module.density_fit({"environment": environment, "level": 0.95, "lines": [line]})
    assert "| 32K | auto | 13 ms (12.9 to 13.1) | 0.05 ms (0.01 to 0.09) | 0.0038 | 2.0% |" in table


def test_the_report_with_an_unmatched_site_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """All but what changes from machine to machine: times, memory, versions, the kernel."""

    def lasting(printed: str) -> list[str]:
        printed = re.sub(r"peak memory [\d.]+ \w+|compiled in [\d.]+ s|'[0-9a-f]{12}'|\w+ kernel", "", printed)
        named = re.sub(r" - Where sparse pays:.*?(?=Notes:)", "", " ".join(printed.split()))
        return named.split(" x86_64, python")[0].split()

    unmatched_site.main([])
    document = text_of(ROOT / "docs" / "troubleshooting.md")
    _, shown = re.findall(r"^```\n(.*?)^```", document.split("## A site that no pattern matched")[1], re.M | re.S)[:2]
    assert lasting(capsys.readouterr().out) == lasting(shown)
