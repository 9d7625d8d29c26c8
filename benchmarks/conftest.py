"""Fixtures and options of all benchmarks of operators: the record, and the comparison that pytest-benchmark shows."""

from pathlib import Path

import pytest
import torch

from . import harness
from .records import DEFAULT_RECORD, append_line, environment, read_lines


def pytest_addoption(parser):
    """Add ``--record`` and ``--missing``."""
    group = parser.getgroup("uctrans benchmarks")
    group.addoption(
        "--record", type=Path, default=DEFAULT_RECORD, help="JSON lines to append to (default: %(default)s)"
    )
    group.addoption("--missing", action="store_true", help="skip what --record holds already")


def pytest_collection_modifyitems(items):
    """Give pytest-benchmark the harness's clock, and skip what is marked gpu on a machine without one."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.CLOCK.read))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def record(request):
    """Return the path of the record, after a line that describes the machine, and the names of the tests in it."""
    path = request.config.getoption("--record")
    measured = {line["test"] for line in read_lines(path) if "test" in line}
    append_line(path, {"environment": environment()})
    return path, measured


@pytest.fixture
def compare(request, benchmark, record):
    """Return a function that compares a candidate of a case with the operator and records the result."""
    path, measured = record
    if request.config.getoption("--missing") and request.node.name in measured:
        pytest.skip("already in the record")

    def run(case: harness.Case, passes: str, candidate: str) -> None:
        benchmark.group = f"{case.name}, {passes}"

        def repeat(sample, setup, rounds):
            def timed():
                harness.CLOCK.seconds += sample()

            benchmark.pedantic(timed, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)

        notes, seconds = harness.compare(case, passes, candidate, repeat)
        benchmark.extra_info |= notes
        append_line(path, {"test": request.node.name, "group": case.name, "info": notes, "seconds": seconds})
        if candidate in case.claimed:
            claimed = case.claimed[candidate]
            assert notes["ratio"] >= claimed * (1 - harness.CLAIM_TOLERANCE), (
                f"the operator is {notes['ratio']:.2f} times as fast as {candidate}, not {claimed}"
            )

    return run
