"""A pytest plugin: every test's outcome as a line of JSON as soon as it is known, so that a killed run leaves them.

``-p benchmarks.evidence.outcomes --outcomes FILE --part NAME``. A test has a line when it starts and one when it ends:
a start without an end is the test that a process died in. Tests with an outcome in the file already are left out, so
the same command goes on where a run stopped; one that a process died in is tried again in a later session, up to
``--tries`` times in all. It stops by itself at ``--stop-at``, when the GPU no longer answers, and when nobody waits for
it any more; a test that takes longer than ``--stall`` seconds ends the process.
"""

import faulthandler
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ..records import append_line, read_lines, sources
from .machine import gpu_answers

REASON_LENGTH = 3000
FINAL = ("passed", "failed")  # a skipped test is asked again: it may have been skipped for want of time
COMPILED = "compiled"  # in the name of a benchmark whose candidate torch.compile makes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the plugin."""
    group = parser.getgroup("evidence")
    group.addoption("--outcomes", type=Path, help="JSON lines to append outcomes to")
    group.addoption("--part", default="tests", help="the part of the evidence that the outcomes belong to")
    group.addoption("--shard", default="0/1", help="which share of the tests to run, such as 0/4")
    group.addoption("--stop-at", type=float, default=float("inf"), help="time (Unix) after which no test starts")
    group.addoption("--stall", type=float, default=300.0, help="seconds after which a test ends the process")
    group.addoption("--compiled-stall", type=float, help=f"the same for tests with {COMPILED!r} in their names")
    group.addoption("--tries", type=int, default=1, help="how often a test that a process dies in is started in all")
    group.addoption("--session", type=float, default=0.0, help="time (Unix) at which this session began")


def pytest_configure(config: pytest.Config) -> None:
    """Start to write where a file is named."""
    if config.getoption("--outcomes"):
        config.pluginmanager.register(Outcomes(config), "evidence-outcomes")


class Outcomes:
    """Hooks of one run."""

    def __init__(self, config: pytest.Config):
        self._path = config.getoption("--outcomes")
        shard = config.getoption("--shard")
        self._about = {"part": config.getoption("--part"), "shard": shard, "sources": sources()}
        self._stop_at = config.getoption("--stop-at")
        self._stall = config.getoption("--stall")
        self._compiled_stall = config.getoption("--compiled-stall") or self._stall
        self._tries, self._session = config.getoption("--tries"), config.getoption("--session")
        self._parent = os.getppid()
        self._stderr = os.dup(2)  # while a test runs pytest has another file there
        self._remaining: set[str] = set()
        self._reports: list[pytest.TestReport] = []
        self._started = 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep this shard's tests that have no outcome yet."""
        place, shards = map(int, self._about["shard"].split("/"))
        lines = [line for line in read_lines(self._path) if line.get("part") == self._about["part"]]
        done = finished_tests(lines, self._tries, self._session)
        kept = [item for number, item in enumerate(items) if number % shards == place and item.nodeid not in done]
        cut_short = times_cut_short(lines)
        kept.sort(key=lambda item: cut_short[item.nodeid] >= self._tries)  # or it would have every session for itself
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept
        self._remaining = {item.nodeid for item in kept}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is a failed test."""
        if report.failed:
            self._write(test=report.nodeid, outcome="failed", seconds=0.0, reason=report.longreprtext[-REASON_LENGTH:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that the test starts, and set the alarm."""
        self._reports = []
        self._started = time.monotonic()
        self._write(test=nodeid, outcome="started")
        stall = self._compiled_stall if COMPILED in nodeid else self._stall
        faulthandler.dump_traceback_later(stall, file=self._stderr, exit=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the reports of set-up, call and tear-down."""
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write how the test ended."""
        faulthandler.cancel_dump_traceback_later()
        self._remaining.discard(nodeid)
        outcome, reason = summary(self._reports)
        self._write(test=nodeid, outcome=outcome, seconds=time.monotonic() - self._started, reason=reason)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """After the test, see whether another may start."""
        result = yield
        if any(report.failed for report in self._reports) and not gpu_answers():
            item.session.shouldstop = f"the GPU is unusable after {item.nodeid}"
        elif time.time() >= self._stop_at:
            item.session.shouldstop = "out of time"
        elif os.getppid() != self._parent:
            item.session.shouldstop = "nobody waits for the outcome any more"
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write how many tests are left; without this line the process died."""
        self._write(ended=True, remaining=len(self._remaining), why=str(session.shouldstop or ""))

    def _write(self, **line: Any) -> None:
        append_line(self._path, self._about | {name: value for name, value in line.items() if value is not None})


def summary(reports: list[pytest.TestReport]) -> tuple[str, str | None]:
    """Outcome and reason from the reports of set-up, call and tear-down."""
    failed = [report for report in reports if report.failed]
    if failed:
        return "failed", "\n".join(report.longreprtext for report in failed)[-REASON_LENGTH:]
    for report in reports:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            return "skipped", reason[-REASON_LENGTH:]
    return "passed", None


def finished_tests(lines: list[dict[str, Any]], tries: int, session: float) -> set[str]:
    """Tests of a part, by its lines, that need not run again in the session that began at ``session``."""
    finished = set()
    for line in lines:
        outcome = line.get("outcome")
        crashed_enough = outcome == "crashed" and (line.get("time", 0.0) >= session or not may_be_tried(line, tries))
        if outcome in FINAL or crashed_enough:
            finished.add(line["test"])
    return finished


def times_cut_short(lines: list[dict[str, Any]]) -> Counter[str]:
    """How often each test of a part started and the time was over before it ended."""
    tests = [(line["test"], line["outcome"]) for line in lines if "test" in line]
    started = Counter(test for test, outcome in tests if outcome == "started")
    return started - Counter(test for test, outcome in tests if outcome != "started")


def may_be_tried(crash: dict[str, Any], tries: int) -> bool:
    """Whether a test that crashed may be started again, by the line of its latest crash."""
    return crash.get("try", 1) < tries
