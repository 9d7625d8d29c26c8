"""README's blocks of results, and their pictures, from records of a CPU and of a GPU."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plots import Speedup, draw_roofline, draw_scaling, draw_speedups, scales
from .race import quartiles
from .tables import OPERATOR, OWN, machine, ratio_of, target_table, workload_of

LINE_LENGTH = 120
FIGURES = "docs/figures"
PAGE = "evidence.md"
RECORDED_PARTS = ("benchmarks", "profile")  # of evidence; the others are tests
NETWORK_GROUPS = ("attention block", "network")
GATE_GROUP = "skip gate"
GATE_PASSES = {"forward": "forward", "both": "with backward"}
LAYOUTS = ("contiguous", "channels-last")
MODES = ("inference", "training")
TITLES = {
    "speedup-gpu": "Times as fast, with quartiles",
    "roofline-gpu": "Roofline",
    "scaling-gpu": "Time over image size and batch",
}


@dataclass(frozen=True)
class Found:
    """A record: where it is, when it was made, and what it holds."""

    path: Path
    time: str
    content: dict[str, Any]


def cpu_block(records: Sequence[Found], root: Path) -> str:
    """Tables of attention block, networks, memory and skip gate."""
    parts = []
    chosen = newest_with(records, NETWORK_GROUPS)
    if chosen is not None:
        parts += [_wrapped(_machine_of(chosen, root)), _network_table(chosen.content), _memory(chosen.content)]
        parts.append(f"![Times as fast, with quartiles]({FIGURES}/speedup-cpu.svg)")
    gate = newest_with(records, (GATE_GROUP,))
    if gate is not None:
        what = "`skip_gate` with its tokens and its concatenation; scale 0 is the finest."
        parts += [_wrapped(f"{what} {_machine_of(gate, root)}"), _gate_table(gate.content)]
    return "\n\n".join(filter(None, parts))


def newest_with(records: Sequence[Found], groups: tuple[str, ...]) -> Found | None:
    """The newest record with a race of a group whose name begins so."""
    with_it = [record for record in records if any(True for _ in _races(record.content, groups))]
    return with_it[-1] if with_it else None


def draw_cpu(records: Sequence[Found], root: Path) -> list[Path]:
    """The bars of the races of attention block and networks."""
    chosen = newest_with(records, NETWORK_GROUPS)
    if chosen is None:
        return []
    bars = []
    for bench in _races(chosen.content, NETWORK_GROUPS):
        info = bench["extra_info"]
        pairs = zip(info["baseline_seconds"], bench["stats"]["data"], strict=True)
        spread = quartiles([slow / fast for slow, fast in pairs])
        what = f"{_named(bench)}, {info['batch']} x {info['pixels']}², {info['mode']}"
        bars.append(Speedup(what, "reference", info["ratio"], tuple(spread)))
    path = root / FIGURES / "speedup-cpu.svg"
    draw_speedups(bars, "composed on a CPU", path)
    return [path]


def draw_gpu(record: Found, root: Path) -> list[Path]:
    """Bars, roofline and scaling, each where the record has what it shows."""
    about = record.content["environment"]
    lines = list(_measured(record.content).values())
    infos = [line["info"] for line in lines]
    bars = []
    for line in lines:
        info = line["info"]
        if _is_headline(info) and info["candidate"] not in OWN:
            what, spread = f"{line['group']}: {workload_of(info)}", tuple(info["ratio_quartiles"])
            bars.append(Speedup(what, info["candidate"], info["ratio"], spread))
    written = []
    if bars:
        written.append(root / FIGURES / "speedup-gpu.svg")
        draw_speedups(bars, f"On an {about['device']}", written[-1])
    own = [info for info in infos if info.get("candidate") == OPERATOR and "tflop_per_second" in info]
    ceilings = about.get("measured_ceilings") or about.get("known_ceilings")
    if own and ceilings:
        written.append(root / FIGURES / "roofline-gpu.svg")
        draw_roofline(own, ceilings, f"Operators on an {about['device']} ({ceilings['source']})", written[-1])
    both = [info for info in infos if info.get("passes") == "both" and _is_plain(info) and "median_seconds" in info]
    if scales(both):
        written.append(root / FIGURES / "scaling-gpu.svg")
        draw_scaling(both, f"Channel attention, forward and backward, on an {about['device']}", written[-1])
    return written


def gpu_block(record: Found, pictures: Sequence[Path], root: Path) -> str:
    """What ran, the races that claims are made of, their targets, and the pictures."""
    content, about = record.content, record.content["environment"]
    place = record.path.relative_to(root).as_posix()
    page = record.path.with_name(PAGE)
    link = f"[all of it]({page.relative_to(root).as_posix()})" if page.exists() else f"[{place}]({place})"
    versions = f"torch {about['torch']}, triton {about['triton']}, CUDA {about['cuda']}"
    commit = f" at commit {about['commit'][:7]}" if about.get("commit") else ""
    parts = [_wrapped(f"On an {about['device']}, {versions}, {about['time'][:10]}{commit}; {link}.")]
    counted = Counter(line["outcome"] for line in content["tests"] if line["part"] not in RECORDED_PARTS)
    if counted:
        parts.append("Tests on it: " + ", ".join(f"{number} {what}" for what, number in counted.items()) + ".")
    lines = list(_measured(content).values())
    for is_network in (True, False):
        parts.append(_headline_table([line for line in lines if ("model" in line["info"]) == is_network]))
    if any("target" in line["info"] for line in lines):
        parts.append(target_table(lines))
    parts += [f"![{TITLES[path.stem]}]({path.relative_to(root).as_posix()})" for path in pictures]
    return "\n\n".join(filter(None, parts))


def _headline_table(tests: Sequence[dict[str, Any]]) -> str:
    """One row a race that a claim is made of: the time of ours, and how many times as fast it is as each other."""
    chosen = [(line["group"], line["info"]) for line in tests if _is_headline(line["info"])]
    opponents = list(dict.fromkeys(info["candidate"] for _, info in chosen if info["candidate"] not in OWN))
    if not opponents:
        return ""
    head = ["what", "images", "ours, ms", *(f"against {name}" for name in opponents)]
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for group, info in chosen:
        rows.setdefault((group, workload_of(info)), {})[info["candidate"]] = info
    lines = [head, ["---"] * len(head)]
    for (group, workload), candidates in rows.items():
        own = [info["median_seconds"] for name, info in candidates.items() if name in OWN]
        own += [info["operator_median_seconds"] for info in candidates.values() if "operator_median_seconds" in info]
        cells = [group, workload, f"{own[0] * 1e3:.3f}" if own else "-"]
        for name in opponents:
            cells.append(ratio_of(candidates[name]) if name in candidates else "-")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _is_headline(info: dict[str, Any]) -> bool:
    """Whether a claim is made of it: half precision at the published size, or a whole network."""
    if not {"candidate", "median_seconds", "pixels", "ratio_quartiles"} <= set(info):
        return False
    return "model" in info or (info["pixels"] == 224 and info.get("dtype") == "bfloat16" and not info.get("dropout_p"))


def _is_plain(info: dict[str, Any]) -> bool:
    """Whether it is channel attention in half precision without dropout: what is measured at all sizes."""
    return info.get("dtype") == "bfloat16" and info.get("dropout_p") == 0 and "heads" in info and "detail" not in info


def _measured(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The last measurement of each benchmark."""
    return {line["test"]: line for line in content["benchmarks"] if line.get("outcome") == "measured"}


