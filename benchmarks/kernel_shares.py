"""What the profiler saw of a step: kernels by their share of its time, and how many are launched."""

import re
from collections.abc import Iterable
from typing import Any

import torch

MOST_KERNELS = 40
NAME_LENGTH = 160  # templates of C++ kernels go on for thousands of characters
NOT_KERNELS = ("Memcpy", "Memset")
HOST_LAUNCH = re.compile(r"cuda(Graph)?Launch|cu(Graph)?Launch")  # calls of the runtime, and of the driver by Triton
MICROSECONDS = 1e6


def shares(events: Iterable[Any], on_gpu: bool, steps: int) -> dict[str, Any]:
    """Of one step: kernels, copies and fills, what the host launched, seconds of all, the longest by name, their share.

    ``events`` are averages by name over ``steps`` steps; on a GPU those of the host count as launches at most. Kernels
    of a CUDA graph count one by one, and its replay is one launch of the host.
    """
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    named: dict[str, list[float]] = {}
    launches = copies = host_launches = 0.0
    for event in events:
        if event.device_type != wanted and HOST_LAUNCH.match(event.key):
            host_launches += event.count / steps
        # Ranges that something marked (the optimizer's step) hold kernels that are counted by themselves.
        if event.device_type != wanted or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        calls = event.count / steps
        if event.key.startswith(NOT_KERNELS):
            copies += calls
        else:
            launches += calls
        entry = named.setdefault(event.key[:NAME_LENGTH], [0.0, 0.0])
        entry[0] += microseconds / MICROSECONDS / steps
        entry[1] += calls
    total = sum(seconds for seconds, _ in named.values())
    longest = sorted(named.items(), key=lambda item: item[1][0], reverse=True)[:MOST_KERNELS]
    return {
        "launches": launches,
        "copies": copies,
        "host_launches": host_launches,
        "kernel_seconds": total,
        "profile": [
            {"kernel": name, "calls": calls, "seconds": seconds, "share": seconds / total if total else 0.0}
            for name, (seconds, calls) in longest
        ],
    }


def profile_table(info: dict[str, Any], most: int = 15) -> str:
    """The longest kernels of a profiled step, in Markdown."""
    step, busy = info["median_seconds"] * 1e3, info["kernel_seconds"] * 1e3
    what = "kernels" if info["device"].startswith("cuda") else "operators"
    by_host = f", by {info['host_launches']:.0f} launches of the host" if what == "kernels" else ""
    rows = [
        f"{info['launches']:.0f} {what}, {info['copies']:.0f} copies and fills a step{by_host}; "
        f"{step:.2f} ms a step, {busy:.2f} ms of it in {what}",
        "",
        f"| share | ms | calls | {what.removesuffix('s')} |",
        "| ---: | ---: | ---: | --- |",
    ]
    for entry in info["profile"][:most]:
        name = entry["kernel"].replace("|", "\\|")
        rows.append(f"| {entry['share']:.1%} | {entry['seconds'] * 1e3:.3f} | {entry['calls']:.0f} | `{name}` |")
    return "\n".join(rows)
