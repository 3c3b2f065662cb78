"""Scores of an answer on token ids, from 0.0 to 1.0: the metrics of The Sparse Frontier (arXiv 2504.17768)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence


def exact_match(predicted: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """1.0 if every item is right and in its place."""
    return float(list(predicted) == list(gold))


def iou(predicted: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """Items in both, over items in either; order and repeats do not count. Two empty answers agree."""
    mine, theirs = set(predicted), set(gold)
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0


def f1(predicted: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall over items, each counted as often as it stands there."""
    if not predicted or not gold:
        return float(len(predicted) == len(gold))
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2.0 * shared / (len(predicted) + len(gold))


def in_place(predicted: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """Share of the gold items that stand in their place: the mean exact match of several questions at once."""
    if not gold:
        return float(not predicted)
    return sum(mine == theirs for mine, theirs in zip(predicted, gold, strict=False)) / len(gold)


def word_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """F1 over words without case, punctuation and articles, as for SQuAD (arXiv 1606.05250)."""
    return f1(_words(predicted), _words(gold))


def _words(items: Sequence[str]) -> list[str]:
    found = re.findall(r"\w+", " ".join(items).casefold())
    return [word for word in found if word not in ("a", "an", "the")]
