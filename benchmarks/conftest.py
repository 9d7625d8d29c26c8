"""Command-line options, the order of tests, the record, and the race on a CPU: two implementations timed in turns."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .evidence.machine import State, cool_down, gpu_answers, gpu_state
from .records import Budget, Record

WARMUP_ROUNDS = 1
NOISE = 0.03  # what a median of a few pairs moves by between runs on a machine at rest
DEFAULT_RECORD = ".benchmarks/record.jsonl"
LAST = 1_000_000
COOL_DOWN_SECONDS = 3.0  # at most, before a test on a GPU

_budget = pytest.StashKey[Budget]()
_rest = pytest.StashKey[State | None]()
_record = pytest.StashKey[Record]()


def pytest_addoption(parser):
    """``--minutes``, ``--record`` and ``--missing``."""
    group = parser.getgroup("uctrans benchmarks")
    group.addoption("--minutes", type=float, help="skip GPU tests that no longer fit into so many minutes")
    group.addoption("--record", default=DEFAULT_RECORD, help=f"JSON lines to append to (default: {DEFAULT_RECORD})")
    group.addoption("--missing", action="store_true", help="skip tests that --record holds already, failed ones too")


def pytest_configure(config):
    """Start the clock, and make the marker of the order known."""
    config.addinivalue_line("markers", "priority(place): where a GPU test stands in the order, the smallest first")
    minutes = config.getoption("--minutes")
    stop_at = config.getoption("--stop-at", None)  # of benchmarks.evidence.outcomes, where it is loaded
    if stop_at is not None:
        minutes = min((stop_at - time.time()) / 60, float("inf") if minutes is None else minutes)
    config.stash[_budget] = Budget(minutes)


def pytest_collection_modifyitems(items):
    """GPU tests in the order of their importance, so that a short session measures what matters most."""
    here = Path(__file__).parent
    own = [item for item in items if here in item.path.parents]
    if not torch.cuda.is_available():
        for item in own:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if len(own) == len(items):
        items.sort(key=lambda item: marker.args[0] if (marker := item.get_closest_marker("priority")) else LAST)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Put tests that failed or were skipped into the record; stop after an error that leaves the GPU unusable."""
    report = (yield).get_result()
    record = item.config.stash.get(_record, None)
    if record is None or report.outcome == "passed":
        return
    already_there = report.skipped and "already in the record" in str(report.longrepr)
    if not already_there:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext[-2000:]
        record.unmeasured_test(item.name, report.outcome, reason)
    if report.failed and not gpu_answers():
        item.session.shouldstop = f"the GPU is unusable after {item.name}"


@pytest.fixture
def record(request):
    """The record of this run, opened by the first test that writes to it."""
    config = request.config
    if _record not in config.stash:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config.stash[_record] = Record(Path(config.getoption("--record")), device)
    return config.stash[_record]


@pytest.fixture
def in_budget(request, record):
    """Skip a test that is in the record already, or that the time left is too short for; then time it."""
    if request.config.getoption("--missing") and request.node.name in record.finished:
        pytest.skip("already in the record")
    budget = request.config.stash[_budget]
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    kind = f"{request.node.originalname} {parameters.get('candidate', '')}"
    if (obstacle := budget.obstacle(kind)) is not None:
        pytest.skip(obstacle)
    start = time.monotonic()
    if request.node.get_closest_marker("gpu"):
        record.gpu_before = _cooled(request.config)
    yield
    budget.spent(kind, time.monotonic() - start)


def _cooled(config: pytest.Config) -> State | None:
    """The state of the GPU once it is about as cool as before the first test."""
    if _rest not in config.stash:
        config.stash[_rest] = gpu_state()
        return config.stash[_rest]
    return cool_down(config.stash[_rest], COOL_DOWN_SECONDS)


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
