"""Races of whole networks: a variant is built and checked, enters as its candidate, and takes turns with ours."""

import gc
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from .errors import in_short
from .networks import (
    CANDIDATES,
    OURS,
    OURS_COMPILED,
    NetworkProblem,
    Variant,
    graphs_skipped,
    own_graphs_notes,
)
from .race import paired, target_notes
from .records import Record

TRIALS = 3
ROUNDS = {"cuda": 20, "cpu": 2}

Result = TypeVar("Result")


class Work(Protocol):
    """What a benchmark makes of a problem and a variant."""

    def check(self) -> dict[str, Any]:
        """Fail unless the right thing is computed; notes for the record."""

    def sampler(self) -> Callable[[], float]:
        """A way to run, captured anew, that returns seconds a call."""


class Worker:
    """A thread in which a variant is built, captured and timed, with ``cudnn.benchmark`` as given.

    PyTorch keeps cuDNN's choice of how to convolve for each thread and shape, and does not ask again when the setting
    changes. In a thread of its own, which does its backward passes too, a variant gets the choice it is to have.
    """

    def __init__(self, tuned_convolutions: bool, in_own_thread: bool = True):
        self.tuned_convolutions = tuned_convolutions
        backward_stays = partial(torch.autograd.set_multithreading_enabled, False)
        self._thread = ThreadPoolExecutor(max_workers=1, initializer=backward_stays) if in_own_thread else None

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Do the work there, and return its result."""
        return self._set_and_do(work) if self._thread is None else self._thread.submit(self._set_and_do, work).result()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _set_and_do(self, work: Callable[[], Result]) -> Result:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.tuned_convolutions
        try:
            return work()
        finally:
            torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Contender:
    """What races.

    Attributes:
        sample: seconds a call, measured whenever it is called.
        seconds: median of a few samples.
        worker: where it lives.
        notes: for the record.
    """

    sample: Callable[[], float]
    seconds: float
    worker: Worker
    notes: dict[str, Any]


def fastest(candidate: str, problem: NetworkProblem, make: Callable[[NetworkProblem, Variant], Work]) -> Contender:
    """``candidate`` with ``cudnn.benchmark`` on or off, as it is faster; what fails is noted with the reason.

    Raises:
        RuntimeError: it cannot run, or computes something else; the message says why.
    """
    variant = CANDIDATES[candidate].on(problem.device)
    release()
    skipped_before = graphs_skipped()
    work: Work | None = None
    checked: dict[str, Any] = {}
    contenders: list[Contender] = []
    refused: dict[str, str] = {}
    for tuned in _cudnn_settings(variant, problem.device):
        setting = f"cudnn.benchmark {'on' if tuned else 'off'}"
        # In PyTorch 2.11 the graphs of torch.compile are tied to the thread that imported it.
        worker = Worker(tuned, in_own_thread=not variant.makes_own_graphs)
        try:
            if work is None:
                unchecked = worker(partial(make, problem, variant))
                checked, work = worker(unchecked.check), unchecked
            sample = partial(worker, worker(work.sampler))
            seconds = statistics.median(sample() for _ in range(TRIALS))
            notes = {"cudnn": setting} | own_graphs_notes(variant, skipped_before)
        except Exception as error:  # whatever it is, the others race on and the record says what it was
            refused[setting] = in_short(error)
            worker.close()
        else:
            contenders.append(Contender(sample, seconds, worker, notes))
    if not contenders:
        raise RuntimeError(f"{candidate} cannot run {problem}: {refused}")
    best, *others = sorted(contenders, key=lambda contender: contender.seconds)
    for other in others:
        other.worker.close()
    notes = {"variant": str(variant), "dtype": variant.dtype, **best.notes, **checked}
    notes["settings_seconds"] = {contender.notes["cudnn"]: contender.seconds for contender in contenders}
    notes["settings_refused"] = refused
    return Contender(best.sample, best.seconds, best.worker, notes)


@dataclass
class Arena:
    """Races of one kind; all race against the fastest of ours that was built for the problem at hand.

    Attributes:
        group: what the record calls these races.
        make: builds the work of a problem and a variant.
    """

    group: str
    make: Callable[[NetworkProblem, Variant], Work]
    _problem: NetworkProblem | None = None
    _ours: dict[str, Contender | str] = field(default_factory=dict)

    def race(
        self, benchmark: Any, record: Record, test: str, problem: NetworkProblem, candidate: str, target: float | None
    ) -> None:
        """Time ``candidate`` and ours in turns; ``target`` is how many times as fast ours should be.

        Ours races against itself, which shows the noise of pairs. Where ours cannot run, others are timed alone.

        Raises:
            RuntimeError: the candidate cannot run, or computes something else.
        """
        benchmark.group = self.group
        if problem != self._problem:
            self.close()
            self._problem = problem
        opponent = self._opponent()
        if candidate != OURS:
            contender = fastest(candidate, problem, self.make)
        elif isinstance(opponent, str):
            raise RuntimeError(opponent)
        else:
            contender = opponent = self._ours[OURS]
        notes = problem.as_json() | {"candidate": candidate} | contender.notes
        if isinstance(opponent, str):
            notes["ours_cannot_run"] = opponent
        else:
            notes["against"] = f"{opponent.notes['variant']}, {opponent.notes['cudnn']}"
        rounds = ROUNDS[torch.device(problem.device).type]
        opposing_sample = None if isinstance(opponent, str) else opponent.sample
        outcome = paired(benchmark, contender.sample, opposing_sample, rounds)
        notes["images_per_second"] = problem.batch / outcome["median_seconds"]
        notes |= target_notes(target, outcome.get("ratio"))
        seconds = outcome.pop("seconds")
        benchmark.extra_info |= notes | outcome
        record.measured_test(test, self.group, notes | outcome, seconds)
        if candidate == OURS_COMPILED:
            self._ours[OURS_COMPILED] = contender
        elif candidate != OURS:
            contender.worker.close()

    def close(self) -> None:
        """Let go of what was built for the problem at hand."""
        for contender in self._ours.values():
            if not isinstance(contender, str):
                contender.worker.close()
        self._ours.clear()
        self._problem = None

    def _opponent(self) -> Contender | str:
        """The fastest of ours so far, or why there is none."""
        if OURS not in self._ours:
            try:
                self._ours[OURS] = fastest(OURS, self._problem, self.make)
            except RuntimeError as error:
                self._ours[OURS] = str(error)
        able = [contender for contender in self._ours.values() if not isinstance(contender, str)]
        return min(able, key=lambda contender: contender.seconds) if able else self._ours[OURS]


def release() -> None:
    """Give back the memory of what raced before, and forget what was compiled for it."""
    # Left to itself, torch runs a function uncompiled, with no more than a warning, after a few shapes.
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cudnn_settings(variant: Variant, device: str) -> tuple[bool, ...]:
    if torch.device(device).type != "cuda":
        return (False,)
    # In torch's own thread only the first setting that a shape meets counts: the tuned one.
    return (True,) if variant.makes_own_graphs else (False, True)
