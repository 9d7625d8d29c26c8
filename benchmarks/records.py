"""A record of a benchmark run that grows line by line, so that a run that is cut short still leaves one.

The first line of a run describes the machine (``{"environment": ...}``); every other line is a test, with its outcome
and, where it was measured, all its samples. Several runs may follow each other in a file.
"""

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from .roofline import Ceilings, known_ceilings, measured_ceilings

FIRST_GUESS = {"compiled": 90.0, "sdpa": 60.0}  # seconds of a first test whose name holds the word: it compiles
FIRST_GUESS_OF_OTHERS = 15.0


class Record:
    """JSON lines in ``path``, and which tests are in it already."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        self.known = known_ceilings(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self.measured = measured_ceilings() if device.type == "cuda" else None
        self.finished = {line["test"] for line in read_lines(path) if line.get("outcome") in ("measured", "failed")}
        self._append({"environment": environment(device) | self._ceilings_as_json()})

    @property
    def ceilings(self) -> Ceilings | None:
        """Those recorded for this GPU, else those measured in this run; none on a CPU."""
        return self.known or self.measured

    def measured_test(self, test: str, group: str, info: dict[str, Any], seconds: list[float]) -> None:
        """Add a measured test."""
        self._append({"test": test, "group": group, "outcome": "measured", "info": info, "seconds": seconds})

    def unmeasured_test(self, test: str, outcome: str, reason: str) -> None:
        """Add a test that was skipped or failed."""
        self._append({"test": test, "outcome": outcome, "reason": reason})

    def _ceilings_as_json(self) -> dict[str, Any]:
        named = {"known_ceilings": self.known, "measured_ceilings": self.measured}
        return {name: ceilings.as_json() for name, ceilings in named.items() if ceilings is not None}

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_short = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_short + json.dumps(line) + "\n")


class Budget:
    """How many minutes a run may take, and whether one more test fits."""

    def __init__(self, minutes: float | None):
        self.started = time.monotonic()
        self.seconds = None if minutes is None else 60 * minutes
        self.longest: dict[str, float] = {}

    def obstacle(self, kind: str) -> str | None:
        """Why another test of ``kind`` does not fit, or ``None``; it is taken to last as long as the longest so far."""
        if self.seconds is None:
            return None
        guesses = (seconds for word, seconds in FIRST_GUESS.items() if word in kind)
        needed = self.longest.get(kind, next(guesses, FIRST_GUESS_OF_OTHERS))
        left = self.seconds - (time.monotonic() - self.started)
        return (
            None if needed <= left else f"needs about {needed:.0f} s, and {max(left, 0):.0f} s of the budget are left"
        )

    def spent(self, kind: str, seconds: float) -> None:
        """Remember how long a test of ``kind`` took."""
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a record; none if there is no file. A run killed while writing leaves half a line."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured on, with what."""
    described = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "device": platform.processor() or platform.machine(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type != "cuda":
        return described | {"threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return described | {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "second_level_cache_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "clocks": _first_line(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]),
    }


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output(["git", "-C", str(Path(__file__).parent), *arguments])


def _first_line(command: list[str]) -> str | None:
    output = _output(command)
    return output.splitlines()[0] if output else output


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
