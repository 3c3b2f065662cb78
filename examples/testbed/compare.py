"""A larger model with sparse attention against a smaller dense one that costs as much: who answers more."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rich.table import Table

from sparsepass.measure.calibrate.bounds import lower_bound, upper_bound
from sparsepass.measure.testbed import SIZES

COSTS = ("flops", "bytes")
LEARNED = 0.5
"""A model that answers less of a class than this, dense, has not learned it: no budget can give it back."""

Cell = dict[str, Any]


def difference(ours: Cell, theirs: Cell) -> tuple[float, float, float]:
    """Accuracy of one cell minus another's on the same questions, with a 95% interval: exact bounds on what the one
    alone gets right and the other alone, each at a half of the error."""
    count = ours["questions"]
    pairs = list(zip(ours["right"], theirs["right"], strict=True))
    won, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    low = lower_bound(won, count, 0.0125) - upper_bound(lost, count, 0.0125)
    high = upper_bound(won, count, 0.0125) - lower_bound(lost, count, 0.0125)
    return (won - lost) / count, low, high


def comparisons(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Per cost, pair of sizes, class and length: the smaller model dense, and of the larger one's sparse budgets the
    costliest that costs at most as much. Chosen by cost alone, not by the answers."""
    found = []
    sizes = [size for size in SIZES if any(cell["model"] == size for cell in cells)]
    dense = {_key(cell): cell for cell in cells if cell["budget"] == "dense"}
    for axis in COSTS:
        for smaller, larger in combinations(sizes, 2):
            for (model, task, length), theirs in dense.items():
                if model != smaller or (larger, task, length) not in dense:
                    continue
                sparse = [cell for cell in cells if _key(cell) == (larger, task, length) and cell["budget"] != "dense"]
                fitting = [cell for cell in sparse if cell[axis] <= theirs[axis]]
                least = min(cell[axis] for cell in sparse) / theirs[axis]
                entry = {
                    "cost": axis, "smaller": smaller, "larger": larger, "class": theirs["class"], "length": length,
                    "dense": theirs["accuracy"], "least": least,
                    "learned": [theirs["accuracy"] >= LEARNED, dense[larger, task, length]["accuracy"] >= LEARNED],
                }  # fmt: skip
                if fitting:
                    ours = max(fitting, key=lambda cell: cell[axis])
                    entry |= {
                        "budget": ours["budget"], "density": ours["density"], "share": ours[axis] / theirs[axis],
                        "sparse": ours["accuracy"], "difference": difference(ours, theirs),
                    }  # fmt: skip
                found.append(entry)
    return found


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell["model"], cell["task"], cell["length"]


def accuracy_table(cells: Sequence[Cell]) -> Table:
    """Dense accuracy, and the sparsest budget that answers as much within 0.01, per model, class and length."""
    table = Table(title="Dense accuracy > least density within 0.01", title_justify="left")
    lengths = sorted({cell["length"] for cell in cells})
    for name in ("model", "class", *map(str, lengths)):
        table.add_column(name, no_wrap=True)
    for model, kind in dict.fromkeys((cell["model"], cell["class"]) for cell in cells):
        row = []
        for length in lengths:
            mine = [cell for cell in cells if (cell["model"], cell["class"], cell["length"]) == (model, kind, length)]
            dense = next((cell["accuracy"] for cell in mine if cell["budget"] == "dense"), None)
            if dense is None:
                row.append("")
            elif dense < LEARNED:
                row.append(f"{dense:.2f} not learned")
            else:
                row.append(f"{dense:.2f} > {min(c['density'] for c in mine if c['accuracy'] >= dense - 0.01):.2f}")
        table.add_row(model, kind, *row)
    return table


def comparison_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Larger sparse minus smaller dense, at most its cost (95% interval)", title_justify="left")
    kinds = list(dict.fromkeys(one["class"] for one in found))
    for name in ("cost", "pair", "tokens", *kinds):
        table.add_column(name, no_wrap=True)
    rows = dict.fromkeys((one["cost"], one["smaller"], one["larger"], one["length"]) for one in found)
    for axis, smaller, larger, length in rows:
        cells = []
        for kind in kinds:
            one = next(
                one for one in found
                if (one["cost"], one["smaller"], one["larger"], one["length"], one["class"])
                == (axis, smaller, larger, length, kind)
            )  # fmt: skip
            cells.append(_said(one))
        table.add_row(axis, f"{larger} / {smaller}", str(length), *cells)
    return table


def _said(one: dict[str, Any]) -> str:
    if "difference" not in one:
        return f"costs {one['least']:.1f}x at least"
    mean, low, high = one["difference"]
    mark = "" if all(one["learned"]) else " *"
    return f"{mean:+.2f} ({low:+.2f} {high:+.2f}) d {one['density']:.2f}{mark}"
