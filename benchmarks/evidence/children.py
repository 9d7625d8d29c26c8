"""Child processes under a time limit: whatever happens in one, the evidence goes on without it."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TAIL_LINES = 25
# What would change what is measured, or make a run of pytest take itself for part of another.
UNWANTED_VARIABLES = ("TRITON_INTERPRET", "UCTRANS_BACKEND", "CUDA_LAUNCH_BLOCKING", "PYTEST_ADDOPTS")
UNWANTED_PREFIXES = ("PYTEST_XDIST", "PYTEST_CURRENT")
CACHE = ROOT / ".benchmarks" / "compile-cache"


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status (negative: the signal that killed it), or past its limit; what it printed."""

    status: int
    was_stopped: bool
    output: str

    @property
    def reason(self) -> str | None:
        """In words why it is no success, with the end of what it printed; ``None`` if it is one."""
        if self.was_stopped:
            return "stopped at its time limit"
        if self.status == 0:
            return None
        how = f"killed by {signal.Signals(-self.status).name}" if self.status < 0 else f"exit status {self.status}"
        tail = "\n".join(self.output.strip().splitlines()[-TAIL_LINES:])
        return f"{how}\n{tail}".strip()


class Children:
    """Runs child processes, each the leader of a process group that ends with it, and can end all that still run."""

    def __init__(self, log: Path):
        self._log = log
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, command: Sequence[str], seconds: float, variables: Mapping[str, str] | None = None) -> Ended:
        """Run ``command`` in the root of the checkout for at most so many seconds; its output goes into the log too."""
        # Into a file and not a pipe: a grandchild that outlives its parent would keep a pipe open.
        with tempfile.TemporaryFile() as printed:
            with self._lock:
                if self._closed:
                    return Ended(-signal.SIGKILL, True, "")
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=ROOT,
                    env=environment() | dict(variables or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=printed,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
                self._running.add(process)
            was_stopped = False
            try:
                process.wait(timeout=max(seconds, 0))
            except subprocess.TimeoutExpired:
                was_stopped = True
                _end(process)
                process.wait()
            finally:
                _end(process)  # it runs on where a signal broke the wait
                with self._lock:
                    self._running.discard(process)
            printed.seek(0)
            output = printed.read().decode(errors="replace")
        self._write(command, process.returncode, output)
        return Ended(process.returncode, was_stopped or self._closed, output)

    def end_all(self) -> None:
        """End what still runs, and let nothing start any more."""
        with self._lock:
            self._closed = True
            for process in self._running:
                _end(process)

    def _write(self, command: Sequence[str], status: int, output: str) -> None:
        with self._lock, self._log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(map(str, command))}\n{output.rstrip()}\n[exit status {status}]\n\n")


def environment() -> dict[str, str]:
    """Variables of a child: the checkout first on its path, one cache of compiled kernels for all parts."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in UNWANTED_VARIABLES and not name.startswith(UNWANTED_PREFIXES)
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    caches = {"TRITON_CACHE_DIR": str(CACHE / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor")}
    return caches | kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def python(*words: object) -> list[str]:
    """The command that runs this interpreter with ``words``."""
    return [sys.executable, *map(str, words)]


def _end(process: subprocess.Popen) -> None:
    """Kill a process that runs, and its group: a test may have started processes of its own."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
