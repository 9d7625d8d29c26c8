"""Run the plan for a CUDA GPU in two calls of a few minutes, the most important steps first.

    python -m benchmarks.gpu --prepare DATA   (on any machine: the data set that the last step trains on)
    python -m benchmarks.gpu                  (make gpu PYTHON=python)
    python -m benchmarks.gpu --call 2

A checkout is enough, without installation, where Python has torch, triton, numpy, einops, scikit-image, safetensors,
tqdm, pytest and pytest-benchmark. Every step is a command with a limit and a log; steps that fail do not end the plan.
The second call begins with what the first one left. docs/gpu.md says what each step decides.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .records import ROOT, append_line, environment, read_lines
from .time_to_dice import write_resized

SECONDS = {1: 400, 2: 320}  # of each call
LEAST_SECONDS = 15  # a stage does not begin with less time left
GRACE_SECONDS = 5
POLL_SECONDS = 0.1
WORKERS = 6
TEST_SECONDS = 100

SMALLEST = ("same_bits", "autocast")
# Published sizes in half precision, CUDA graphs and captured steps; not the compiler, nor the largest maps.
CHOSEN = ("OnAGpu", "on_a_gpu", "test_gpu.py")
LEFT_OUT = ("float32", "contiguous", "larger_batch", "32_bits", "1000", "512", "OtherDevice", "ReduceOverhead")
LEFT_OUT += ("reduce_overhead", "compiled")
CHOSEN_FILES = ("tests/kernels", "tests/layers", "tests/test_graphs.py", "tests/training/test_step_graphs.py")
RACED = "ours,reference,published"


@dataclass(frozen=True)
class Step:
    """A step of the plan: its name, its command and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: int


Stage = tuple[Step, ...]  # steps that run at the same time


def plan(folder: Path) -> dict[int, list[Stage]]:
    """Return the stages of each call, the most important first; measurements go to records in ``folder``."""
    record = str(folder / "record.jsonl")

    def tests(name: str, selection: str, limit: int, *words: str) -> Step:
        # What failed before comes first.
        options = ("-q", "--ff", "-o", f"cache_dir={folder / name}", "-p", "no:benchmark", *_plugin_options())
        return Step(name, _python("pytest", *options, "-k", selection, *words), limit)

    def network(name: str, mode: str, batch: int, candidates: str, limit: int) -> Step:
        words = ("--mode", mode, "--batch", str(batch), "--candidates", candidates, "--record", record)
        return Step(name, _python("benchmarks.network", *words), limit)

    def attention(batch: int, limit: int) -> Step:
        selection = f"bfloat16 and pixels_224 and batch_{batch}-dropout_0.1 and (sdpa or compiled)"
        words = ("-q", "benchmarks/test_channel_attention.py", "-m", "gpu", "-k", selection, "--benchmark-only")
        words += ("--benchmark-quiet", "--record", record)
        return Step(f"attention-{batch}", _python("pytest", *words), limit)

    chosen = f"({' or '.join(CHOSEN)}) and not ({' or '.join(LEFT_OUT)})"
    target = ("-i", str(folder / "data"), "-o", str(folder / "dice.jsonl"), "--candidates", "ours", "--dice", "0.7999")
    return {
        1: [
            (tests("operators", " or ".join(SMALLEST), 40, "-x", "tests/kernels/test_every_operator.py"),),
            (network("profile-32", "profile", 32, "ours", 30),),
            (network("profile-4", "profile", 4, "ours", 20),),
            (
                tests("tests", chosen, 150, "-m", "gpu", *CHOSEN_FILES),
                network("compile-32", "memory", 32, "compiled", 150),
                network("compile-4", "memory", 4, "compiled", 150),
            ),
            (network("training-4", "training", 4, RACED, 35),),
            (network("training-32", "training", 32, RACED, 50),),
            (network("inference-1", "inference", 1, RACED, 25),),
            (network("inference-32", "inference", 32, RACED, 30),),
        ],
        2: [
            (network("compiled-training-4", "training", 4, "compiled", 45),),
            (network("compiled-training-32", "training", 32, "compiled", 55),),
            (attention(32, 70),),
            (Step("dice", _python("benchmarks.time_to_dice", *target, "--seconds", "80"), 100),),
            (network("compiled-inference-1", "inference", 1, "compiled", 50),),
            (network("compiled-inference-32", "inference", 32, "compiled", 50),),
            (attention(4, 60),),
        ],
    }


