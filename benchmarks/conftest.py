"""The race: two implementations timed in turns."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

WARMUP_ROUNDS = 1


@pytest.fixture
def race(benchmark):
    """Time ``contender`` with pytest-benchmark, and ``baseline`` right before each of its rounds.

    Both meet the same state of the machine, so ``ratio`` (baseline over contender, median of the pairs; above 1 the
    contender is faster) holds where absolute times drift. All samples go into the record.
    """

    def run(contender: Callable[[], object], baseline: Callable[[], object], rounds: int, **notes: object) -> float:
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
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        return ratio

    return run
