"""A part that is a run of pytest: in several processes at once, started again where one dies, within its time."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..records import OUT_OF_BUDGET, append_line, read_lines
from .children import ROOT, TAIL_LINES, Ended, python
from .outcomes import may_be_tried
from .parts import DONE, FAILED, OUT_OF_TIME, OUTCOMES_FILE, Context, Result

PLUGIN = "benchmarks.evidence.outcomes"
GRACE_SECONDS = 5.0  # a run stops by itself after the test at hand, and is stopped if that takes longer
STACK_DUMP = re.compile(r"Fatal Python error:|Timeout \(\d")
MOST_DEATHS = 8  # of a process, before its other tests are given up


def run_pytest(
    context: Context, name: str, arguments: Sequence[object], shards: int, stall: float, tries: int = 1
) -> Result:
    """Run ``pytest *arguments`` in ``shards`` processes; all tests that ended have a line in the outcomes.

    A test that a process dies in is started up to ``tries`` times in all, once a session.
    """
    arguments = ["--stall", stall, "--tries", tries, "--session", time.time(), *arguments]
    with ThreadPoolExecutor(shards) as pool:
        try:
            problems = list(pool.map(partial(_run_shard, context, name, arguments, shards), range(shards)))
        except BaseException:
            context.children.end_all()  # or the pool would wait for them
            raise
    return result_of(outcomes_of(context.folder, name), next(filter(None, problems), None), tries)


def result_of(outcomes: Sequence[dict[str, Any]], problem: str | None, tries: int = 1) -> Result:
    """What the outcomes of a part add up to; ``problem`` is why not all of its tests ran."""
    counts = Counter(_counted_as(line) for line in outcomes)
    bad = counts["failed"] + counts["crashed"]
    is_late = problem == OUT_OF_TIME or counts["not run"] > 0
    again = sum(line["outcome"] == "crashed" and may_be_tried(line, tries) for line in outcomes)
    reasons = [f"{bad} failed or crashed"] * bool(bad) + ["not all of it ran"] * is_late
    reasons += [f"{again} to be tried once more"] * bool(again)
    if problem and problem != OUT_OF_TIME:
        reasons.append(problem)
    if not outcomes and not reasons:
        reasons.append("there is no test to run")
    if bad or problem not in (None, OUT_OF_TIME) or not (outcomes or is_late):
        outcome = FAILED
    else:
        outcome = OUT_OF_TIME if is_late else DONE
    return Result(outcome, not (is_late or again), dict(counts), "; ".join(reasons) or None)


def outcomes_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The last outcome of every test of the part that ended."""
    latest = {}
    for line in read_lines(folder / OUTCOMES_FILE):
        if line.get("part") == name and line.get("outcome") not in (None, "started"):
            latest[line["test"]] = line
    return list(latest.values())


def _counted_as(line: dict[str, Any]) -> str:
    return "not run" if line["outcome"] == "skipped" and OUT_OF_BUDGET in line.get("reason", "") else line["outcome"]


def _run_shard(context: Context, name: str, arguments: Sequence[object], shards: int, place: int) -> str | None:
    """Run the tests of one process, in as many processes as it takes; returns why not all of them ran."""
    path, shard = context.folder / OUTCOMES_FILE, f"{place}/{shards}"
    # Left to itself, pytest may take the folder of the outcomes for a part of its root, and name tests after that.
    options = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
    options += ["-p", PLUGIN, "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors"]
    options += ["--outcomes", path, "--part", name, "--shard", shard]
    for _ in range(MOST_DEATHS):
        if context.seconds_left <= 0:
            return OUT_OF_TIME
        before = len(read_lines(path))
        stop_at = ["--stop-at", time.time() + context.seconds_left]
        ended = context.children.run(
            python("-m", "pytest", *options, *stop_at, *arguments), context.seconds_left + GRACE_SECONDS
        )
        lines = [line for line in read_lines(path)[before:] if (line.get("part"), line.get("shard")) == (name, shard)]
        if any(line.get("ended") and line["remaining"] == 0 for line in lines):
            return None
        if ended.was_stopped or context.seconds_left <= 0:
            return OUT_OF_TIME
        if not lines:
            return f"pytest did not start: {ended.reason or ended.output.strip()[-500:]}"
        if not any(line.get("ended") for line in lines):
            _note_death(path, lines, ended)
    return f"gave up after its process had died {MOST_DEATHS} times"


def _note_death(path: Path, lines: Sequence[dict[str, Any]], ended: Ended) -> None:
    """The test that had started and not ended is the one that the process died in."""
    over = {line["test"] for line in lines if line.get("outcome") not in (None, "started")}
    for line in lines:
        if line.get("outcome") == "started" and line["test"] not in over:
            before = [
                one for one in read_lines(path) if (one.get("part"), one.get("test")) == (line["part"], line["test"])
            ]
            tries = 1 + sum(one["outcome"] == "crashed" for one in before)
            crash = {"outcome": "crashed", "seconds": 0.0, "reason": _last_words(ended), "try": tries}
            append_line(path, line | crash | {"time": time.time()})


def _last_words(ended: Ended) -> str:
    """How the process died; where Python wrote the stack, the innermost calls of it, which it writes first."""
    reason = ended.reason or "it ended without a word"
    dumps = list(STACK_DUMP.finditer(ended.output))
    if not dumps:
        return reason
    stack = ended.output[dumps[-1].start() :].splitlines()[:TAIL_LINES]
    return "\n".join([reason.splitlines()[0], *stack])
