"""Seconds a call of a forward pass, a backward pass, or both: CUDA graphs on a GPU, plain calls on a CPU.

On a GPU one sample is one replay of a graph that holds several calls, each on inputs of its own, between two events and
with one synchronisation. Together the inputs of a cold sample are several times the second-level cache, so that no call
finds its inputs there; in a warm sample all calls share one set. Launch overhead is no part of it, for any candidate.

A backward pass is captured by itself, over the saved tensors of a forward graph that is replayed right before it,
outside the timed region.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "backward", "both")
CACHE_MULTIPLE = 3  # bytes that the calls of a cold sample touch, in sizes of the second-level cache
FEWEST_CALLS = 2
MOST_CALLS = 64
MOST_KERNELS = 16
KERNEL_NAME_LENGTH = 120
WARMUP_CALLS = 3
# Keeps the GPU busy while the replay is submitted, about two milliseconds: the first event then waits for no launch.
COVER_CYCLES = 4_000_000


class Sample:
    """Runs the calls once and returns the seconds that one of them took; ``results`` are those of the first call."""

    def __init__(self, run: Callable[[], float], results: Sequence[tuple[Tensor, ...]]):
        self._run = run
        self._results = results  # a graph writes to them: they live as long as it does

    def __call__(self) -> float:
        """Run the calls."""
        return self._run()

    @property
    def results(self) -> tuple[Tensor, ...]:
        """The output, the gradients, or both, of the first call, as of the latest sample."""
        return self._results[0]


@dataclass(frozen=True)
class Call:
    """One call to be timed: what is passed, what gradients are taken by, and the gradient of each output."""

    arguments: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    output_gradient: Tensor | tuple[Tensor, ...]


def calls_a_sample(bytes_a_call: float, device: str) -> int:
    """How many calls a sample needs for its inputs to be cold; 1 on a CPU, where a sample is a single call."""
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(FEWEST_CALLS, math.ceil(CACHE_MULTIPLE * cache / bytes_a_call)), MOST_CALLS)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a function with one output or several returned, as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def sampler(function: Callable[..., Tensor], passes: str, calls: Sequence[Call]) -> Sample:
    """What runs and times ``passes`` (one of :data:`PASSES`) of ``function`` on each of ``calls``."""
    if passes not in PASSES:
        raise ValueError(f"passes must be one of {', '.join(PASSES)}; got {passes!r}")
    on_gpu = as_tuple(calls[0].output_gradient)[0].is_cuda
    return (_graphed_sampler if on_gpu else _eager_sampler)(function, passes, calls)


def run_pass(function: Callable[..., Tensor], passes: str, call: Call) -> tuple[Tensor, ...]:
    """The outputs, and unless ``passes`` is forward, the gradient by every leaf."""
    if passes == "forward":
        with torch.no_grad():
            return as_tuple(function(*call.arguments))
    outputs = as_tuple(function(*call.arguments))
    return (*(output.detach() for output in outputs), *_gradients(outputs, call))


def peak_bytes(function: Callable[..., Tensor], call: Call) -> int:
    """Peak of device memory in one forward and backward pass, above what was there before; no graph is involved."""
    run_pass(function, "both", call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run_pass(function, "both", call)
    torch.cuda.synchronize()
    del results
    return torch.cuda.max_memory_allocated() - before


def kernels(function: Callable[..., Tensor], passes: str, call: Call) -> dict[str, float]:
    """Microseconds of GPU time by kernel name, the longest first, in one plain call: what really ran, and where.

    Of a backward pass the forward pass before it is included.
    """
    run_pass(function, passes, call)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_pass(function, passes, call)
        torch.cuda.synchronize()
    return longest_kernels(profile.key_averages())


def longest_kernels(events: Iterable[Any]) -> dict[str, float]:
    """Microseconds by kernel name, the longest first; the host's side of launches and copies is left out."""
    times: dict[str, float] = {}
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.key[:KERNEL_NAME_LENGTH]  # templates of C++ kernels go on for thousands of characters
            times[name] = times.get(name, 0.0) + event.self_device_time_total
    longest = sorted(times, key=times.get, reverse=True)
    return {name: times[name] for name in longest[:MOST_KERNELS]}


def _gradients(outputs: Tensor | tuple[Tensor, ...], call: Call) -> tuple[Tensor, ...]:
    return torch.autograd.grad(as_tuple(outputs), call.leaves, as_tuple(call.output_gradient))


def _eager_sampler(function: Callable[..., Tensor], passes: str, calls: Sequence[Call]) -> Sample:
    run_pass(function, passes, calls[0])
    results: list[tuple[Tensor, ...]] = []

    def run() -> float:
        results.clear()
        seconds = 0.0
        for call in calls:
            output = function(*call.arguments) if passes == "backward" else None
            start = time.perf_counter()
            if output is None:
                results.append(run_pass(function, passes, call))
            else:
                results.append(_gradients(output, call))
            seconds += time.perf_counter() - start
        return seconds / len(calls)

    return Sample(run, results)


def _graphed_sampler(function: Callable[..., Tensor], passes: str, calls: Sequence[Call]) -> Sample:
    _warm_up(function, passes, calls[0])
    if passes != "backward":
        graph, results = _captured(lambda: [run_pass(function, passes, call) for call in calls])
        return _replayed(None, graph, results)
    forward, outputs = _captured(lambda: [function(*call.arguments) for call in calls])

    def backward() -> list[tuple[Tensor, ...]]:
        # One output after the other leaves the list: the memory it saved is free for the backward passes that follow.
        return [_gradients(outputs.pop(0), call) for call in calls]

    graph, gradients = _captured(backward, pool=forward.pool())
    return _replayed(forward, graph, gradients)


def _warm_up(function: Callable[..., Tensor], passes: str, call: Call) -> None:
    """Compile, tune and create handles on a stream beside the default one, as capture allows none of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_CALLS):
            run_pass(function, passes, call)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(run: Callable[[], list], pool: object = None) -> tuple[torch.cuda.CUDAGraph, list]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = run()
    return graph, results


def _replayed(
    before: torch.cuda.CUDAGraph | None, timed: torch.cuda.CUDAGraph, results: list[tuple[Tensor, ...]]
) -> Sample:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        if before is not None:
            before.replay()
        torch.cuda._sleep(COVER_CYCLES)
        start.record()
        timed.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(results)

    return Sample(run, results)
