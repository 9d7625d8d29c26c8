"""Records as tables in Markdown: of ``make benchmark`` (pytest-benchmark's JSON), and of JSON lines."""

from collections.abc import Callable, Iterable
from typing import Any

from .kernel_shares import profile_table
from .networks import OURS

MILLISECONDS = 1e3
MICROSECONDS = 1e6
MEBIBYTE = 2**20
OPERATOR = "operator"
OWN = (OPERATOR, OURS)  # what the others are compared with
# What the plain table has in columns or words of their own.
SHOWN = ("pixels", "batch", "dropout_p", "median_seconds", "ratio", "calls_a_sample", "tokens", "heads", "threads")
BASELINES = ("reference compiled", "sdpa", "reference", "composed")


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
            f"| {_milliseconds(notes['baseline_median'])} | {_milliseconds(bench['stats']['median'])} "
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


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * MILLISECONDS
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.1f}"


def machine(record: dict[str, Any]) -> str:
    """The processor, threads and versions of a record, in one line."""
    threads = {bench["extra_info"]["threads"] for bench in record["benchmarks"] if "threads" in bench["extra_info"]}
    versions = {bench["extra_info"]["torch"] for bench in record["benchmarks"] if "torch" in bench["extra_info"]}
    processor = record["machine_info"].get("cpu", {}).get("brand_raw", "unknown processor")
    return f"{processor}, {', '.join(map(str, sorted(threads)))} threads, torch {', '.join(sorted(versions))}, float32"


def _workload(bench: dict[str, Any]) -> str:
    width = bench["extra_info"].get("base_channels")
    return bench["group"] if width is None else f"{bench['group']}, {width} base channels"


def device_report(lines: list[dict[str, Any]]) -> str:
    """Tables of a record of JSON lines: the machine, one table a group, memory, targets, and what was not measured.

    Of a test that was measured more than once, the latest counts.
    """
    environments = [line["environment"] for line in lines if "environment" in line]
    tests = {line["test"]: line for line in lines if line.get("outcome") == "measured"}
    unmeasured = {line["test"]: line for line in lines if line.get("outcome") in ("failed", "skipped")}
    parts = [_device(environment) for environment in environments[-1:]]
    for group in dict.fromkeys(line["group"] for line in tests.values()):
        infos = [line["info"] for line in tests.values() if line["group"] == group]
        parts.append(f"### {group}\n\n{_table_of(infos)(infos)}")
    if any("target" in line["info"] for line in tests.values()):
        parts.append("### Targets\n\n" + target_table(tests.values()))
    missing = [line for name, line in unmeasured.items() if name not in tests]
    if missing:
        parts.append("### Not measured\n\n" + _missing_table(missing))
    return "\n\n".join(parts)


def _table_of(infos: list[dict[str, Any]]) -> Callable[[list[dict[str, Any]]], str]:
    """How to show a group, by what is known of all that is in it."""

    def is_known(*names: str) -> bool:
        return all(name in info for info in infos for name in names)

    if is_known("profile", "launches", "model", "backend", "dtype", "pixels"):
        return _profiles
    if is_known("peak_bytes", "candidate", "pixels"):
        return _memory_table
    if is_known("times_baseline", "times_baseline_quartiles", "least_seconds", "candidate", "pixels"):
        return _baseline_table
    if is_known("candidate", "gflop", "gigabytes", "median_seconds", "pixels"):
        return _race_table
    if is_known("model", "candidate", "median_seconds", "pixels"):
        return _network_table
    return _plain_table


def _profiles(infos: list[dict[str, Any]]) -> str:
    """One table a profiled step."""
    return "\n\n".join(
        f"{workload_of(info)}, {info.get('variant') or info['backend']}\n\n{profile_table(info)}" for info in infos
    )


