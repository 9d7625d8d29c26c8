"""Time whole networks: training step, inference, peak memory, kernels of a step.

    python -m benchmarks.network --mode training --model uctransnet --batch 4
    python -m benchmarks.network --mode inference --batch 1
    python -m benchmarks.network --mode memory --batch 32 --checkpointing
    python -m benchmarks.network --mode profile --candidates ours
    python -m benchmarks.network --mode launches

Every candidate is checked and then takes turns with the project's own network, ``ours``. On a GPU ``ours`` and the
baselines compute in bfloat16, channels-last, and are captured as CUDA graphs; ``published`` is float32, contiguous and
eager, as the published script runs it. On a CPU all are float32 and eager, and ``ours`` is the composed form. In
inference ``ours`` has its batch norms folded into convolutions, as ``uctrans predict`` runs it; ``unfolded`` has not,
``onnx`` is the engine of that name, and ``session`` its file in a plain session of ONNX Runtime. Training is forward,
published loss, backward and Adam on one batch. ``torch.compile`` runs in its default mode, because tuning takes
minutes. cuDNN measures which convolutions are fastest.
"""

import argparse
import gc
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .candidates import CANDIDATES, MODELS, OF_INFERENCE, OURS, RACE, Problem
from .harness import compared, in_turns, kernels
from .launches import BACKENDS, dispatched_operators, operator_table
from .records import DEFAULT_RECORD, append_line, environment, table
from .steps import WARM_UP_CALLS, Inference, Training

ROUNDS = {"cuda": 12, "cpu": 9}
CALLS_IN_A_ROW = {"cuda": 3, "cpu": 1}

MEMORY_STEPS = 4  # after the first, which compiles and tunes: a plain one, the one that records, two replays
FIRST_BATCH = 8
SEARCH_PRECISION = 1 / 16  # of the largest batch
SEARCH_SECONDS = 90.0
PROFILED_KERNELS = 20


