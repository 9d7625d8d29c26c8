"""Peak memory of a training step, and the largest batch that fits; each measured in a process of its own.

    python -m benchmarks.peak_memory --model uctransnet --batch 4 --candidate ours
    python -m benchmarks.peak_memory --model uctransnet --candidate published --checkpointing --largest

Weights, Adam's state and the batch are part of it. What is captured is measured while it is captured: its memory is
taken then, and a replay takes none. The largest batch is searched with plain steps.
"""

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import uctrans

from .errors import in_short
from .networks import CANDIDATES, MODELS, OURS, NetworkProblem, graphs_skipped, own_graphs_notes
from .records import ROOT
from .training_step import training

STEPS = 4  # after the first, which compiles and tunes: a plain one, the one that records, two replays
SEARCH_STEPS = 2
FIRST_BATCH = 8
PRECISION = 1 / 16  # of the largest batch
SEARCH_SECONDS = 90.0
CHILD_SECONDS = 400.0
KIB = 1024

# Of the peak of a training step of 32 images: the most that ours should take of theirs.
TARGETS = {"published": 0.4, "compiled": 0.8, "compiled, own graphs": 0.8}


@dataclass(frozen=True)
class MemoryProblem:
    """A network in training, with or without activation checkpointing."""

    network: NetworkProblem
    checkpointing: bool = False

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        detail = {"detail": "checkpointing"} if self.checkpointing else {}
        return self.network.as_json() | {"dtype": "float32 weights"} | detail

    def arguments(self, candidate: str, largest: bool) -> list[str]:
        """What the command line of this module takes for it."""
        network = self.network
        sizes = {"batch": network.batch, "pixels": network.pixels, "base-channels": network.base_channels}
        named = {"model": network.model, **sizes, "device": network.device, "candidate": candidate}
        flags = {"checkpointing": self.checkpointing, "largest": largest}
        values = [text for name, value in named.items() for text in (f"--{name}", str(value))]
        return values + [f"--{name}" for name, is_on in flags.items() if is_on]

    def __str__(self) -> str:
        return f"{self.network}{'-checkpointing' if self.checkpointing else ''}"


def target(problem: MemoryProblem, candidate: str) -> float | None:
    """The most that ours should take of the candidate's peak, or ``None``."""
    is_claimed = replace(problem.network, device="cuda") in [NetworkProblem(model, 32) for model in MODELS]
    return TARGETS.get(candidate) if is_claimed and not problem.checkpointing else None


def measured_apart(problem: MemoryProblem, candidate: str, largest: bool = False) -> dict[str, Any]:
    """What :func:`peak` or :func:`largest_batch` finds in a fresh process.

    Raises:
        RuntimeError: the process failed; the message is the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.peak_memory", *problem.arguments(candidate, largest)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=CHILD_SECONDS)
    if ended.returncode != 0:
        raise RuntimeError(f"{candidate} in {problem}: {ended.stderr[-1000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def peak(problem: MemoryProblem, candidate: str) -> dict[str, Any]:
    """Peak bytes of tensors, and of what the allocator took for them; on a CPU, of the process (Linux alone)."""
    variant = CANDIDATES[candidate].on(problem.network.device)
    run = _steps(problem, candidate, may_be_captured=True)
    skipped_before = graphs_skipped()
    run()
    if problem.network.device == "cuda":
        torch.cuda.synchronize()
        release_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        run()
    if problem.network.device == "cuda":
        torch.cuda.synchronize()
        peaks = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    else:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        resident = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        peaks = {"peak_bytes": int(resident.split()[1]) * KIB}
    return peaks | {"variant": str(variant)} | own_graphs_notes(variant, skipped_before)


def largest_batch(problem: MemoryProblem, candidate: str) -> dict[str, Any]:
    """The largest batch that two plain steps fit into the memory with, known to a sixteenth."""
    deadline = time.monotonic() + SEARCH_SECONDS
    errors: list[str] = []

    def fits(size: int) -> bool:
        resized = replace(problem, network=replace(problem.network, batch=size))
        try:
            run = _steps(resized, candidate, may_be_captured=False)
            for _ in range(SEARCH_STEPS):
                run()
        except torch.OutOfMemoryError:
            return False
        except (RuntimeError, AssertionError) as error:
            errors.append(f"{size} images: {in_short(error)}")
            return False
        return True

    def fits_into_free_memory(size: int) -> bool:
        answer = fits(size)
        if not errors:  # after some errors the GPU answers nothing any more
            release_cache()
        return answer

    fitting, too_large = search(fits_into_free_memory, lambda: time.monotonic() < deadline and not errors)
    found = {"largest_batch": fitting, "too_large_batch": too_large, "errors": errors}
    if problem.network.device == "cuda" and not errors:
        found |= {"memory_bytes": torch.cuda.mem_get_info()[1], "free_bytes": torch.cuda.mem_get_info()[0]}
    return found


def search(fits: Callable[[int], bool], may_go_on: Callable[[], bool]) -> tuple[int, int | None]:
    """The largest size found to fit, 0 for none, and the smallest found not to, by doubling and then bisection."""
    fitting, too_large = 0, None
    size = FIRST_BATCH
    while may_go_on():
        if fits(size):
            fitting = size
        else:
            too_large = size
        if too_large is None:
            size = 2 * fitting
        elif too_large - fitting <= max(1, math.floor(PRECISION * fitting)):
            break
        else:
            size = (fitting + too_large) // 2
    return fitting, too_large


def release_cache() -> None:
    """Give memory that no tensor uses back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _steps(problem: MemoryProblem, candidate: str, may_be_captured: bool) -> Callable[[], None]:
    variant = CANDIDATES[candidate].on(problem.network.device)
    work = training(problem.network, variant if may_be_captured else replace(variant, graphed=False))
    if problem.checkpointing:
        uctrans.set_checkpointing(work.model)
    run = work.runner()

    def step() -> None:
        run()
        assert math.isfinite(work.loss()), "the loss is not finite"

    return step


def main() -> None:
    """Measure what the command line names, and print it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--candidate", default=OURS, choices=CANDIDATES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--largest", action="store_true", help="search the largest batch instead")
    given = parser.parse_args()
    network = NetworkProblem(given.model, given.batch, given.pixels, given.base_channels, given.device)
    problem = MemoryProblem(network, given.checkpointing)
    print(json.dumps((largest_batch if given.largest else peak)(problem, given.candidate)))


if __name__ == "__main__":
    main()
