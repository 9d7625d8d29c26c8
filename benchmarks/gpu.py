"""Run the plan for a CUDA GPU, the most important steps first, in two calls of at most ten minutes.

    python -m benchmarks.gpu                (make gpu PYTHON=python)
    python -m benchmarks.gpu --list

A checkout is enough, without installation, where Python has torch, triton, numpy, einops, scikit-image, safetensors,
tqdm, pytest and pytest-benchmark. Every step is a command with a limit. The folder ``--output`` gets a log of each step
and the record of all measurements. The same command again runs the steps that never began, then those that were cut
short. docs/gpu.md says what each step decides.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import uctrans
from uctrans.training import segmentation_loss

from .harness import operator_backend
from .records import ROOT, append_line, read_lines

MINUTES = 9.0
LEAST_SECONDS = 15  # a step does not begin with less time left
GRACE_SECONDS = 5
WORKERS = 8
TEST_SECONDS = 120
FOUND = 86  # exit status of compute-sanitizer where it found something
ENDED = ("passed", "failed")
OPERATORS = ("channel_attention", "skip_gate", "batch_norm_relu", "segmentation_loss", "attention_block")
UNCOMPILED = "ours,composed,reference,published"


@dataclass(frozen=True)
class Step:
    """A step of the plan: its name, its command and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: int


def plan(folder: Path) -> list[Step]:
    """Return the steps, the most important first; measurements go to the record in ``folder``."""
    record = str(folder / "record.jsonl")
    python = (sys.executable, "-u", "-m")

    def network(mode: str, batch: int, candidates: str, *options: str) -> tuple[str, ...]:
        words = ("--mode", mode, "--batch", str(batch), "--candidates", candidates, "--record", record)
        return (*python, "benchmarks.network", *words, *options)

    tests = (*python, "pytest", *pytest_options(), "tests/kernels", "tests/layers")
    files = [f"benchmarks/test_{name}.py" for name in OPERATORS]

    def operators(selection: str) -> tuple[str, ...]:
        words = ("-m", "gpu", "-k", f"bfloat16 and pixels_224 and {selection}", "--benchmark-only")
        return (*python, "pytest", "-q", *files, *words, "--benchmark-quiet", "--record", record, "--missing")

    dual_branch = ("--model", "dual_branch_uctransnet")
    return [
        Step("correctness", (*tests, "-m", "gpu"), 90),
        Step("training-4", network("training", 4, UNCOMPILED), 40),
        Step("training-32", network("training", 32, UNCOMPILED), 40),
        Step("operators-32", operators("batch_32 and not compiled"), 110),
        Step("inference-1", network("inference", 1, UNCOMPILED), 25),
        Step("inference-32", network("inference", 32, UNCOMPILED), 25),
        Step("profile-4", network("profile", 4, "ours"), 20),
        Step("profile-32", network("profile", 32, "ours,reference"), 25),
        Step("memory-32", network("memory", 32, UNCOMPILED), 60),
        Step("memcheck", sanitizer("memcheck"), 50),
        Step("compiled-4", network("training", 4, "compiled,ours compiled"), 90),
        Step("compiled-32", network("training", 32, "compiled,ours compiled"), 90),
        Step("racecheck", sanitizer("racecheck"), 30),
        Step("operators-4", operators("batch_4 and not compiled"), 45),
        Step("dual-branch-4", network("training", 4, UNCOMPILED, *dual_branch), 40),
        Step("operators-compiled-32", operators("batch_32 and compiled"), 60),
    ]


def pytest_options() -> list[str]:
    """Return options for tests, those of pytest-xdist and pytest-timeout where they are installed."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", str(TEST_SECONDS)]
    return options


def sanitizer(tool: str) -> tuple[str, ...]:
    """Return the command that runs every operator at small sizes under a tool of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    smallest = (sys.executable, "-u", "-m", "benchmarks.gpu", "--smallest")
    return (program or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *smallest)