def in_a_row(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Return a sample: seconds a call of several that follow each other, while the host may run ahead of the device."""
    calls = CALLS_IN_A_ROW[device]

    def on_events() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def on_the_clock() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    return on_events if device == "cuda" else on_the_clock


def one_by_one(run: Callable[[], object], device: str) -> Callable[[], float]:
    """Return a sample: seconds from a call to its result on the device, the host's part included."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def sample() -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return sample


def candidate_sample(mode: str, problem: Problem, candidate: str) -> tuple[Callable[[], float], dict[str, Any]]:
    """Return a checked candidate's sample and notes: of one image in inference the latency, else the throughput."""
    variant = (CANDIDATES | OF_INFERENCE)[candidate].on(problem.device)
    work = (Training if mode == "training" else Inference)(problem, variant)
    notes = work.check() | {"dtype": variant.dtype, "backend": variant.backend}
    for _ in range(WARM_UP_CALLS[problem.device]):
        work()
    is_latency = mode == "inference" and problem.batch == 1
    return (one_by_one if is_latency else in_a_row)(work, problem.device), notes


def compare(problem: Problem, candidates: list[str]) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Yield each candidate of training with its notes and samples, timed in turns with ours.

    Ours against itself shows the noise.

    Raises:
        AssertionError: a candidate computes something else.
    """
    ours, _ = candidate_sample("training", problem, OURS)
    for candidate in candidates:
        sample, notes = candidate_sample("training", problem, candidate)
        outcome = in_turns(sample, ours, problem.device, rounds=ROUNDS[problem.device])
        seconds = outcome.pop("seconds")
        yield candidate, notes | outcome | _throughput(problem, outcome), seconds
        del sample
        release()


def race(problem: Problem, candidates: list[str]) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Yield each candidate of inference with its notes and samples; all take turns in every round.

    The order is drawn for each round, because a candidate starts with the caches and the heap that another leaves.

    Raises:
        AssertionError: a candidate computes something else.
    """
    works = {name: candidate_sample("inference", problem, name) for name in dict.fromkeys([OURS, *candidates])}
    samples: dict[str, list[float]] = {name: [] for name in works}
    order, shuffle = list(works), random.Random(0).shuffle
    for _ in range(ROUNDS[problem.device]):
        shuffle(order)
        for name in order:
            samples[name].append(works[name][0]())
    for name in candidates:
        outcome = compared(samples[name], samples[OURS])
        if "published" in candidates:
            outcome["times_as_fast_as_published"] = 1 / compared(samples[name], samples["published"])["ratio"]
        seconds = outcome.pop("seconds")
        yield name, works[name][1] | outcome | _throughput(problem, outcome), seconds
    del works
    release()


def _throughput(problem: Problem, outcome: dict[str, Any]) -> dict[str, float]:
    return {"images_per_second": problem.batch / outcome["median_seconds"]}


def release() -> None:
    """Give back the memory of what is no longer used, and forget what was compiled."""
    torch.compiler.reset()  # after a few shapes PyTorch would run a function uncompiled
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tune_convolutions() -> None:
    """Let cuDNN measure which convolutions are fastest, as a training does."""
    torch.backends.cudnn.benchmark = True


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function finds in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=tune_convolutions) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(problem: Problem, candidate: str) -> dict[str, int]:
    """Return the peak bytes of training: weights, Adam's state, batch and step; on a CPU those of the process.

    A step takes its memory when it is captured, and a replay takes none, so the peak includes the capture. On a CPU the
    peak is read from /proc, which only Linux has.
    """
    on_gpu = problem.device == "cuda"
    work = Training(problem, CANDIDATES[candidate].on(problem.device))
    work()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(MEMORY_STEPS if on_gpu else 1):
        work()
    assert math.isfinite(work.loss()), "the loss is not finite"
    if on_gpu:
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return {"peak_bytes": 1024 * int(next(line.split()[1] for line in status.splitlines() if "VmHWM" in line))}


def largest_batch(problem: Problem, candidate: str) -> dict[str, int]:
    """Return the largest batch that two plain steps find memory for on a GPU, known to a sixteenth."""
    variant = replace(CANDIDATES[candidate].on(problem.device), graphed=False)

    def fits(size: int) -> bool:
        try:
            work = Training(replace(problem, batch=size), variant)
            work(), work()
            return math.isfinite(work.loss())
        except torch.OutOfMemoryError:
            return False

    def fits_into_free_memory(size: int) -> bool:
        answer = fits(size)
        release()  # after the call, whose error holds on to what it had made
        return answer

    return {"largest_batch": largest(fits_into_free_memory, time.monotonic() + SEARCH_SECONDS)}


def largest(fits: Callable[[int], bool], deadline: float) -> int:
    """Return the largest size found to fit until a time of ``time.monotonic``, 0 if none: by doubling, then halving."""
    fitting, too_large, size = 0, None, FIRST_BATCH
    while time.monotonic() < deadline:
        if fits(size):
            fitting = size
        else:
            too_large = size
        if too_large is None:
            size = 2 * fitting
        elif too_large - fitting <= max(1, math.floor(SEARCH_PRECISION * fitting)):
            break
        else:
            size = (fitting + too_large) // 2
    return fitting


def profile(problem: Problem, candidate: str) -> dict[str, Any]:
    """Return the seconds of a training step, what it launches on a GPU (on a CPU: calls), and the longest of these."""
    work = Training(problem, CANDIDATES[candidate].on(problem.device))
    for _ in range(WARM_UP_CALLS[problem.device]):
        work()
    sample = in_a_row(work, problem.device)
    seconds = statistics.median(sample() for _ in range(ROUNDS[problem.device]))
    found = kernels(work, problem.device)
    return {
        "median_seconds": seconds,
        "launches": sum(entry["calls"] for entry in found),
        "kernel_seconds": sum(entry["seconds"] for entry in found),
        "kernels": found[:PROFILED_KERNELS],
    }


