"""Where the time of a training step goes: kernels by their share, and how many are launched.

    python -m benchmarks.profile_step --model uctransnet --batch 4

The step is plain: forward under autocast, published loss, backward, fused Adam, on random images. Its time is taken
without the profiler. On a CPU, operators stand where kernels do.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

import uctrans
from uctrans.training.losses import segmentation_loss

WARMUP_STEPS = 3
TIMED_STEPS = 10
PROFILED_STEPS = 2
MOST_KERNELS = 40
NAME_LENGTH = 160  # templates of C++ kernels go on for thousands of characters
NOT_KERNELS = ("Memcpy", "Memset")
MICROSECONDS = 1e6


@dataclass(frozen=True)
class StepProblem:
    """A training step of a network of the registry."""

    model: str
    batch: int
    backend: str = "auto"
    pixels: int = 224
    base_channels: int = 64
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        sizes = {"model": self.model, "base_channels": self.base_channels, "backend": self.backend}
        sizes |= {"pixels": self.pixels, "batch": self.batch, "device": self.device}
        return sizes | {"dtype": str(self.dtype).removeprefix("torch.")}

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model}-{self.backend}-{dtype}-{self.pixels}px-B{self.batch}"


def training_step(problem: StepProblem) -> Callable[[], None]:
    """One step on the same random images and masks, as often as it is called."""
    torch.manual_seed(0)
    sizes = {"base_channels": problem.base_channels, "image_size": problem.pixels, "backend": problem.backend}
    model = uctrans.create_model(problem.model, **sizes).train()
    model.to(problem.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    shape = (problem.batch, 3, problem.pixels, problem.pixels)
    images = torch.randn(shape, device=problem.device).contiguous(memory_format=torch.channels_last)
    masks = torch.randint(2, (problem.batch, problem.pixels, problem.pixels), device=problem.device)
    device_type = torch.device(problem.device).type

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, problem.dtype, enabled=problem.dtype != torch.float32):
            logits = model(images)
        segmentation_loss(logits, masks).backward()
        optimizer.step()

    return step


def profiled(problem: StepProblem) -> tuple[dict[str, Any], list[float]]:
    """What a step consists of (see :func:`shares`), and the seconds that each timed step took."""
    step = training_step(problem)
    synchronise = torch.cuda.synchronize if problem.device.startswith("cuda") else lambda: None
    for _ in range(WARMUP_STEPS):
        step()
    seconds = []
    for _ in range(TIMED_STEPS):
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        seconds.append(time.perf_counter() - start)
    kind = torch.profiler.ProfilerActivity.CUDA if problem.device.startswith("cuda") else None
    with torch.profiler.profile(activities=[kind or torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED_STEPS):
            step()
        synchronise()
    found = shares(profile.key_averages(), on_gpu=kind is not None)
    return found | {"median_seconds": statistics.median(seconds)}, seconds


def shares(events: Iterable[Any], on_gpu: bool) -> dict[str, Any]:
    """Of one step: launches of kernels, copies and fills, seconds of all, and the longest by name with their share.

    ``events`` are averages by name over ``PROFILED_STEPS`` steps; on a GPU those of the host are left out.
    """
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    named: dict[str, list[float]] = {}
    launches = copies = 0.0
    for event in events:
        # Ranges that something marked (the optimizer's step) hold kernels that are counted by themselves.
        if event.device_type != wanted or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        calls = event.count / PROFILED_STEPS
        if event.key.startswith(NOT_KERNELS):
            copies += calls
        else:
            launches += calls
        entry = named.setdefault(event.key[:NAME_LENGTH], [0.0, 0.0])
        entry[0] += microseconds / MICROSECONDS / PROFILED_STEPS
        entry[1] += calls
    total = sum(seconds for seconds, _ in named.values())
    longest = sorted(named.items(), key=lambda item: item[1][0], reverse=True)[:MOST_KERNELS]
    return {
        "launches": launches,
        "copies": copies,
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
    rows = [
        f"{info['launches']:.0f} {what}, {info['copies']:.0f} copies and fills a step; "
        f"{step:.2f} ms a step, {busy:.2f} ms of it in {what}",
        "",
        f"| share | ms | calls | {what.removesuffix('s')} |",
        "| ---: | ---: | ---: | --- |",
    ]
    for entry in info["profile"][:most]:
        name = entry["kernel"].replace("|", "\\|")
        rows.append(f"| {entry['share']:.1%} | {entry['seconds'] * 1e3:.3f} | {entry['calls']:.0f} | `{name}` |")
    return "\n".join(rows)


def main() -> None:
    """Print the profile of one step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="uctransnet", choices=uctrans.list_models())
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    problem = StepProblem(**vars(parser.parse_args()))
    info, _ = profiled(problem)
    print(f"{problem}\n\n{profile_table(problem.as_json() | info)}")


if __name__ == "__main__":
    main()