def _plain_table(infos: list[dict[str, Any]]) -> str:
    """One row a test: its time, its ratio to what it raced against, and every other number that it noted."""
    names = list(dict.fromkeys(name for info in infos for name, value in info.items() if _is_number(value)))
    extra = [name for name in names if name not in SHOWN]
    head = ["what", "ms", "ratio (quartiles)", *(name.replace("_", " ") for name in extra)]
    rows = [head, ["---"] * len(head)]
    for info in infos:
        words = [str(info[name]) for name in ("candidate", "variant", "passes", "mode") if name in info]
        what = ", ".join([*words, *([workload_of(info)] if "pixels" in info else [])])
        seconds = f"{info['median_seconds'] * MILLISECONDS:.3f}" if "median_seconds" in info else "-"
        numbers = [f"{info[name]:.4g}" if _is_number(info.get(name)) else "-" for name in extra]
        rows.append([what, seconds, ratio_of(info), *numbers])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def ratio_of(info: dict[str, Any]) -> str:
    """How many times as fast ours is: median of pairs and its quartiles."""
    if "ratio" not in info:
        return "-"
    spread = info.get("ratio_quartiles")
    return f"{info['ratio']:.2f}x" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")


def _baseline_table(infos: list[dict[str, Any]]) -> str:
    """One row a candidate: its time, as a multiple of the baseline's and of the least at the bandwidth of a copy."""
    rows = ["| workload | candidate | ms | times the baseline | times the least |", "| --- | --- | --- | --- | --- |"]
    for info in infos:
        low, high = info["times_baseline_quartiles"]
        least = info["median_seconds"] / info["least_seconds"]
        rows.append(
            f"| {workload_of(info)} | {info['candidate']} | {info['median_seconds'] * MILLISECONDS:.2f} "
            f"| {info['times_baseline']:.2f} ({low:.2f} to {high:.2f}) | {least:.1f} |"
        )
    return "\n".join(rows)