def profile_table(notes: dict[str, Any]) -> str:
    """Return the longest kernels of a profile in Markdown."""
    busy = notes["kernel_seconds"]
    rows = [f"{1e3 * notes['median_seconds']:.2f} ms a step; {notes['launches']} launches, {1e3 * busy:.2f} ms in all"]
    rows += ["", "| share | ms | launches | kernel |", "| ---: | ---: | ---: | --- |"]
    for entry in notes["kernels"]:
        name = entry["kernel"].replace("|", "\\|")
        rows.append(f"| {entry['seconds'] / busy:.1%} | {1e3 * entry['seconds']:.3f} | {entry['calls']} | `{name}` |")
    return "\n".join(rows)


def parsed(words: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = ("training", "inference", "memory", "profile", "launches")
    parser.add_argument("--mode", default="training", choices=modes)
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--candidates", type=_names, help="separated by commas (default: those of the mode)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in training")
    parser.add_argument("--largest", action="store_true", help="with --mode memory: search the largest batch instead")
    parser.add_argument("--record", type=Path, default=DEFAULT_RECORD, help="JSON lines (default: %(default)s)")
    given = parser.parse_args(words)
    if given.candidates is None:
        given.candidates = list(RACE if (given.mode, given.device) == ("inference", "cpu") else CANDIDATES)
    if given.mode != "inference" and (alien := [name for name in given.candidates if name in OF_INFERENCE]):
        parser.error(f"--candidates: {alien[0]} takes part in --mode inference only")
    if given.largest and given.device != "cuda":
        parser.error("--largest: fills the memory of a GPU; run it with --device cuda")
    return given


def _names(text: str) -> list[str]:
    names = text.split(",")
    known = CANDIDATES | OF_INFERENCE
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; choose of {', '.join(known)}")
    return names


def measurements(given: argparse.Namespace, problem: Problem) -> Iterator[tuple[str, dict[str, Any], list[float]]]:
    """Yield what a command line asks for: each candidate with its notes and samples."""
    if given.mode in ("training", "inference"):
        yield from (race if given.mode == "inference" else compare)(problem, given.candidates)
        return
    if given.mode == "profile":
        measure = partial(profile, problem)
    else:
        measure = partial(in_own_process, largest_batch if given.largest else peak_memory, problem)
    for candidate in given.candidates:
        yield candidate, measure(candidate), []


def _outcome(info: dict[str, Any]) -> str:
    if "times_as_fast_as_published" in info:
        return f"{info['times_as_fast_as_published']:.2f} times as fast as published"
    return str(info.get("largest_batch", "measured"))


def main(words: list[str] | None = None) -> int:
    """Measure, append to the record and print a table."""
    given = parsed(words)
    problem = Problem(given.model, given.batch, given.pixels, given.base_channels, given.device, given.checkpointing)
    if given.mode == "launches":
        sizes = {"batch": given.batch, "pixels": given.pixels, "base_channels": given.base_channels}
        print(operator_table({backend: dispatched_operators(given.model, backend, **sizes) for backend in BACKENDS}))
        return 0
    tune_convolutions()
    append_line(given.record, {"environment": environment()})
    lines = []
    for candidate, notes, seconds in measurements(given, problem):
        sizes = "-".join(str(value) for value in asdict(problem).values())
        name = f"{given.mode}-{sizes}-{candidate}"
        lines.append(
            {
                "test": f"{name}-largest" if given.largest else name,
                "group": given.mode,
                "info": asdict(problem) | {"candidate": candidate} | notes,
                "seconds": seconds,
            }
        )
        append_line(given.record, lines[-1])
        print(f"{candidate}: {_outcome(lines[-1]['info'])}", flush=True)
        if given.mode == "profile":
            print(profile_table(notes))
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
