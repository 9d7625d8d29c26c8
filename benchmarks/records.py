"""A record of a benchmark run that grows line by line, so that a run that is cut short still leaves one.

The first line of a run describes the machine (``{"environment": ...}``); every other line is a test, with its outcome
and, where it was measured, all its samples. Several runs may follow each other in a file.
"""

import hashlib
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .evidence.machine import State
from .roofline import Ceilings, known_ceilings, measured_ceilings

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("kernels", "uctrans", "benchmarks", "tests")
PACKAGES = ("numpy", "pytest", "pytest-benchmark", "hypothesis")
# Seconds of a first test whose name holds the words, the first that fit: it compiles, a network for minutes. Guesses,
# not measured: one that is too low costs a test that is cut short, whose compiled kernels stay in the cache; one that
# is more than a session has costs the test.
FIRST_GUESS = {
    "test_training_step compiled": 150.0,
    "test_inference compiled": 100.0,
    "compiled": 60.0,
    "sdpa": 40.0,
}
FIRST_GUESS_OF_OTHERS = 15.0
OUT_OF_BUDGET = "of the budget are left"  # in the reason of a test that was skipped for want of time


class Record:
    """JSON lines in ``path``, and which tests are in it already."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        self.known = known_ceilings(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self.measured = measured_ceilings() if device.type == "cuda" else None
        self.finished = {line["test"] for line in read_lines(path) if line.get("outcome") in ("measured", "failed")}
        self.gpu_before: State | None = None
        described = environment(device)
        self.sources = described["sources"]
        self._append({"environment": described | ceilings_as_json(self.known, self.measured)})

    @property
    def ceilings(self) -> Ceilings | None:
        """Those recorded for this GPU, else those measured in this run; none on a CPU."""
        return self.known or self.measured

    def measured_test(self, test: str, group: str, info: dict[str, Any], seconds: list[float]) -> None:
        """Add a measured test, with the state that the GPU was in before it where that is known."""
        state = {} if self.gpu_before is None else {"gpu_before": self.gpu_before}
        self._append_test(
            {"test": test, "group": group, "outcome": "measured", "info": info, "seconds": seconds} | state
        )

    def unmeasured_test(self, test: str, outcome: str, reason: str) -> None:
        """Add a test that was skipped or failed."""
        self._append_test({"test": test, "outcome": outcome, "reason": reason})

    def _append(self, line: dict[str, Any]) -> None:
        append_line(self.path, line)

    def _append_test(self, line: dict[str, Any]) -> None:
        self._append(line | {"sources": self.sources})


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
        return None if needed <= left else f"needs about {needed:.0f} s, and {max(left, 0):.0f} s {OUT_OF_BUDGET}"

    def spent(self, kind: str, seconds: float) -> None:
        """Remember how long a test of ``kind`` took."""
        self.longest[kind] = max(seconds, self.longest.get(kind, 0.0))


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add ``line`` to JSON lines, in one write, so that processes may share the file; half a line before it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        cut_short = False
        if size:
            file.seek(size - 1)
            cut_short = file.read(1) != b"\n"
        file.write(b"\n" * cut_short + json.dumps(line).encode() + b"\n")


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


def ceilings_as_json(known: Ceilings | None, measured: Ceilings | None) -> dict[str, Any]:
    """The ceilings that there are, under plain names."""
    named = {"known_ceilings": known, "measured_ceilings": measured}
    return {name: ceilings.as_json() for name, ceilings in named.items() if ceilings is not None}


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured on, with what."""
    described = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "packages": {name: _version(name) for name in PACKAGES},
        "sources": sources(),
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


def sources() -> str:
    """A hash of all code that is measured and measures: it tells a checkout, also one without .git, from another."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
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


def main() -> None:
    """Print what this machine is, with the ceilings of its GPU, as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = environment(device)
    if device.type == "cuda":
        described |= ceilings_as_json(known_ceilings(torch.cuda.get_device_name()), measured_ceilings())
    print(json.dumps(described))


if __name__ == "__main__":
    main()
