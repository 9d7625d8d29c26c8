"""The record of an evidence folder: one JSON and one page of Markdown, whole at any time, and read again to go on."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uctrans.writing import written_atomically

from ..records import read_lines
from .parts import BAD, BENCHMARKS_FILE, FAILED, OUTCOMES_FILE, RUNNING, Part, Result
from .table import page

JSON_FILE = "evidence.json"
PAGE_FILE = "evidence.md"
LOG_FILE = "log.txt"


class EvidenceError(Exception):
    """A folder or a choice that evidence cannot be taken with; the message says what would help."""


class EvidenceRecord:
    """What is known so far, in ``folder``: how each part ended, and the lines that parts wrote themselves."""

    def __init__(self, folder: Path, is_dry_run: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        found = self._read()
        if found and found.get("dry_run", False) != is_dry_run:
            made = "a dry run" if found["dry_run"] else "a run on a GPU"
            raise EvidenceError(f"{folder} holds the record of {made}; choose another --output")
        self.is_dry_run = is_dry_run
        self.runs: list[dict[str, Any]] = found.get("runs", [])
        self.parts: dict[str, dict[str, Any]] = found.get("parts", {})

    @property
    def gpu(self) -> str | None:
        """The GPU that the parts so far ran on."""
        return self.runs[-1].get("gpu") if self.runs else None

    def start_run(self, **about: Any) -> None:
        """Note that a session starts: its command, time and GPU."""
        self.runs.append({"time": _now(), "process": os.getpid(), **about})

    def is_complete(self, name: str) -> bool:
        """Whether nothing of a part is left to do."""
        return bool(self.parts.get(name, {}).get("is_complete"))

    def start_part(self, part: Part, **about: Any) -> None:
        """Note that a part runs: what a session that is killed leaves of it."""
        before = self.parts.get(part.name, {}).get("seconds", 0.0)
        started = {"title": part.title, "outcome": RUNNING, "is_complete": False, "time": _now(), "seconds": before}
        self.parts[part.name] = started | about
        self.write()

    def end_part(self, part: Part, result: Result, seconds: float, **about: Any) -> None:
        """Note how a part ended. Seconds of several sessions add up."""
        entry = self.parts[part.name]
        entry |= {"outcome": result.outcome, "is_complete": result.is_complete, "counts": result.counts}
        entry |= {"reason": result.reason, "facts": result.facts, "seconds": entry["seconds"] + seconds}
        self.parts[part.name] = entry | about
        self.write()

    def forget(self, name: str) -> None:
        """Drop all that is known of a part, so that it runs from its beginning."""
        self.parts.pop(name, None)
        outcomes = read_lines(self.folder / OUTCOMES_FILE)
        own = {line["test"].rpartition("::")[2] for line in outcomes if line.get("part") == name and "test" in line}
        self._keep(OUTCOMES_FILE, lambda line: line.get("part") != name)
        self._keep(BENCHMARKS_FILE, lambda line: line.get("test") not in own)

    def forget_failures(self, name: str) -> None:
        """Drop the tests and benchmarks of a part that failed or crashed, so that these alone run again."""
        entry = self.parts.get(name)
        if entry is None:
            return
        failed = {line["test"] for line in self._outcomes(name) if line["outcome"] in BAD}
        if failed or entry["outcome"] == FAILED:
            entry["is_complete"] = False
        self._keep(OUTCOMES_FILE, lambda line: line.get("part") != name or line.get("test") not in failed)
        own = {test.rpartition("::")[2] for test in failed}
        self._keep(BENCHMARKS_FILE, lambda line: line.get("test") not in own)

    def content(self) -> dict[str, Any]:
        """All that is known."""
        return {
            "what": "evidence",
            "dry_run": self.is_dry_run,
            "environment": self.parts.get("environment", {}).get("facts", {}),
            "runs": self.runs,
            "parts": self.parts,
            "tests": self._outcomes(),
            "benchmarks": read_lines(self.folder / BENCHMARKS_FILE),
        }

    def write(self) -> None:
        """Write the JSON, then the page."""
        content = self.content()
        self._write(JSON_FILE, json.dumps(content, indent=1))
        try:
            tables = page(content)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            # Somebody's benchmark may note what no table knows: that must not cost the parts that follow.
            tables = f"The tables could not be made ({type(error).__name__}: {error}); {JSON_FILE} has everything."
        self._write(PAGE_FILE, tables)

    def _outcomes(self, part: str | None = None) -> list[dict[str, Any]]:
        """The latest outcome of every test, or of those of one part."""
        latest = {}
        for line in read_lines(self.folder / OUTCOMES_FILE):
            if line.get("outcome") not in (None, "started") and part in (None, line["part"]):
                latest[line["part"], line["test"]] = line
        return list(latest.values())

    def _write(self, name: str, text: str) -> None:
        with written_atomically(self.folder / name) as temporary:
            temporary.write_text(f"{text}\n", encoding="utf-8")

    def _keep(self, name: str, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        path = self.folder / name
        if path.exists():
            lines = [json.dumps(line) for line in read_lines(path) if is_kept(line)]
            with written_atomically(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        path = self.folder / JSON_FILE
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found.get("parts"), dict) or not isinstance(found.get("runs"), list):
                raise ValueError("no record of evidence")
        except (ValueError, AttributeError) as error:
            # What parts wrote line by line is still there: nothing that was measured is lost.
            aside = path.with_name(f"{path.stem}-unreadable{path.suffix}")
            path.replace(aside)
            print(f"{path} cannot be read ({error}): kept as {aside.name}, going on from the lines beside it")
            return {}
        return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
