"""What a part of the evidence is, and what is left of it when it has run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .children import Children

DONE = "done"
FAILED = "failed"
NOT_THERE = "not there"  # a tool that this machine lacks
OUT_OF_TIME = "out of time"
INTERRUPTED = "interrupted"
RUNNING = "running"  # found in a record, a part that was killed with all of the session
BAD = ("failed", "crashed")  # outcomes of a test

OUTCOMES_FILE = "outcomes.jsonl"
BENCHMARKS_FILE = "benchmarks.jsonl"


@dataclass
class Result:
    """How a part ended.

    Attributes:
        outcome: ``done``, ``failed``, ``not there`` or ``out of time``.
        is_complete: whether nothing of it is left to do; what failed is complete once all of it has run.
        counts: tests by outcome, errors found, and the like.
        reason: why it is not done, in words.
        facts: what else it found out, for the record.
    """

    outcome: str
    is_complete: bool
    counts: dict[str, int] = field(default_factory=dict)
    reason: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Where a part runs and how long it may take."""

    folder: Path
    children: Children
    deadline: float

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, which is a time of ``time.monotonic``."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Part:
    """A part of the evidence.

    Attributes:
        name: what it is called on the command line.
        title: what it shows, for the list and the table.
        share: of the minutes; what a part leaves of its share goes to those after it.
        run: runs it, or what is left of it.
    """

    name: str
    title: str
    share: float
    run: Callable[[Context], Result]
