"""A record of ``make benchmark`` as Markdown: ``python -m benchmarks.report benchmarks/results/NAME.json``."""

import json
import sys
from pathlib import Path
from typing import Any

MILLISECONDS = 1e3


def table(record: dict[str, Any]) -> str:
    """Medians and paired ratios of a pytest-benchmark record, one row a race, then the memory rows."""
    races = [bench for bench in record["benchmarks"] if "ratio" in bench["extra_info"]]
    memories = [bench for bench in record["benchmarks"] if "peak_mib" in bench["extra_info"]]
    lines = [
        "| what | images | reference, ms | composed, ms | ratio (median of pairs) | range |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for bench in races:
        notes = bench["extra_info"]
        low, high = notes["ratio_range"]
        lines.append(
            f"| {_workload(bench)} | {notes['batch']} x {notes['pixels']}² "
            f"| {notes['baseline_median'] * MILLISECONDS:.0f} | {bench['stats']['median'] * MILLISECONDS:.0f} "
            f"| {notes['ratio']:.2f} | {low:.2f} to {high:.2f} |"
        )
    if memories:
        lines += ["", "| peak memory | images | reference, MiB | composed, MiB |", "| --- | --- | --- | --- |"]
    for bench in memories:
        notes = bench["extra_info"]
        lines.append(
            f"| training step, {notes['base_channels']} base channels | {notes['batch']} x {notes['pixels']}² "
            f"| {notes['reference_peak_mib']:.0f} | {notes['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def machine(record: dict[str, Any]) -> str:
    """The processor, threads and versions of a record, in one line."""
    threads = {bench["extra_info"]["threads"] for bench in record["benchmarks"] if "threads" in bench["extra_info"]}
    versions = {bench["extra_info"]["torch"] for bench in record["benchmarks"] if "torch" in bench["extra_info"]}
    processor = record["machine_info"].get("cpu", {}).get("brand_raw", "unknown processor")
    return f"{processor}, {', '.join(map(str, sorted(threads)))} threads, torch {', '.join(sorted(versions))}, float32"


def _workload(bench: dict[str, Any]) -> str:
    width = bench["extra_info"].get("base_channels")
    return bench["group"] if width is None else f"{bench['group']}, {width} base channels"


def main() -> None:
    """Print the table of each record named on the command line."""
    for path in sys.argv[1:]:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        print(machine(record), table(record), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
