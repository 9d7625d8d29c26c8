"""Which run of a study comes next, how long it may take, and what is said of each that has ended."""

import statistics
import time
from dataclasses import dataclass, field

from uctrans.study.cost import Cost
from uctrans.study.files import Outcome, Result, outcome
from uctrans.study.plan import PlannedRun
from uctrans.study.single import seconds_trained


@dataclass(frozen=True)
class Budget:
    """The time of a call; ``seconds`` is None where it may take as long as it takes."""

    seconds: float | None = None
    begun: float = field(default_factory=time.time)

    @property
    def stop_at(self) -> float | None:
        """When it is over, as of ``time.time()``, which other processes read too; None is never."""
        return None if self.seconds is None else self.begun + self.seconds

    @property
    def is_over(self) -> bool:
        """Whether nothing more may be begun."""
        return self.seconds is not None and time.time() >= self.stop_at

    def allows(self, seconds: float | None) -> bool:
        """Whether a run may be begun that is expected to take ``seconds``; None where nothing tells yet.

        One that takes longer than the whole budget may: it can only be done in pieces.
        """
        if self.seconds is None or self.is_over:
            return self.seconds is None
        return seconds is None or seconds <= self.stop_at - time.time() or seconds > self.seconds


class Schedule:
    """The runs of a study in their order, and what is known of them.

    Attributes:
        plan: all runs.
        ended: those that are over, by run folder.
        died: those whose process ended before them: why, by run folder.
        waiting: those that are not begun in this call.
    """

    def __init__(self, plan: list[PlannedRun], costs: dict[str, Cost], budget: Budget, processes: int):
        self.plan, self.costs, self.budget, self.processes = plan, costs, budget, processes
        found = {run.config.output: outcome(run) for run in plan}
        self.ended: dict[str, Outcome] = {folder: each for folder, each in found.items() if each.is_over}
        self.died: dict[str, str] = {}
        self.waiting = [run for run in plan if run.config.output not in self.ended]
        before = [run for run in plan if run.config.output in self.ended]
        for number, run in enumerate(before, 1):
            self._tell(number, run, " before")

    def next(self) -> PlannedRun | None:
        """The next run to begin, None where none can be begun now."""
        for run in self.waiting:
            is_ready = run.comes_after is None or run.comes_after.config.output in self.ended
            if is_ready and self.budget.allows(self._seconds_to_go(run)):
                self.waiting.remove(run)
                return run
        return None

    def take(self, run: PlannedRun) -> None:
        """Note that a run has ended, and print a line about it."""
        self.ended[run.config.output] = outcome(run)
        self._tell(len(self.ended), run)

    def take_death(self, run: PlannedRun, reason: str) -> None:
        """Note that the process of a run is gone and the run is not over, and print a line about it."""
        self.died[run.config.output] = f"{run.name}: {reason}"
        print(f"{run.name}: its process {reason}; the same command tries it again", flush=True)

    def of(self, run: PlannedRun) -> Outcome:
        """What there is of a run."""
        return self.ended.get(run.config.output) or outcome(run)

    @property
    def failed(self) -> int:
        """How many runs that are over have diverged."""
        return sum(found.failure is not None for found in self.ended.values())

    def _tell(self, number: int, run: PlannedRun, when: str = "") -> None:
        found = self.ended[run.config.output]
        line = f"run {number} of {len(self.plan)}: {run.name}: "
        if found.failure is not None:
            trained = run.trained_by or run
            line += f"failed{when}, {found.failure.finding}; to try it again, delete {trained.folder}"
        else:
            line += f"{_dice(found.results)}, {_duration(_seconds(found))}" + (f" (finished{when})" if when else "")
        remaining = [self._seconds_to_go(other) for other in self.plan if other.config.output not in self.ended]
        if remaining and None not in remaining:
            line += f"; about {_duration(sum(remaining) / self.processes)} to go"
        print(line, flush=True)

    def _seconds_to_go(self, run: PlannedRun) -> float | None:
        """Estimated from finished runs of the same network, or of others and the time of a step; None without any.

        Runs that train tell nothing of those that only score, which take next to no time beside them.
        """
        finished = [
            (other.variant.name, _seconds(self.ended[other.config.output]))
            for other in self.plan
            if other.config.output in self.ended
            and self.ended[other.config.output].failure is None
            and (other.trained_by is None) == (run.trained_by is None)
        ]
        if not finished:
            return None if run.trained_by is None else 0.0
        own = [seconds for name, seconds in finished if name == run.variant.name]
        steps = sum(self.costs[name].seconds_a_step for name, _ in finished)
        others = sum(seconds for _, seconds in finished) / steps * self.costs[run.variant.name].seconds_a_step
        return max(0.0, (statistics.mean(own) if own else others) - seconds_trained(run))


def _seconds(found: Outcome) -> float:
    """Of the whole run: the training is the same at all patiences, and each tells it from its beginning."""
    return max(result.seconds for result in found.results.values())


def _dice(results: dict[int, Result]) -> str:
    scores = {patience: result.scores["dice"] for patience, result in sorted(results.items())}
    if len(scores) == 1:
        return f"Dice {next(iter(scores.values())):.4f}"
    return "Dice " + ", ".join(f"{score:.4f} at patience {patience}" for patience, score in scores.items())


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"
