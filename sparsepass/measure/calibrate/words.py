"""A calibration in sentences and cells: what the terminal, the report and the policy's description say alike."""

from __future__ import annotations

from sparsepass.measure.calibrate.cell import Cell, Status
from sparsepass.measure.calibrate.result import Calibration
from sparsepass.measure.calibrate.setting import setting_text


def tokens(length: int) -> str:
    """``8K`` for 8192; K is 1024."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def the_number(found: Calibration) -> str:
    """The one number: the safe budget for the mix, and what the policy computes beside it."""
    goal, fixed = found.goal, found.fixed()
    unmeasured = [cell for cell in found.cells if cell.status is Status.UNMEASURED]
    if fixed.budget is None:
        return (
            f"No single budget of those tried is safe for the whole mix at a loss of {goal.loss:.1%}. By class and "
            f"length the policy computes {found.mean_density():.3f} of the attention on average; what is not safe "
            f"stays dense{', as where the dense model fails' if unmeasured else ''}."
        )
    return (
        f"Safe budget for this mix: {setting_text(fixed.budget)}, {fixed.density:.3f} of the attention on average. "
        f"By class and length the policy computes {found.mean_density():.3f}."
    )


def how_sure(found: Calibration) -> str:
    """What the statement rests on."""
    goal = found.goal
    held_out = sum(trial.questions for cell in found.cells for trial in cell.trials if trial.held_out)
    asked = sum(cell.questions for cell in found.cells)
    return (
        f"Each verified budget keeps at least {1 - goal.loss:.1%} of the dense accuracy, {goal.confidence:.0%} sure "
        f"for each task and length by itself. That took {asked} questions, {held_out} of them held out; the dense "
        "model answered the same ones."
    )


def note(cell: Cell) -> tuple[str, str]:
    """A cell as two short texts: the density, and what it loses."""
    if cell.status is Status.SAFE:
        return f"{cell.density:.3f}", f"{cell.loss:+.1%}, at most {cell.high:.1%}"
    return str(cell.status), f"dense right {cell.accuracy:.0%}"