def run_smallest_steps() -> None:
    """Run a training step of both networks at odd widths, in both layouts and precisions: every operator runs.

    Sizes are small because compute-sanitizer slows kernels about a hundredfold.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in ("uctransnet", "dual_branch_uctransnet"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for is_half in (False, True):
                torch.manual_seed(0)
                backend = operator_backend(device)
                model = uctrans.create_model(name, base_channels=3, image_size=48, backend=backend)
                model = model.to(device, memory_format=memory_format).train()
                images = torch.rand(2, 3, 48, 48, device=device).contiguous(memory_format=memory_format)
                masks = (images.mean(1) > 0.5).to(torch.uint8)
                with torch.autocast(device, torch.bfloat16, enabled=is_half):
                    logits = model(images)
                loss = segmentation_loss(logits, masks, backend=backend)
                loss.backward()
                print(f"{name}, {memory_format}, {logits.dtype}: loss {loss.item():.4f}", flush=True)


def pending(steps: Sequence[Step], folder: Path, again: Sequence[str] = ()) -> list[Step]:
    """Return the steps to run: those that never began, and those of ``again``, then those that were cut short."""
    outcomes = {line["step"]: line["outcome"] for line in read_lines(folder / "steps.jsonl")}
    outcomes = {name: outcome for name, outcome in outcomes.items() if name not in again}
    left = [step for step in steps if outcomes.get(step.name) not in ENDED]
    return sorted(left, key=lambda step: step.name in outcomes)


def run(step: Step, folder: Path, seconds: float) -> str:
    """Run a step for at most so many seconds, with its output in a log, and return its outcome.

    The outcome is ``passed``, ``failed``, ``cut short`` or ``not installed``.
    """
    started = time.monotonic()
    # Under a checker every tensor has an allocation of its own: inside a large block nothing is out of bounds.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in step.command[0] else {}
    with (folder / f"{step.name}.log").open("ab") as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | variables,
                start_new_session=True,
            )
        except FileNotFoundError:
            outcome = "not installed"
        else:
            outcome = _outcome(process, seconds)
    line = {"step": step.name, "outcome": outcome, "seconds": time.monotonic() - started, "command": step.command}
    append_line(folder / "steps.jsonl", line)
    return outcome


def _outcome(process: subprocess.Popen, seconds: float) -> str:
    try:
        return "passed" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "cut short"
    finally:
        # An interrupt lets pytest print its summary. If the process continues, it is killed with its children.
        for sent, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sent)
                process.wait(patience)


def run_all(steps: Sequence[Step], folder: Path, seconds: float) -> bool:
    """Run steps until the time is over, print the outcome of each, and return whether none failed."""
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    has_failed = False
    for step in steps:
        left = deadline - time.monotonic() - GRACE_SECONDS
        if left < min(LEAST_SECONDS, step.limit):
            print(f"{step.name}: not begun, {max(left, 0):.0f} s are left")
            continue
        print(f"{step.name} ...", end=" ", flush=True)
        started = time.monotonic()
        outcome = run(step, folder, min(step.limit, left))
        has_failed |= outcome == "failed"
        print(
            f"{outcome} after {time.monotonic() - started:.0f} s; {_last_line(folder / f'{step.name}.log')}", flush=True
        )
    return not has_failed


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main(words: list[str] | None = None) -> int:
    """Run what is left of the plan; return 1 where a step failed and 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for this call (default: %(default)g)")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / ".benchmarks" / "gpu", help="folder of logs")
    parser.add_argument("--again", default="", metavar="A,B", help="run these steps again, though they have ended")
    parser.add_argument("--list", action="store_true", help="print the steps that are left with their limits, and stop")
    parser.add_argument("--smallest", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer watches
    given = parser.parse_args(words)
    if given.smallest:
        run_smallest_steps()
        return 0
    steps = plan(given.output)
    again = [name for name in given.again.split(",") if name]
    if unknown := [name for name in again if name not in {step.name for step in steps}]:
        parser.error(f"--again: {unknown[0]!r} is unknown; choose of {', '.join(step.name for step in steps)}")
    left = pending(steps, given.output, again)
    if given.list:
        for step in left:
            print(f"{step.name} ({step.limit} s): {' '.join(step.command)}")
        return 0
    if not torch.cuda.is_available():
        print(
            f"PyTorch {torch.__version__} of {sys.executable} sees no CUDA GPU; run this where there is one, with the "
            "Python that has PyTorch for it: make gpu PYTHON=/path/to/python",
            file=sys.stderr,
        )
        return 2
    is_well = run_all(left, given.output, 60 * given.minutes)
    if names := [step.name for step in pending(steps, given.output)]:
        print(f"left: {', '.join(names)}; the same command continues")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
