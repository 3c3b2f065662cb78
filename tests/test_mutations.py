"""The list of mutations fits the tree, and the script tells a mutation that is noticed from one that is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import KILLED, SURVIVED, Mutation, MutationError, copy_tree, former, load, mutated, run_tests


def test_the_list_fits_the_tree() -> None:
    assert len(load()) >= 100


def test_a_text_that_is_not_there_once_is_an_error() -> None:
    for text in ("none", "a a"):
        with pytest.raises(MutationError, match="stands there once"):
            Mutation("x", "a", "b", ()).applied(text)
    assert Mutation("x", "a", "b", ()).applied("1 a 2") == "1 b 2"
    with pytest.raises(MutationError, match="by itself"):
        Mutation("x", "a", "a", ()).applied("a")


def test_a_mutation_is_made_and_undone(tmp_path: Path) -> None:
    """One that the tests notice, one that they do not, and one that leaves no module to import."""
    (tmp_path / "tree").mkdir()
    tree = tmp_path / "tree"
    (tree / "halves.py").write_text("def half(x: int) -> int:\n    return x // 2\n\n\nUNUSED = 1\n")
    (tree / "test_halves.py").write_text("from halves import half\n\n\ndef test_half():\n    assert half(7) == 3\n")
    (tree / "pytest.ini").write_text("[pytest]\npythonpath = .\naddopts = --import-mode=importlib\n")
    for find, replace, expected in (
        ("// 2", "/ 2", KILLED),
        ("UNUSED = 1", "UNUSED = 2", SURVIVED),
        ("def", "de", KILLED),
    ):
        before = (tree / "halves.py").read_text()
        with mutated(tree, Mutation("halves.py", find, replace, ())):
            assert run_tests(tree, "test_halves.py", 100) == expected
        assert (tree / "halves.py").read_text() == before
    with pytest.raises(MutationError, match="status 4"):
        run_tests(tree, "none.py", 100)


def test_links_of_the_tree_stay_links(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    assert (tree / "sparsepass" / "kernels").is_symlink()
    assert (tree / "sparsepass" / "kernels" / "attend" / "reference.py").is_file()
    assert not (tree / ".git").exists()


def test_a_cut_record_of_a_run_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "mutations.jsonl"
    assert former(file) == {}
    file.write_text('{"key": "a", "outcome": "killed"}\n{"key": "b", "outc')
    assert former(file) == {"a": "killed"}
