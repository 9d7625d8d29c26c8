"""Records as tables and pictures.

    python -m benchmarks.report                     the newest records: README's tables, and docs/figures/
    python -m benchmarks.report FILE ...            print the tables of each record

A record is ``make benchmark``'s (``.json``), ``make benchmark-gpu``'s (``.jsonl``), or the ``evidence.json`` of ``make
gpu``. Of a CPU, each group of benchmarks is taken from the newest record that has it; of a GPU, all from the newest.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from uctrans.writing import written_atomically

from .readme_blocks import Found, cpu_block, draw_cpu, draw_gpu, gpu_block
from .records import read_lines
from .tables import device_report, machine, table

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
README = "README.md"
CPU, GPU = "results:cpu", "results:gpu"


class ReportError(Exception):
    """There is nothing to report, or no place for it; the message says what would help."""


def main(words: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Print the records named, or bring README and figures up to date; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    for path in map(Path, words):
        print(printed(path), end="\n\n")
    if words:
        return 0
    try:
        written = update(root)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in written))
    return 0


def printed(path: Path) -> str:
    """The tables of one record."""
    if path.suffix == ".jsonl":
        return device_report(read_lines(path))
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("what") == "evidence":
        return device_report(record["benchmarks"])
    return f"{machine(record)}\n\n{table(record)}"


def update(root: Path) -> list[Path]:
    """Write README's tables from the newest records, and the pictures; returns the files that were written.

    Raises:
        ReportError: there is no record, or README has no place for one.
    """
    on_cpu, on_gpu = find_records(root / RESULTS)
    if not on_cpu and not on_gpu:
        raise ReportError(f"{root / RESULTS} has no record; make benchmark or make gpu takes one")
    blocks = {}
    pictures: list[Path] = []
    if on_cpu:
        pictures += draw_cpu(on_cpu, root)
        blocks[CPU] = cpu_block(on_cpu, root)
    if on_gpu:
        drawn = draw_gpu(on_gpu[-1], root)
        blocks[GPU] = gpu_block(on_gpu[-1], drawn, root)
        pictures += drawn
    readme = root / README
    text = readme.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = replace_block(text, name, block)
    with written_atomically(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [readme, *pictures]


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between the comments that mark its place."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ReportError(f"{README} needs one place for the results: the lines {start} and {end}")
    return pattern.sub(lambda _: f"{start}\n{block}\n{end}", text)


def find_records(folder: Path) -> tuple[list[Found], list[Found]]:
    """Records of CPUs and of GPUs, the oldest first; dry runs are none."""
    on_cpu, on_gpu = [], []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("*/evidence.json")]):
        if path.suffix == ".jsonl":
            lines = read_lines(path)
            about = next((line["environment"] for line in reversed(lines) if "environment" in line), {})
            content = {"environment": about, "parts": {}, "tests": [], "benchmarks": lines}
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("dry_run"):
            continue
        if "machine_info" in content:
            on_cpu.append(Found(path, content["datetime"], content))
        elif content.get("environment", {}).get("cuda") and "capability" in content["environment"]:
            on_gpu.append(Found(path, content["environment"]["time"], content))
    return tuple(sorted(found, key=lambda record: record.time) for found in (on_cpu, on_gpu))


if __name__ == "__main__":
    sys.exit(main())