def _races(record: dict[str, Any], groups: tuple[str, ...]) -> list[dict[str, Any]]:
    benches = [bench for bench in record["benchmarks"] if "ratio" in bench["extra_info"]]
    return [bench for bench in benches if bench["group"].startswith(groups)]


def _machine_of(record: Found, root: Path) -> str:
    place = record.path.relative_to(root).as_posix()
    commit = record.content.get("commit_info", {}).get("id") or "not known"
    return (
        f"{machine(record.content)}, in turns: the median of the ratios of pairs ([{record.path.name}]({place}), "
        f"`make benchmark` at commit {commit[:7]}, {record.time[:10]})."
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, LINE_LENGTH, break_long_words=False, break_on_hyphens=False)


def _named(bench: dict[str, Any]) -> str:
    width = bench["extra_info"].get("base_channels")
    return "attention block with its projections" if width is None else f"UCTransNet, {width} base channels"


def _network_table(record: dict[str, Any]) -> str:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for bench in _races(record, NETWORK_GROUPS):
        info = bench["extra_info"]
        low, high = info["ratio_range"]
        row = cells.setdefault((_named(bench), f"{info['batch']} x {info['pixels']}²"), {})
        row[info["mode"]] = f"{info['ratio']:.2f}x ({low:.2f} to {high:.2f})"
    rows = [
        "| `composed` against `reference` (range) | images | inference | training step |",
        "| --- | --- | --- | --- |",
    ]
    for (what, images), row in cells.items():
        rows.append(f"| {what} | {images} | {' | '.join(row.get(mode, '-') for mode in MODES)} |")
    return "\n".join(rows)


def _memory(record: dict[str, Any]) -> str:
    rows = ["| peak memory of a training step | images | reference, MiB | composed, MiB |", "| --- | --- | --- | --- |"]
    for bench in record["benchmarks"]:
        info = bench["extra_info"]
        if "peak_mib" in info:
            images = f"{info['batch']} x {info['pixels']}²"
            rows.append(f"| {_named(bench)} | {images} | {info['reference_peak_mib']:.0f} | {info['peak_mib']:.0f} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _gate_table(record: dict[str, Any]) -> str:
    """One row a size of images and scale: the ratios of both layouts, forward, and forward and backward."""
    ratios: dict[tuple[int, int, int], dict[tuple[str, str], float]] = {}
    for bench in _races(record, (GATE_GROUP,)):
        info = bench["extra_info"]
        if "layout" in info:
            row = ratios.setdefault((info["pixels"], info["batch"], info["scale"]), {})
            row[info["passes"], info["layout"]] = info["ratio"]
    columns = [(passes, layout) for passes in GATE_PASSES for layout in LAYOUTS]
    titles = [f"{GATE_PASSES[passes]}, {layout}" for passes, layout in columns]
    rows = [f"| `composed` against `reference` | {' | '.join(titles)} |", f"| --- {'| ---: ' * len(columns)}|"]
    for (pixels, batch, scale), row in sorted(ratios.items()):
        cells = [f"{row[column]:.2f}" if column in row else "-" for column in columns]
        rows.append(f"| {batch} x {pixels}², scale {scale} | {' | '.join(cells)} |")
    return "\n".join(rows)