def _race_table(infos: list[dict[str, Any]]) -> str:
    """One row a workload: the operator's time, work and roofline, then every other candidate's time and ratio."""
    by_workload: dict[str, dict[str, dict[str, Any]]] = {}
    for info in infos:
        by_workload.setdefault(workload_of(info), {})[info["candidate"]] = info
    present = [name for name in BASELINES if any(name in candidates for candidates in by_workload.values())]
    head = ["workload", "operator, µs (cold / warm)", "GFLOP", "GB", "% of roofline", "noise of pairs", *present]
    rows = [head, ["---"] * len(head)]
    for workload, candidates in by_workload.items():
        own = candidates.get(OPERATOR)
        work = own or next(iter(candidates.values()))
        row = [workload, _times(own), f"{work['gflop']:.1f}", f"{work['gigabytes']:.3f}", _fraction(own), _spread(own)]
        rows.append(row + [_against(candidates.get(name)) for name in present])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _network_table(infos: list[dict[str, Any]]) -> str:
    """One row a workload: the time of ours and the noise of its pairs, then every other candidate's time and ratio."""
    by_workload: dict[str, dict[str, dict[str, Any]]] = {}
    for info in infos:
        by_workload.setdefault(workload_of(info), {})[info["candidate"]] = info
    others = [name for name in dict.fromkeys(info["candidate"] for info in infos) if name != OURS]
    head = ["workload", "ours, ms", "noise of pairs", *(f"{name}, ms" for name in others)]
    rows = [head, ["---"] * len(head)]
    for workload, candidates in by_workload.items():
        own = candidates.get(OURS)
        row = [workload, "-" if own is None else f"{own['median_seconds'] * MILLISECONDS:.3f}", _spread(own)]
        for name in others:
            info = candidates.get(name)
            row.append("-" if info is None else f"{info['median_seconds'] * MILLISECONDS:.3f}, {ratio_of(info)}")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _memory_table(infos: list[dict[str, Any]]) -> str:
    """One row a workload: peak of a forward and a backward pass, for each candidate."""
    candidates = list(dict.fromkeys(info["candidate"] for info in infos))
    rows = [["workload", *(f"{name}, MiB" for name in candidates)], ["---"] * (len(candidates) + 1)]
    for workload in dict.fromkeys(workload_of(info) for info in infos):
        peaks = {info["candidate"]: info["peak_bytes"] for info in infos if workload_of(info) == workload}
        rows.append([workload, *(f"{peaks[name] / MEBIBYTE:.0f}" if name in peaks else "-" for name in candidates)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def target_table(tests: Iterable[dict[str, Any]]) -> str:
    rows = ["| group | workload | of | target | value | met |", "| --- | --- | --- | --- | --- | --- |"]
    for line in tests:
        info = line["info"]
        if "target" in info:
            of = {"peak memory": "share of the reference"}.get(line["group"], "share of the roofline")
            of = of if info.get("candidate", OPERATOR) in OWN else f"times as fast as {info['candidate']}"
            of = info.get("target_of", of)
            verdict = "yes" if info["met"] else f"**no**, {info['target_value'] / info['target'] - 1:+.0%}"
            numbers = f"{info['target']:.2f} | {info['target_value']:.2f}"
            rows.append(f"| {line['group']} | {workload_of(info)} | {of} | {numbers} | {verdict} |")
    return "\n".join(rows)


def _missing_table(lines: list[dict[str, Any]]) -> str:
    counted: dict[tuple[str, str], int] = {}
    for line in lines:
        # The last line of a traceback names the error.
        reason = line["reason"].strip().splitlines()[-1] if line["reason"].strip() else ""
        place = line["test"] if line["outcome"] == "failed" else line["test"].partition("[")[0]
        key = (f"{place}: {line['outcome']}", reason if line["outcome"] == "failed" else "out of time or not there")
        counted[key] = counted.get(key, 0) + 1
    rows = ["| tests | number | reason |", "| --- | --- | --- |"]
    return "\n".join([*rows, *(f"| {what} | {number} | {why} |" for (what, why), number in counted.items())])


def _device(environment: dict[str, Any]) -> str:
    ceilings = [
        f"{name.replace('_', ' ')}: {ceiling['bandwidth'] / 1e12:.2f} TB/s, "
        + ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in ceiling["flop_rates"].items())
        + f" ({ceiling['source']})"
        for name, ceiling in environment.items()
        if name.endswith("_ceilings")
    ]
    versions = f"torch {environment['torch']}, triton {environment['triton']}, CUDA {environment['cuda']}"
    return "\n\n".join([f"{environment['device']}, {versions}, {environment['time']}", *ceilings])


def workload_of(info: dict[str, Any]) -> str:
    """What a test worked on, in words. Candidates of a network differ in dtype, so that it is not named there."""
    sizes = f"{info.get('batch', '?')} x {info['pixels']}²"
    detail = f", {info['detail']}" if "detail" in info else ""
    if "model" in info:
        return f"{info['model']}, {info.get('base_channels', '?')} base channels, {sizes}{detail}"
    dropout = f", dropout {info['dropout_p']:g}" if info.get("dropout_p") else ""
    return f"{sizes}, {info.get('dtype', '?')}{dropout}{detail}"


def _times(info: dict[str, Any] | None) -> str:
    if info is None:
        return "-"
    warm = info.get("warm_median_seconds")
    cold = f"{info['median_seconds'] * MICROSECONDS:.1f}"
    return cold if warm is None else f"{cold} / {warm * MICROSECONDS:.1f}"


def _fraction(info: dict[str, Any] | None) -> str:
    if info is None or "roofline_fraction" not in info:
        return "-"
    return f"{info['roofline_fraction']:.0%} ({info['bound']})"


def _spread(info: dict[str, Any] | None) -> str:
    return "-" if info is None or "ratio" not in info else "{:.3f} to {:.3f}".format(*info["ratio_quartiles"])


def _against(info: dict[str, Any] | None) -> str:
    if info is None:
        return "-"
    time = f"{info['median_seconds'] * MICROSECONDS:.1f} µs"
    if "ratio" not in info:
        return time
    low, high = info["ratio_quartiles"]
    variant = f" [{info['variant']}]" if info["candidate"] == "sdpa" else ""
    return f"{time}, {info['ratio']:.2f}x ({low:.2f} to {high:.2f}){variant}"
