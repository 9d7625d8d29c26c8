"""The race: two implementations timed in turns."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

WARMUP_ROUNDS = 1
NOISE = 0.03  # what a median of a few pairs moves by between runs on a machine at rest


@pytest.fixture
def race(benchmark):
    """Time ``contender`` with pytest-benchmark, and ``baseline`` right before each of its rounds.

    Both meet the same state of the machine, so ``ratio`` (baseline over contender, median of the pairs; above 1 the
    contender is faster) holds where absolute times drift. All samples go into the record, then the ratio must be
    ``at_least`` what the project claims, less ``NOISE``.
    """

    def run(
        contender: Callable[[], object],
        baseline: Callable[[], object],
        rounds: int,
        at_least: float,
        **notes: object,
    ) -> None:
        for _ in range(WARMUP_ROUNDS):
            baseline()
            contender()
        baseline_seconds: list[float] = []

        def time_baseline() -> None:
            start = time.perf_counter()
            baseline()
            baseline_seconds.append(time.perf_counter() - start)

        benchmark.pedantic(contender, setup=time_baseline, rounds=rounds, iterations=1, warmup_rounds=0)
        contender_seconds = benchmark.stats.stats.data
        ratios = [slow / fast for slow, fast in zip(baseline_seconds, contender_seconds, strict=True)]
        ratio = statistics.median(ratios)
        benchmark.extra_info |= notes | {
            "baseline_seconds": baseline_seconds,
            "baseline_median": statistics.median(baseline_seconds),
            "ratio": ratio,
            "ratio_range": [min(ratios), max(ratios)],
            "at_least": at_least,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        assert ratio >= at_least * (1 - NOISE), f"{ratio:.2f} times as fast, not {at_least}"

    return run
