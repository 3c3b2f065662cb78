"""Small rules that whole models rarely show: which nodes write, what stays in force, keys of mixed batches."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import fx

from sparsepass.graph.canonical import mutates
from sparsepass.kernels.attend.reference import changed_scores
from sparsepass.kernels.blocks import list_width, visible_block_counts
from sparsepass.masks.ir import Bool, Logic
from sparsepass.masks.recognize import _Recognizer, _tightest
from sparsepass.masks.terms import Refused
from sparsepass.patterns.pattern import HIDES
from sparsepass.planning.mix import Mix, MixTable, _at_most_one, key_of
from sparsepass.request.hints import Auto, current_auto, current_task, task
from sparsepass.types import TASKS, Align, Band, TaskClass


def test_nodes_that_write() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert mutates(graph.call_method("__setitem__", (x, 0, x)))
    assert mutates(graph.call_function(operator.setitem, (x, 0, x)))
    assert mutates(graph.call_function(torch.add, (x, x), {"out": x}))
    assert not mutates(graph.call_function(torch.add, (x, x)))


def test_auto_in_auto_stays_unbounded() -> None:
    with task("auto"), task("auto"):
        assert current_auto() == Auto(None)


def test_a_suspended_generator_leaves_no_hint() -> None:
    def stream() -> Iterator[None]:
        with task("single_qa"):
            yield

    source = stream()
    with task("dense"):
        next(source)
    assert current_task() is TaskClass.UNKNOWN


def test_lists_have_room_for_what_is_always_kept() -> None:
    assert list_width(1000, 16, 1) == 3


def test_the_tightest_of_bands() -> None:
    assert _tightest([Band(left=7), Band(left=3, right=0)], True) == Band(left=3, right=0)


def test_mean_costs_decide() -> None:
    cheap, costly = TaskClass.SINGLE_QA, TaskClass.MULTI_HOP
    table = MixTable([])
    costs = tuple(0.0 if one is cheap else 2.0 for one in TASKS)
    table._mixes[frozenset((cheap, costly))] = Mix(("s",), ("d",), "s", "d", costs)
    pays, not_so = (cheap, cheap, cheap, costly), (cheap, costly, costly, costly)
    for rows, expected in ((pays, "s"), (not_so, "d")):
        assert table.key(rows) == expected
        assert table._last == (rows, expected)
        assert table.texts(rows) == (expected,)
    assert _at_most_one(1.0)
    assert not _at_most_one(1.1)


def test_keys_tell_row_texts_apart() -> None:
    assert key_of(["pooled_topk|a"]) != key_of(["pooled_topk|b"])


def test_the_last_rows_see_no_further_than_they_are() -> None:
    assert visible_block_counts(5, 90, -1, 0, 0, 16, 8) == (1,)


def test_bands_from_different_corners_are_refused() -> None:
    with pytest.raises(Refused, match="different corners"):
        _tightest([Band(right=0), Band(right=0, align=Align.BOTTOM_RIGHT)], False)


def test_a_subtracted_mask_hides_what_it_marks() -> None:
    reader = _Recognizer.__new__(_Recognizer)
    reader.sign, reader.dtype, reader.logic = -1.0, torch.bool, Logic(())
    assert not reader._shows(-HIDES)
    assert reader._visible(Bool(reader.logic.true)) is reader.logic.false


def test_the_soft_cap_of_the_reference() -> None:
    given = SimpleNamespace(softcap=2.0, slopes=None, bias=None)
    found = changed_scores(torch.full((1, 1, 1, 1), 3.0), given, 0)  # type: ignore[arg-type]
    torch.testing.assert_close(found.item(), 2.0 * math.tanh(1.5))
