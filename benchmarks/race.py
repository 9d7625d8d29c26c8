"""Two that take turns on one device: each sample of an entrant next to one of the operator, and what comes of it."""

import statistics
from collections.abc import Callable
from typing import Any

from .roofline import Ceilings, Work
from .timing import Sample

ROUNDS = {"cuda": 30, "cpu": 3}
WARM_ROUNDS = 10
WARMUP_ROUNDS = 3
MICROSECONDS = 1e6


class DeviceClock:
    """A clock that shows the device time of all samples so far, for pytest-benchmark to read as its timer."""

    def __init__(self):
        self.seconds = 0.0

    def read(self) -> float:
        """Seconds of device time."""
        return self.seconds

    def timed(self, sample: Sample) -> Callable[[], None]:
        """A function that takes a sample and moves the clock by what a call in it took."""

        def run() -> None:
            self.seconds += sample()

        return run


CLOCK = DeviceClock()


def paired(benchmark: Any, entrant: Sample, operator: Sample | None, rounds: int) -> dict[str, Any]:
    """Samples of both in turns: the entrant's through pytest-benchmark, the operator's right before each of them.

    Returns the samples, and the ratio of entrant to operator (above 1 the operator is faster): the median of the pairs,
    its quartiles and its range. An absent operator leaves the entrant's samples alone.
    """
    entrant_seconds: list[float] = []
    operator_seconds: list[float] = []

    def take_turn() -> None:
        if operator is not None:
            operator_seconds.append(operator())

    def run() -> None:
        before = CLOCK.read()
        CLOCK.timed(entrant)()
        entrant_seconds.append(CLOCK.read() - before)

    for _ in range(WARMUP_ROUNDS):
        take_turn()
        run()
    entrant_seconds.clear()
    operator_seconds.clear()
    benchmark.pedantic(run, setup=take_turn, rounds=rounds, iterations=1, warmup_rounds=0)
    outcome: dict[str, Any] = {"seconds": entrant_seconds, "median_seconds": statistics.median(entrant_seconds)}
    if operator is None:
        return outcome
    ratios = [own / others for own, others in zip(entrant_seconds, operator_seconds, strict=True)]
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


def work_notes(work: Work, ceilings: Ceilings | None, measured: Ceilings | None, dtype: Any, seconds: float) -> dict:
    """The ideal work, the rates that ``seconds`` are, and the fraction of the roofline under each set of ceilings."""
    notes: dict[str, Any] = {
        "gflop": work.flop / 1e9,
        "gigabytes": work.bytes / 1e9,
        "tflop_per_second": work.flop / seconds / 1e12,
        "terabytes_per_second": work.bytes / seconds / 1e12,
    }
    if ceilings is not None:
        least = ceilings.seconds(work, dtype)
        notes |= {
            "roofline_seconds": least,
            "roofline_fraction": least / seconds,
            "bound": ceilings.bound(work, dtype),
            "ceilings": ceilings.source,
        }
    if measured is not None:
        notes["roofline_fraction_measured_ceilings"] = measured.seconds(work, dtype) / seconds
    return notes


def target_notes(target: float | None, value: float | None, at_most: bool = False) -> dict[str, Any]:
    """A target beside the value it is for, and whether it was met; nothing where there is no target."""
    if target is None or value is None:
        return {}
    return {"target": target, "target_value": value, "met": value <= target if at_most else value >= target}
