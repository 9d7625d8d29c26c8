"""A session: parts one after the other within the minutes, each recorded before the next, progress on the screen."""

import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .children import Children
from .machine import State, cool_down, gpu_state, in_words
from .parts import FAILED, INTERRUPTED, OUT_OF_TIME, Context, Part, Result
from .record import LOG_FILE, EvidenceRecord

COOL_DOWN_SECONDS = 15.0  # at most, before a part
LEAST_SECONDS = 1.0  # a part that has less is not started


class Session:
    """Runs what is left of the parts, in ``minutes``.

    A part may take what is left of the time, less the shares of the parts after it. Parts that are complete, or were
    not chosen, leave their shares to the others.
    """

    def __init__(self, parts: Sequence[Part], record: EvidenceRecord, minutes: float, sources: str | None = None):
        self._parts = parts
        self._shares = shares([part for part in parts if not record.is_complete(part.name)])
        self._record = record
        self._seconds = 60 * minutes
        self._sources = sources
        self._children = Children(record.folder / LOG_FILE)
        self._started = time.monotonic()
        self._rest: State | None = None

    def run(self) -> bool:
        """Run the parts that are not complete; returns whether none of all failed."""
        self._rest = None if self._record.is_dry_run else gpu_state()
        with _ends_on_signals():
            for place, part in enumerate(self._parts):
                heading = f"[{place + 1}/{len(self._parts)}] {part.name}"
                if self._record.is_complete(part.name):
                    print(
                        f"{heading}: {self._record.parts[part.name]['outcome']} before; --again {part.name} repeats it"
                    )
                else:
                    self._run_part(part, self._parts[place + 1 :], heading)
        return all(self._record.parts[part.name]["outcome"] != FAILED for part in self._parts)

    def _run_part(self, part: Part, later: Sequence[Part], heading: str) -> None:
        before = None if self._record.is_dry_run else cool_down(self._rest, min(COOL_DOWN_SECONDS, self._left / 10))
        reserved = sum(self._shares.get(other.name, 0.0) * self._seconds for other in later)
        limit = max(self._left - reserved, min(self._left, self._shares[part.name] * self._seconds))
        print(f"{heading}: up to {limit:.0f} s of {self._left:.0f} s left ...", end=" ", flush=True)
        self._record.start_part(part, gpu_before=before, sources=self._sources)
        started = time.monotonic()
        result = self._result(part, limit)
        seconds = time.monotonic() - started
        after = None if self._record.is_dry_run else gpu_state()
        self._record.end_part(part, result, seconds, gpu_after=after)
        print(_in_words(result, seconds, after), flush=True)

    def _result(self, part: Part, limit: float) -> Result:
        if limit < LEAST_SECONDS:
            return Result(OUT_OF_TIME, False, reason="no time was left for it")
        context = Context(self._record.folder, self._children, time.monotonic() + limit)
        try:
            return part.run(context)
        except Exception as error:  # whatever it is: it is recorded, and the other parts run
            facts = {"traceback": traceback.format_exc()}
            return Result(FAILED, True, reason=f"{type(error).__name__}: {error}", facts=facts)
        except BaseException:
            self._children.end_all()
            self._record.end_part(part, Result(INTERRUPTED, False, reason="the session was stopped"), 0.0)
            raise

    @property
    def _left(self) -> float:
        return max(self._seconds - (time.monotonic() - self._started), 0.0)


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is: the part at hand is recorded, and its processes are ended."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _in_words(result: Result, seconds: float, after: State | None) -> str:
    counts = ", ".join(f"{number} {what}" for what, number in result.counts.items())
    words = [result.outcome, *([counts] if counts else []), f"{seconds:.0f} s"]
    if after:
        words.append(in_words(after))
    if result.reason:
        words.append(result.reason.splitlines()[0])
    return "; ".join(words)


def shares(parts: Sequence[Part]) -> dict[str, float]:
    """The share of the time that each of ``parts`` may take, where only these run; they add up to 1."""
    total = sum(part.share for part in parts)
    return {part.name: part.share / total for part in parts}


def listing(parts: Sequence[Part], minutes: float, folder: Path) -> str:
    """The parts with what each may cost."""
    width = max(len(part.name) for part in parts)
    seconds = {name: share * 60 * minutes for name, share in shares(parts).items()}
    lines = [
        f"{part.name:<{width}}  {seconds[part.name]:4.0f} s, and what is left before it  {part.title}" for part in parts
    ]
    return "\n".join([f"Parts of {minutes:g} minutes, into {folder}:", *lines])
