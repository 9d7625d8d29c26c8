"""Records of measurements: JSON lines that grow as they are measured, and the Markdown table of one.

    python -m benchmarks.records FILE.jsonl

A line with ``environment`` describes the machine, the versions and the commit that the lines after it belong to. Every
other line is a measurement with all its samples. A record that was cut short holds what was measured until then.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DEFAULT_RECORD = Path(".benchmarks/record.jsonl")
SIZES = ("model", "detail", "pixels", "batch", "dtype", "passes", "device")


def environment() -> dict[str, Any]:
    """Return what is measured on, and with what."""
    described = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if not torch.cuda.is_available():
        return described
    properties = torch.cuda.get_device_properties(0)
    return described | {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "second_level_cache_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "driver_and_clocks": _output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"
        ),
    }


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line in one write, so that processes may share the file; half a line before it stays by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        is_cut_short = False
        if size:
            file.seek(size - 1)
            is_cut_short = file.read(1) != b"\n"
        file.write(b"\n" * is_cut_short + json.dumps(line).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines of a record; none if there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # a run that was killed while writing leaves half a line
            continue
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Return the measurements of a record in Markdown, the latest of each, in the order they were first made."""
    latest = {line["test"]: line for line in lines if "info" in line}
    rows = [
        "| workload | candidate | median, ms | times the time of ours (quartiles) | roofline | peak, MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in latest.values():
        info = line["info"]
        cells = [line["group"] + ": " + ", ".join(str(info[name]) for name in SIZES if name in info)]
        cells += [info["candidate"], _milliseconds(info), _ratio(info)]
        cells.append(f"{info['roofline_share']:.0%}" if "roofline_share" in info else "")
        cells.append(f"{info['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in info else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _milliseconds(info: dict[str, Any]) -> str:
    return f"{1e3 * info['median_seconds']:.3f}" if "median_seconds" in info else ""


def _ratio(info: dict[str, Any]) -> str:
    if "ratio" not in info:
        return ""
    low, high = info["ratio_quartiles"]
    return f"{info['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    """Print the table of a record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="JSON lines")
    print(table(read_lines(parser.parse_args().record)))


if __name__ == "__main__":
    main()
