"""The parts that run every operator at its smallest shapes under a tool of compute-sanitizer."""

import os
import re
import shutil
from pathlib import Path

from .children import TAIL_LINES, Ended, python
from .parts import DONE, FAILED, NOT_THERE, OUT_OF_TIME, Context, Result

SMALLEST = ("-m", "benchmarks.evidence.smallest")
FOUND = 86  # exit status for "the tool found something"
UNFIT = "Device not supported"  # what the tool prints where it does not know the GPU, or may not watch it
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")
# Tensors of their own allocations: inside one large block of torch's, nothing is out of bounds.
VARIABLES = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or in a CUDA toolkit in one of the usual places."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) for home in homes if home] + sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [str(folder / part) for folder in folders for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def run_operators(context: Context) -> Result:
    """Run the operators by themselves."""
    plain = context.children.run(python(*SMALLEST), context.seconds_left)
    return Result(DONE, True) if plain.reason is None else _unfinished(plain, "the operators by themselves: ")


def run_sanitizer(context: Context, tool: str) -> Result:
    """Run the operators by themselves, which compiles them, and then under ``tool``, where it is installed."""
    program = find_sanitizer()
    if program is None:
        return Result(NOT_THERE, True, reason="there is no compute-sanitizer on this machine (the CUDA toolkit has it)")
    plain = run_operators(context)
    if plain.outcome != DONE:
        return plain
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no", *python(*SMALLEST)]
    return result_of(context.children.run(command, context.seconds_left, VARIABLES))


def result_of(ended: Ended) -> Result:
    """What the tool found, or why it could not look."""
    summary = SUMMARY.findall(ended.output)
    if not ended.was_stopped and UNFIT in ended.output:
        reason = f"compute-sanitizer cannot watch this GPU ({UNFIT}); try on another machine"
        return Result(NOT_THERE, False, reason=reason)
    if ended.was_stopped or not summary:
        return _unfinished(ended, "")
    errors = sum(int(number) for pair in summary for number in pair if number)
    facts = {"summary": [line for line in ended.output.splitlines() if SUMMARY.search(line)]}
    if ended.status == 0 and errors == 0:
        return Result(DONE, True, {"found": 0}, facts=facts)
    # The report begins with the first finding; its end is only the summary.
    lines = [line for line in ended.output.splitlines() if line.startswith("=========")]
    reason = ended.reason or "" if errors == 0 else "\n".join(lines[:TAIL_LINES])
    return Result(FAILED, True, {"found": errors}, reason, facts)


def _unfinished(ended: Ended, where: str) -> Result:
    if ended.was_stopped:
        return Result(OUT_OF_TIME, False, reason=f"{where}{ended.reason}")
    return Result(FAILED, True, reason=f"{where}{ended.reason or 'the tool gave no summary'}")
