"""The parts of the evidence in the order they run, most important first, and their small doubles for a CPU.

CONTRIBUTING.md has the commands for sessions of ten minutes.
"""

import json
import os
from collections.abc import Callable
from functools import partial

from ..records import read_lines
from .children import ROOT, python
from .parts import BENCHMARKS_FILE, DONE, FAILED, OUT_OF_TIME, Context, Part, Result
from .pytest_part import run_pytest
from .sanitizer_part import run_operators, run_sanitizer

OPERATORS = ("tests/kernels", "tests/layers")
# Compiles for GPUs that need not be there, for minutes.
NEEDS_NO_GPU = "tests/kernels/test_compilation.py"
PROFILE = "benchmarks/test_profile_step.py"
MOST_SHARDS = 8
CORES_A_SHARD = 2
TEST_STALL = 120.0  # seconds; a test compiles some dozen kernels at most
BENCHMARK_STALL = 240.0
COMPILED_STALL = 900.0  # a network that is tuned to the full takes minutes
BENCHMARK_TRIES = 2  # the second finds compiled what the first left


def gpu_parts() -> list[Part]:
    """What runs on a GPU; shares add up to 1."""
    shards = max(1, min(MOST_SHARDS, (os.cpu_count() or 1) // CORES_A_SHARD))
    on_gpu = partial(
        run_pytest, name="gpu-tests", arguments=[*gpu_tests(), "-m", "gpu"], shards=shards, stall=TEST_STALL
    )
    others = [*operator_tests(), "-m", "not gpu"]
    operators = partial(run_pytest, name="operator-tests", arguments=others, shards=shards, stall=TEST_STALL)
    benchmarks = partial(
        run_recorded, name="benchmarks", arguments=["benchmarks", "--ignore", PROFILE, "-m", "gpu", "--benchmark-only"]
    )
    profile = partial(run_recorded, name="profile", arguments=[PROFILE, "-m", "gpu"])
    return [
        Part("environment", "versions, GPU, clocks, driver, bandwidth and matrix rates", 0.04, describe),
        Part("gpu-tests", "tests that need a GPU: bfloat16, CUDA graphs, published widths", 0.14, on_gpu),
        Part("benchmarks", "the benchmarks, the most important first", 0.46, benchmarks),
        Part("operator-tests", "all tests of operators and layers, on CUDA", 0.16, operators),
        Part("memcheck", "accesses out of bounds, by compute-sanitizer", 0.06, partial(run_sanitizer, tool="memcheck")),
        Part(
            "racecheck", "races in shared memory, by compute-sanitizer", 0.06, partial(run_sanitizer, tool="racecheck")
        ),
        Part("profile", "kernels of a training step, both networks", 0.08, profile),
    ]


def dry_parts() -> list[Part]:
    """The same parts on a CPU, each with next to nothing to do."""

    def tests(name: str, *arguments: str) -> Callable[[Context], Result]:
        return partial(run_pytest, name=name, arguments=arguments, shards=1, stall=TEST_STALL)

    def recorded(name: str, *arguments: str) -> Callable[[Context], Result]:
        return partial(run_recorded, name=name, arguments=list(arguments))

    norms = ("tests/kernels/test_packed_layer_norm.py", "-k", "scales_and_offsets and tiny and float32")
    gate = ("tests/layers/test_layers.py", "-k", "gate")
    smallest = (
        "benchmarks/test_channel_attention.py",
        "-k",
        "cpu and p0- and forward and operator",
        "--benchmark-only",
    )
    return [
        Part("environment", "versions", 0.1, describe),
        Part("gpu-tests", "a few tests", 0.2, tests("gpu-tests", *norms)),
        Part("benchmarks", "one benchmark", 0.2, recorded("benchmarks", *smallest)),
        Part("operator-tests", "a few more tests", 0.2, tests("operator-tests", *gate)),
        Part("memcheck", "the smallest shapes, in the interpreter and under no tool", 0.2, run_operators),
        Part("profile", "a tiny network", 0.1, recorded("profile", PROFILE, "-m", "not gpu")),
    ]


def gpu_tests() -> list[str]:
    """Files that hold tests marked gpu, those of operators and layers first, as time may run out."""
    files = [path for path in test_files("tests") if "mark.gpu" in (ROOT / path).read_text(encoding="utf-8")]
    return sorted(files, key=lambda path: not path.startswith(OPERATORS))


def operator_tests() -> list[str]:
    """Files of tests of operators and layers, those of Triton's kernels first."""
    files = [path for folder in OPERATORS for path in test_files(folder) if path != NEEDS_NO_GPU]
    return sorted(files, key=lambda path: "triton" not in path)


def test_files(folder: str) -> list[str]:
    """Files of tests under ``folder``, from the root of the checkout."""
    return [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / folder).rglob("test_*.py"))]


def describe(context: Context) -> Result:
    """The environment as JSON."""
    ended = context.children.run(python("-m", "benchmarks.records"), context.seconds_left)
    if ended.was_stopped:
        return Result(OUT_OF_TIME, False, reason=ended.reason)
    described = [line for line in ended.output.splitlines() if line.startswith("{")]  # among warnings
    if ended.reason is not None or not described:
        return Result(FAILED, True, reason=ended.reason or "no environment was printed")
    return Result(DONE, True, facts=json.loads(described[-1]))


def run_recorded(context: Context, name: str, arguments: list[str]) -> Result:
    """Run benchmarks that the record lacks, in one process; what does not fit into the time left is skipped."""
    path = context.folder / BENCHMARKS_FILE
    arguments = [*arguments, "--record", str(path), "--missing", "--compiled-stall", str(COMPILED_STALL)]
    result = run_pytest(context, name, arguments, shards=1, stall=BENCHMARK_STALL, tries=BENCHMARK_TRIES)
    measured = {line["test"] for line in read_lines(path) if line.get("outcome") == "measured"}
    result.facts["measured_so_far"] = len(measured)
    return result
