"""The testbed answers questions under each hint, right or wrong: where answers break, and what was computed.

A small Llama that was really trained reads contexts of four kinds of task. Each is asked under every hint: a hint for
an easier class than the task's makes the budget too small, and answers break. Run by: make demo
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import sparsepass
from sparsepass.measure import testbed
from sparsepass.measure.tasks.base import Question, Sample
from sparsepass.measure.tasks.intervals import Interval, bootstrap
from sparsepass.measure.tasks.score import answer
from sparsepass.measure.tasks.tokens import TOKEN_TASKS, TokenTask
from sparsepass.rewriting import counters

HINTS = ("dense", "single_qa", "multi_qa", "multi_hop", "aggregation")
POLICY: dict[str, Any] = {
    "version": 1,
    "name": "what this demo needs of the testbed, by hand; sparsepass calibrate measures it",
    "default": "dense",
    "rules": [
        {"task": "single_qa", "budget": {"method": "vertical_slash", "density": 0.4, "block": 64}},
        {"task": "multi_qa", "budget": {"method": "pooled_topk", "density": 0.1, "block": 64, "last": 2}},
        {"task": "aggregation", "budget": {"method": "pooled_topk", "density": 0.1, "block": 64, "last": 2}},
    ],
}

ABOUT = (
    "[bold]The policy[/bold]: single_qa keeps single columns, chosen by the last queries: enough to look facts up, too "
    "few to count. multi_qa and aggregation read everything, but only in the two blocks where the question stands "
    "(last=2), which serves lookups too. Chains are resolved all over the context, so multi_hop stays dense. --policy "
    "takes a file that sparsepass calibrate wrote."
)


@dataclass(frozen=True)
class Cell:
    """A task under a hint: the share of right answers with its interval, and the share of blocks computed."""

    task: TokenTask
    hint: str
    right: Interval
    density: float
    example: tuple[Question, tuple[int, ...]]

    @property
    def own(self) -> bool:
        return self.hint == str(self.task.task_class)


def measure(model: Any, task: TokenTask, hint: str, samples: Sequence[Sample]) -> Cell:
    before, scores, example = counters.total(), [], None
    for sample in samples:
        answers = answer(model, sample, task_hint=hint, mode="forced")
        pairs = list(zip(sample.questions, answers, strict=True))
        scores.append([float(mine == question.answer) for question, mine in pairs])
        wrong = [pair for pair in pairs if pair[1] != pair[0].answer]
        example = (wrong or pairs)[0]
    assert example is not None
    density = (counters.total() - before).density
    return Cell(task, hint, bootstrap(scores), 1.0 if density is None else density, example)


def table(cells: Sequence[Cell], length: int, questions: int) -> Table:
    found = Table(title=f"Right answers by task and hint, {length} tokens", title_justify="left")
    found.add_column("task", no_wrap=True)
    for hint in dict.fromkeys(one.hint for one in cells):
        found.add_column(hint, justify="right", no_wrap=True)
    for task in TOKEN_TASKS:
        row = [one for one in cells if one.task is task]
        dense = next(one for one in row if one.hint == "dense").right.mean
        texts = []
        for one in row:
            style = "red" if one.right.mean < dense - 0.1 else "green"
            text = f"{one.right.mean:.2f} at {one.density:.2f}"
            texts.append(f"[{style}]{'> ' if one.own else ''}{text}[/{style}]")
        found.add_row(str(task.task_class), *texts)
    found.caption = (
        f"Share right at share of blocks computed; {questions} questions each, one behind each context. "
        "'>': the task's own hint. Red: more than 0.1 under dense."
    )
    found.caption_justify = "left"
    return found


def examples(cells: Sequence[Cell]) -> list[str]:
    lines = []
    for one in cells:
        if one.hint in ("single_qa", str(one.task.task_class)):
            question, mine = one.example
            verdict = "right" if mine == question.answer else f"wrong, it is {' '.join(map(str, question.answer))}"
            asked, said = (" ".join(map(str, tokens)) for tokens in (question.prompt, mine))
            lines.append(f"{one.task.task_class} under {one.hint}: {asked} -> {said} ({verdict})")
    return lines


def picture(cells: Sequence[Cell], length: int, file: Path) -> None:
    """Answers over what was computed, a panel per task."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TOKEN_TASKS), figsize=(13, 3.4), sharey=True, layout="constrained")
    for panel, task in zip(panels, TOKEN_TASKS, strict=True):
        for one in (cell for cell in cells if cell.task is task):
            low, high = one.right.mean - one.right.low, one.right.high - one.right.mean
            marker = "*" if one.own else "o"
            panel.errorbar(
                one.density,
                one.right.mean,
                [[low], [high]],
                fmt=marker,
                markersize=13 if one.own else 7,
                label=one.hint,
            )
        panel.set(title=str(task.task_class), xlabel="share of blocks computed", xlim=(0, 1.05), ylim=(-0.03, 1.06))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("right answers")
    panels[-1].legend(title="hint (star: the task's)", fontsize=8)
    figure.suptitle(f"The testbed at {length} tokens, with 95% intervals")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="tokens of context, question and answer (1024)")
    parser.add_argument("--contexts", type=int, default=6, help="per task (6)")
    parser.add_argument("--questions", type=int, default=1, help="per context, where it has as many (1)")
    parser.add_argument("--hints", nargs="+", choices=HINTS, default=HINTS, help="besides dense; default: all")
    parser.add_argument("--policy", type=Path, help="a policy file in place of the one in this script")
    parser.add_argument("--out", type=Path, default=Path("answers.png"), help="the picture (answers.png)")
    args = parser.parse_args(argv)
    started, console = time.perf_counter(), Console(width=None if Console().is_terminal else 110)

    model = testbed.load(dtype=torch.float32)
    policy = sparsepass.Policy.load(args.policy) if args.policy else sparsepass.Policy.from_json(POLICY)
    options = {"sparsepass.policy": policy, "sparsepass.always_sparse": True, "sparsepass.inductor": False}
    model.compile(backend=sparsepass.backend, options=options)

    cells = []
    for task in track(TOKEN_TASKS, "Asking", console=console, transient=True):
        samples = [task.draw(args.length, seed, args.questions) for seed in range(args.contexts)]
        cells += [measure(model, task, hint, samples) for hint in dict.fromkeys(["dense", *args.hints])]
    console.print(table(cells, args.length, args.contexts * args.questions))
    console.print("\nFor example, in token ids:")
    for line in examples(cells):
        console.print(f"  {line}", markup=False, highlight=False)
    if not args.policy:
        console.print(f"\n{ABOUT}")
    picture(cells, args.length, args.out)
    console.print(f"\nPicture: {args.out}. {time.perf_counter() - started:.0f} s.", markup=False, highlight=False)


if __name__ == "__main__":
    main()
