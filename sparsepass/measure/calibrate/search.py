"""The sparsest budget of a ladder that is safe: found on some samples, verified on others.

Safety rises along a ladder, so a search by halving needs few of its steps, and it stops asking about a budget as soon
as the answer is likely. All that the result rests on is the verification: samples that the search has not seen, looked
at three times, at most four budgets. The error of each look is bounded so that all together err as rarely as was asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparsepass.measure.calibrate.bounds import Paired, trials_needed
from sparsepass.measure.calibrate.cell import NOMINAL, Cell, Goal, Meter, Status, Trial, prefetch
from sparsepass.measure.calibrate.setting import Setting, setting_text
from sparsepass.measure.tasks.base import Task

LIKELY = 0.2
"""Error at which the search takes a budget for safe or not: it only says where to verify."""

DOUBT = 0.02
"""Chance that the loss is under what a verification hopes for when it sees whether it could still pass."""

ATTEMPTS = 4
"""Budgets that are verified at most; the k-th gets 1 / 2^k of the error, the last what is left."""

LOOKS = 3
"""Times that a verification looks at its samples: after as many as suffice if nothing is lost, three times as many, and
all. When is told from what dense gets right, never from what is lost. One that would hardly pass ends before."""

HELD_OUT = 1 << 32
"""Seeds of held-out samples begin here, those of the search at 0."""

NEAR = 4
"""The densest budget is asked about until it is shown to be unsafe, unless it loses less than this times the limit."""

AHEAD = 16
"""Contexts that a search asks about at once to begin with, where the meter takes many; a verification four times as
many. Then as many as were asked before."""

STRETCH = 4
"""Where a context has fewer questions than were asked for, a verification takes so many times the contexts at most."""


@dataclass
class Search:
    """One task, one length, one method. ``tick`` is called once per context asked."""

    meter: Meter
    task: Task
    length: int
    method: str
    budgets: Sequence[Setting]
    goal: Goal
    tick: Callable[[str], None] = lambda text: None
    trials: list[Trial] = field(default_factory=list)
    _asked: int = 0
    _dense: Paired = field(default_factory=Paired)
    """Dense alone, on every context of the search."""
    _seen: set[int] = field(default_factory=set)
    _probed: dict[int, bool] = field(default_factory=dict)

    def run(self, start: int | None = None) -> Cell:
        """``start``: the place on the ladder where a search is likely to end, such as that of a length nearby."""
        if not self.answers_densely():
            return self._cell(Status.UNMEASURED)
        return self.verify(self._find(start))

    def answers_densely(self) -> bool:
        """Whether the model can do the task at all: enough contexts to see that."""
        first = range(max(2, NOMINAL // self.goal.questions))
        prefetch(self.meter, self.task.name, self.length, [self.goal.seed + seed for seed in first], None)
        for seed in first:
            self._dense_scores(seed)
        return self._dense.accuracy >= self.goal.least

    def _find(self, start: int | None) -> int:
        """The place of the sparsest budget that is likely safe; the last place where none is."""
        count = len(self.budgets)
        low, high = -1, count  # unsafe up to low, safe from high on
        if start is not None and 0 <= start < count:
            step = 1  # outward from the guess, faster and faster, until it is enclosed
            if self._likely_safe(start):
                high = start
                while high - step > low:
                    if not self._likely_safe(high - step):
                        low = high - step
                        break
                    high, step = high - step, 2 * step
            else:
                low = start
                while low + step < high:
                    if self._likely_safe(low + step):
                        high = low + step
                        break
                    low, step = low + step, 2 * step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._likely_safe(middle) else (middle, high)
        return min(high, count - 1)

    def _likely_safe(self, place: int) -> bool:
        if place not in self._probed:
            self._probed[place] = self.probe(self.budgets[place])
        return self._probed[place]

    def probe(self, budget: Setting) -> bool:
        """Whether a setting is likely safe, by the contexts of the search; the trial is the last of ``trials``."""
        paired, densities = Paired(), 0.0
        limit = self.goal.loss
        for seed in range(self.goal.search):
            self._ahead(seed, self.goal.search, AHEAD, budget, None)
            densities += self._add(paired, seed, budget, self._dense_scores(seed))
            if not self._looks(seed + 1):
                continue
            if paired.upper(LIKELY) <= limit or paired.lower(LIKELY) > limit:
                break
        likely = paired.upper(LIKELY) <= limit or (paired.lower(LIKELY) <= limit and paired.loss <= limit / 2)
        self._note(budget, False, paired, densities, LIKELY, likely)
        return likely

    def verify(self, place: int) -> Cell:
        """Verify the budget at a place of the ladder on held-out contexts, and denser ones where it fails."""
        error = 1.0 - self.goal.confidence
        doomed = False
        for attempt in range(ATTEMPTS):
            share = error / 2 ** min(attempt + 1, ATTEMPTS - 1)
            paired, densities = Paired(), 0.0
            needed = trials_needed(self.goal.loss, share / LOOKS)
            passed = doomed = False
            looked = 0
            for seed in range(STRETCH * self.goal.verify):
                asked = (self.budgets[place], None) if self._gains_count else (self.budgets[place],)
                self._ahead(HELD_OUT + seed, HELD_OUT + self.goal.verify, 4 * AHEAD, *asked)
                dense = self._scores(HELD_OUT + seed, None) if self._gains_count else None
                densities += self._add(paired, HELD_OUT + seed, self.budgets[place], dense)
                last = paired.questions >= self.goal.verify * self.goal.questions
                last = last or seed + 1 == STRETCH * self.goal.verify
                if not last and not self._looks(seed + 1):
                    continue
                due = paired.least_trials >= needed * 3**looked if looked < LOOKS - 1 else False
                if due or last:
                    looked += 1
                    passed = paired.upper(share / LOOKS) <= self.goal.loss
                doomed = paired.lower(share) > self.goal.loss
                most = self.goal.verify * self.goal.questions
                hopeless = paired.best_upper(share / LOOKS, most, DOUBT) > self.goal.loss
                near = place < len(self.budgets) - 1 or paired.loss < NEAR * self.goal.loss
                if passed or doomed or last or (hopeless and near):
                    break
            trial = self._note(self.budgets[place], True, paired, densities, share / LOOKS, passed)
            if passed:
                return self._cell(Status.SAFE, trial)
            noise = paired.loss <= 0  # as much is gained as lost: a denser budget would be as hard to tell from dense
            if place == len(self.budgets) - 1 or noise:
                break
            place += 1
        return self._cell(Status.UNSAFE if doomed and place == len(self.budgets) - 1 else Status.UNSHOWN)

    @property
    def _gains_count(self) -> bool:
        """Whether dense itself is wrong so often that what sparse gets right besides has to be counted."""
        return self._dense.contexts > 0 and self._dense.accuracy < 1 - self.goal.loss

    def _looks(self, contexts: int) -> bool:
        """Whether the bounds are worked out after so many contexts: about each ``NOMINAL`` questions."""
        return contexts * self.goal.questions % NOMINAL < self.goal.questions

    def _ahead(self, seed: int, end: int, least: int, *settings: Setting | None) -> None:
        """Where ``seed`` begins a new batch, have it asked: ``least`` contexts, then as many as before."""
        done = seed % HELD_OUT
        if done == 0 or (done >= least and done & (done - 1) == 0):
            seeds = range(seed, min(end, seed + max(least, done)))
            for setting in settings:
                at = [self.goal.seed + one for one in seeds]
                prefetch(self.meter, self.task.name, self.length, at, setting)

    def _add(self, paired: Paired, seed: int, budget: Setting, dense: tuple[float, ...] | None = None) -> float:
        """Ask about a context under the budget. Returns the share computed.

        Without ``dense`` the dense model is asked only if something was wrong. Else it is taken to be right, which can
        only raise the loss: what it may have got wrong there would have been gained.
        """
        outcome = self.meter.run(self.task.name, self.length, self.goal.seed + seed, budget)
        self._asked += len(outcome.scores)
        self.tick(f"{self.task.name} {self.length} {setting_text(budget)}")
        if dense is None:
            dense = outcome.scores if min(outcome.scores) >= 1 else self._scores(seed, None)
        paired.add(dense, outcome.scores)
        return outcome.density

    def _dense_scores(self, seed: int) -> tuple[float, ...]:
        scores = self._scores(seed, None)
        if seed not in self._seen:
            self._seen.add(seed)
            self._dense.add(scores, scores)
        return scores

    def _scores(self, seed: int, budget: Setting | None) -> tuple[float, ...]:
        return self.meter.run(self.task.name, self.length, self.goal.seed + seed, budget).scores

    def _note(
        self, budget: Setting, held_out: bool, paired: Paired, densities: float, error: float, passed: bool
    ) -> Trial:
        trial = Trial(
            budget,
            held_out,
            paired.questions,
            paired.accuracy,
            paired.loss,
            paired.lower(error),
            paired.upper(error),
            densities / paired.contexts,
            passed,
        )
        self.trials.append(trial)
        return trial

    def _cell(self, status: Status, trial: Trial | None = None) -> Cell:
        head = (self.task.name, self.task.task_class, self.length, self.method, status)
        asked, trials, accuracy = self._asked, tuple(self.trials), self._dense.accuracy
        if trial is None:
            return Cell(*head, accuracy=accuracy, questions=asked, trials=trials)
        return Cell(*head, trial.budget, trial.density, accuracy, trial.loss, trial.high, asked, trials)
