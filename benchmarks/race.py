"""Two that take turns on one device: each sample of an entrant next to one of the operator, and what comes of it."""

import statistics
from typing import Any

import torch

from . import timing
from .candidates import OPERATOR, Problem
from .records import Record
from .roofline import Ceilings, Work
from .selection import Entrant
from .timing import Sample

ROUNDS = {"cuda": 30, "cpu": 3}
WARM_ROUNDS = 10
WARMUP_ROUNDS = 3


class DeviceClock:
    """A clock that shows the device time of all samples so far: pytest-benchmark's timer where the GPU keeps time."""

    def __init__(self):
        self.seconds = 0.0

    def read(self) -> float:
        """Seconds of device time."""
        return self.seconds


CLOCK = DeviceClock()


def measure(
    benchmark: Any,
    record: Record,
    test: str,
    problem: Problem,
    passes: str,
    candidate: str,
    entrant: Entrant,
    operator: Entrant | str,
    work: Work,
    target: float | None,
) -> None:
    """Race ``entrant`` against ``operator``, and put all that is known of it into both records.

    ``target`` is for the fraction of the roofline where the entrant is the operator, and for the ratio where it is
    another. An operator that cannot run is a text that says why; the entrant is then timed alone.
    """
    group = benchmark.group
    opponent = None if isinstance(operator, str) else operator.sample
    outcome = paired(benchmark, entrant.sample, opponent, ROUNDS[torch.device(problem.device).type])
    notes = problem.as_json() | {"passes": passes, "candidate": candidate} | entrant.notes
    notes |= {"calls_a_sample": len(entrant.calls), "graphs": problem.device == "cuda"}
    notes |= work_notes(work, record.ceilings, record.measured, problem.dtype, outcome["median_seconds"])
    if isinstance(operator, str):
        notes["operator_cannot_run"] = operator
    value = notes.get("roofline_fraction") if candidate == OPERATOR else outcome.get("ratio")
    notes |= target_notes(target, value)
    if problem.device == "cuda":
        notes |= _warm(entrant, passes) | {"kernels": _kernels(entrant, passes)}
    seconds = outcome.pop("seconds")
    benchmark.extra_info |= notes | outcome
    record.measured_test(test, group, notes | outcome, seconds)


def paired(benchmark: Any, entrant: Sample, operator: Sample | None, rounds: int) -> dict[str, Any]:
    """Samples of both in turns: the entrant's through pytest-benchmark, the operator's right before each of them.

    Returns the samples, and the ratio of entrant to operator (above 1 the operator is faster): the median of the pairs,
    its quartiles and its range. Without an operator there are the entrant's samples alone.
    """
    entrant_seconds: list[float] = []
    operator_seconds: list[float] = []

    def take_turn() -> None:
        if operator is not None:
            operator_seconds.append(operator())

    def run() -> None:
        entrant_seconds.append(entrant())
        CLOCK.seconds += entrant_seconds[-1]

    for _ in range(WARMUP_ROUNDS):
        take_turn()
        run()
    entrant_seconds.clear()
    operator_seconds.clear()
    benchmark.pedantic(run, setup=take_turn, rounds=rounds, iterations=1, warmup_rounds=0)
    outcome: dict[str, Any] = {"seconds": entrant_seconds, "median_seconds": statistics.median(entrant_seconds)}
    if operator is None:
        return outcome
    ratios = [theirs / ours for theirs, ours in zip(entrant_seconds, operator_seconds, strict=True)]
    return outcome | {
        "operator_seconds": operator_seconds,
        "operator_median_seconds": statistics.median(operator_seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def work_notes(
    work: Work, ceilings: Ceilings | None, measured: Ceilings | None, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """The ideal work, the rates that ``seconds`` mean, and the fraction of the roofline under both sets of ceilings."""
    notes: dict[str, Any] = {
        "gflop": work.flop / 1e9,
        "gigabytes": work.bytes / 1e9,
        "tflop_per_second": work.flop / seconds / 1e12,
        "terabytes_per_second": work.bytes / seconds / 1e12,
    }
    if ceilings is not None:
        least = ceilings.seconds(work, dtype)
        notes |= {"roofline_seconds": least, "roofline_fraction": least / seconds}
        notes |= {"bound": ceilings.bound(work, dtype), "ceilings": ceilings.source}
    if measured is not None:
        notes["roofline_fraction_measured_ceilings"] = measured.seconds(work, dtype) / seconds
    return notes


def target_notes(target: float | None, value: float | None, at_most: bool = False) -> dict[str, Any]:
    """A target beside the value it is for, and whether that met it; nothing where there is no target or no value."""
    if target is None or value is None:
        return {}
    return {"target": target, "target_value": value, "met": value <= target if at_most else value >= target}


def _kernels(entrant: Entrant, passes: str) -> dict[str, float] | str:
    try:
        return timing.kernels(entrant.function, passes, entrant.calls[0])
    except RuntimeError as error:  # a machine may lack the profiler; its times stand without it
        return f"no profile: {error}"


def _warm(entrant: Entrant, passes: str) -> dict[str, Any]:
    sample = timing.sampler(entrant.function, passes, [entrant.calls[0]] * len(entrant.calls))
    seconds = [sample() for _ in range(WARM_ROUNDS)]
    return {"warm_median_seconds": statistics.median(seconds), "warm_quartiles": quartiles(seconds)}