def _python(module: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-m", module, *words)


def _plugin_options() -> Iterator[str]:
    if importlib.util.find_spec("xdist"):
        yield from ("-n", str(WORKERS))
    if importlib.util.find_spec("pytest_timeout"):
        yield from ("--timeout", str(TEST_SECONDS))


def left(call: int, folder: Path, again: Sequence[str] = ()) -> list[Stage]:
    """Return the stages up to a call, without the steps that have passed and are not in ``again``."""
    passed = {line["step"] for line in read_lines(folder / "steps.jsonl") if line["outcome"] == "passed"}
    stages = [stage for number, stages in plan(folder).items() if number <= call for stage in stages]
    remaining = [tuple(step for step in stage if step.name not in passed - set(again)) for stage in stages]
    return [stage for stage in remaining if stage]


def run_stage(stage: Stage, folder: Path, seconds: float) -> Iterator[dict]:
    """Run steps at the same time for at most so many seconds; yield the line about each as it ends.

    Each writes a log, and the lines go to ``steps.jsonl``. An outcome is ``passed``, ``failed`` or ``cut short``.
    """
    started = time.monotonic()
    running = {step: _started(step, folder) for step in stage}
    try:
        while running:
            time.sleep(POLL_SECONDS)
            elapsed = time.monotonic() - started
            for step, process in list(running.items()):
                if process.poll() is None and elapsed < min(step.limit, seconds):
                    continue
                outcome = {None: "cut short", 0: "passed"}.get(process.returncode, "failed")
                _end(running.pop(step))
                line = {"step": step.name, "outcome": outcome, "seconds": elapsed, "command": step.command}
                append_line(folder / "steps.jsonl", line)
                yield line
    finally:
        for process in running.values():
            _end(process)


def _started(step: Step, folder: Path) -> subprocess.Popen:
    with (folder / f"{step.name}.log").open("ab") as log:
        return subprocess.Popen(step.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started; an interrupt first lets pytest print its summary."""
    for sent, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sent)
            process.wait(patience)


def run_all(stages: Sequence[Stage], folder: Path, seconds: float) -> bool:
    """Run stages until the time is over, print the outcome of each step, and return whether all passed."""
    deadline = time.monotonic() + seconds
    all_passed = True
    for stage in stages:
        rest = deadline - time.monotonic() - GRACE_SECONDS
        if rest < LEAST_SECONDS:
            names = ", ".join(step.name for step in stage)
            print(f"{names}: not begun, {max(rest, 0):.0f} s are left", flush=True)
            all_passed = False
            continue
        for line in run_stage(stage, folder, rest):
            all_passed &= line["outcome"] == "passed"
            last = _last_line(folder / f"{line['step']}.log")
            print(f"{line['step']}: {line['outcome']} after {line['seconds']:.0f} s; {last}", flush=True)
    return all_passed


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def versions() -> dict:
    """Return the environment, and a digest of what Triton's cache of compiled kernels depends on."""
    from triton.runtime.cache import triton_key

    return environment() | {"triton_key": hashlib.sha256(triton_key().encode()).hexdigest()[:16]}


def main(words: list[str] | None = None) -> int:
    """Run a call of the plan; return 1 where a step did not pass and 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--call", type=int, default=1, choices=SECONDS, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help=f"for this call (default: {SECONDS[1]} and {SECONDS[2]})")
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / ".benchmarks" / "gpu", help="logs, records and data"
    )
    parser.add_argument("--again", default="", metavar="A,B", help="run these steps again, though they have passed")
    parser.add_argument("--list", action="store_true", help="print the steps that are left with their limits, and stop")
    parser.add_argument("--prepare", metavar="DATA", help="write this data set at 224 pixels to the output, and stop")
    given = parser.parse_args(words)
    folder = given.output.resolve()
    if given.prepare is not None:
        print(f"{write_resized(given.prepare, folder / 'data')} images in {folder / 'data'}")
        return 0
    again = [name for name in given.again.split(",") if name]
    names = [step.name for stages in plan(folder).values() for stage in stages for step in stage]
    if unknown := [name for name in again if name not in names]:
        parser.error(f"--again: {unknown[0]!r} is unknown; choose of {', '.join(names)}")
    stages = left(given.call, folder, again)
    if given.list:
        for stage in stages:
            print("\n".join(f"{step.name} ({step.limit} s): {' '.join(step.command)}" for step in stage))
        return 0
    if not torch.cuda.is_available():
        print(
            f"PyTorch {torch.__version__} of {sys.executable} sees no CUDA GPU; run this where there is one, with the "
            "Python that has PyTorch for it: make gpu PYTHON=/path/to/python",
            file=sys.stderr,
        )
        return 2
    found = versions()
    append_line(folder / "record.jsonl", {"environment": found})
    print(json.dumps(found, indent=1), flush=True)
    return 0 if run_all(stages, folder, given.seconds or SECONDS[given.call]) else 1


if __name__ == "__main__":
    sys.exit(main())
