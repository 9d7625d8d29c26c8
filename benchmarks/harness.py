"""Time implementations of an operator against each other: each is checked first, then takes turns with the operator.

Device time is measured on a GPU: a sample is one replay of a CUDA graph between two events. The graph holds several
calls on inputs of their own, which together are several times the second-level cache, so that no call finds its inputs
there. Launch overhead is in no sample, for any candidate. On a CPU a sample is one call by the wall clock.

A backward pass is captured alone, over the saved tensors of a forward graph that is replayed before it and not timed.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

OPERATOR = "operator"  # the candidate that all others take turns with
COMPILED = " compiled"
PASSES = ("forward", "backward", "both")
ROUNDS = {"cuda": 30, "cpu": 9}
WARM_UP_ROUNDS = {"cuda": 3, "cpu": 1}
WARM_UP_CALLS = 3
CLAIM_TOLERANCE = 0.03  # a median of a few pairs moves by so much between runs on a machine at rest

CACHE_MULTIPLE = 3  # bytes that the calls of a sample touch, in sizes of the second-level cache
FEWEST_CALLS, MOST_CALLS = 2, 64
COVER_CYCLES = 4_000_000  # about two milliseconds that keep the GPU busy while a replay is submitted

FLOP_OF_A_MULTIPLY_ADD = 2
SEGMENTS = (64, 128, 256, 512)  # of the published network
PATCH = 16  # pixels of a token at its first scale
COPIED_BYTES = 4 << 30
PRODUCT_SIDE = 8192
ROOFLINE_ROUNDS = 9
DROPOUT_DRAWS = 16
DROPOUT_TOLERANCE = 0.2  # relative, of the distance between the mean of the draws and the result without dropout

Function = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that must be moved to and from memory.

    The least work that the operation needs; equal for all candidates: each input is read once and each output written
    once. Any work that a candidate adds lowers its share of the roofline.
    """

    flop: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Call:
    """The arguments of one call and the gradients of its outputs.

    Gradients are taken by the arguments that require one. Outputs beyond the given gradients have none.
    """

    arguments: tuple[Tensor, ...]
    output_gradients: tuple[Tensor, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The arguments that gradients are taken by."""
        return tuple(argument for argument in self.arguments if argument.requires_grad)


@dataclass(frozen=True, eq=False)
class Case:
    """One workload of an operator.

    Attributes:
        name: the operator's, for the record.
        sizes: sizes of the workload, for the record and the name of the case.
        device: "cpu" or "cuda".
        dtype: of the arguments.
        candidates: functions of the arguments by name; ``operator`` is among them.
        exact: the published operations, without dropout; results are compared with theirs in float64.
        draw: makes a new call of random numbers.
        work: operations and bytes of a pass.
        tolerance: the relative error that each output and gradient may have.
        dropout_p: the candidates' probability of dropping.
        compiled: names of candidates that are also compared compiled by ``torch.compile``.
        passes: which of :data:`PASSES` are timed.
        claimed: how many times as fast the operator must be, by candidate.
    """

    name: str
    sizes: Mapping[str, Any]
    device: str
    dtype: torch.dtype
    candidates: Mapping[str, Function]
    exact: Function
    draw: Callable[[torch.Generator], Call]
    work: Callable[[str], Work]
    tolerance: float
    dropout_p: float = 0.0
    compiled: tuple[str, ...] = ()
    passes: tuple[str, ...] = ("forward", "backward")
    claimed: Mapping[str, float] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of all candidates."""
        return [*self.candidates, *(name + COMPILED for name in self.compiled)]

    def function(self, candidate: str) -> Function:
        """Return a candidate; one that is to be compiled is compiled for fixed shapes, in PyTorch's default mode."""
        function = self.candidates[candidate.removesuffix(COMPILED)]
        if not candidate.endswith(COMPILED):
            return function
        torch.compiler.reset()  # after a few shapes PyTorch would run a function uncompiled
        return torch.compile(function, fullgraph=True, dynamic=False)

    def calls(self, passes: str) -> list[Call]:
        """Draw the calls of a sample; the first is always the same."""
        count = calls_in_a_sample(self.work(passes).bytes, self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        return [self.draw(generator) for _ in range(count)]

    def __str__(self) -> str:
        sizes = "-".join(f"{name}_{value}" for name, value in self.sizes.items())
        return f"{self.device}-{str(self.dtype).removeprefix('torch.')}-{sizes}".replace(" ", "_")


class Clock:
    """A clock that shows the seconds of all samples so far: pytest-benchmark's timer."""

    def __init__(self):
        self.seconds = 0.0

    def read(self) -> float:
        """Return the total seconds of all samples."""
        return self.seconds


CLOCK = Clock()


class Sample(NamedTuple):
    """Timed calls: ``seconds()`` runs them and returns the seconds of one; ``results`` are those of the first call."""

    seconds: Callable[[], float]
    results: list[tuple[Tensor, ...]]


def comparisons(cases: Iterable[Case]) -> list[Any]:
    """Return pytest's parameters ``case, passes, candidate`` of all comparisons, those on a GPU marked ``gpu``."""
    return [
        pytest.param(
            case,
            passes,
            candidate,
            id=f"{case}-{passes}-{candidate}",
            marks=[pytest.mark.gpu] if case.device == "cuda" else [],
        )
        for case in cases
        for passes in case.passes
        for candidate in case.names()
    ]


def operator_backend(device: str) -> str:
    """Return the backend that is timed as the operator: Triton on a GPU, elsewhere what a user gets there."""
    return "triton" if device == "cuda" else "auto"


def compare(
    case: Case, passes: str, candidate: str, repeat: Callable[..., None] | None = None
) -> tuple[dict[str, Any], list[float]]:
    """Check a candidate and the operator, time them in turns, and return notes for the record and all samples.

    Raises:
        AssertionError: a result is wrong or not finite.
    """
    calls = case.calls(passes)
    function = case.function(candidate)
    sample, error = checked_sample(case, passes, function, calls)
    operator, _ = checked_sample(case, passes, case.function(OPERATOR), calls)
    outcome = in_turns(sample.seconds, operator.seconds, case.device, repeat)
    seconds = outcome.pop("seconds")
    work = case.work(passes)
    notes = {"dtype": str(case.dtype).removeprefix("torch."), "device": case.device, "passes": passes}
    notes |= {"candidate": candidate, "relative_error": error, "calls_in_a_sample": len(calls)}
    notes |= {**case.sizes, **outcome, **rates(work, case.dtype, case.device, outcome["median_seconds"])}
    if case.device == "cuda":
        warm = sampler(function, passes, calls[:1] * len(calls))
        notes["warm_cache_median_seconds"] = statistics.median(warm.seconds() for _ in range(ROUNDS["cuda"]))
        notes["peak_bytes"] = peak_bytes(lambda: run_pass(function, "both", calls[0]))
        notes["kernels"] = kernels(lambda: run_pass(function, passes, calls[0]), "cuda")
    return notes, seconds


def calls_in_a_sample(bytes_of_a_call: float, device: str) -> int:
    """Return how many calls a sample needs for its inputs to be cold; 1 on a CPU."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(FEWEST_CALLS, math.ceil(CACHE_MULTIPLE * cache / bytes_of_a_call)), MOST_CALLS)


def checked_sample(case: Case, passes: str, function: Function, calls: Sequence[Call]) -> tuple[Sample, float]:
    """Return a sample whose results are right, and the largest relative error of an output or a gradient.

    Raises:
        AssertionError: a result is wrong or not finite.
    """
    sample = sampler(function, passes, calls)
    sample.seconds()
    results = sample.results[0]
    assert all(bool(result.isfinite().all()) for result in results), f"{passes} has results that are not finite"
    if case.dropout_p:
        return sample, _dropout_error(case, function, passes, calls[0])
    outputs, gradients = exact_results(case)
    expected = {"forward": outputs, "backward": gradients, "both": (*outputs, *gradients)}[passes]
    errors = [relative_error(result, wanted) for result, wanted in zip(results, expected, strict=True)]
    # Written so that a NaN fails.
    assert all(error <= case.tolerance for error in errors), (
        f"relative errors {errors} of {passes}, allowed {case.tolerance}"
    )
    return sample, max(errors)


@lru_cache(maxsize=1)
def exact_results(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return outputs and gradients of the first call of a case by its exact function, in float64."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor

    call = case.draw(torch.Generator(case.device).manual_seed(0))
    call = Call(tuple(map(exact, call.arguments)), tuple(map(exact, call.output_gradients)))
    outputs = as_tuple(case.exact(*call.arguments))
    return tuple(output.detach() for output in outputs), _gradients(outputs, call)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of ``exact``."""
    return (torch.linalg.vector_norm(result.double() - exact) / torch.linalg.vector_norm(exact)).item()


def _dropout_error(case: Case, function: Function, passes: str, call: Call) -> float:
    """Return the error of a mean of draws; fail unless a candidate drops at the case's rate and keeps expectations.

    Values are independent standard normal numbers, so that an output with dropout is off by sqrt(p / (1 - p)) of its
    norm, and the mean of n outputs by a factor of sqrt(n) less. Another rate, or one mask for all draws, gives another
    distance.
    """
    (exact,), _ = exact_results(case)
    with torch.set_grad_enabled(passes != "forward"):
        total = sum(function(*call.arguments).detach().double() for _ in range(DROPOUT_DRAWS))
    error = relative_error(total / DROPOUT_DRAWS, exact)
    expected = math.sqrt(case.dropout_p / (1 - case.dropout_p) / DROPOUT_DRAWS)
    assert abs(error / expected - 1) <= DROPOUT_TOLERANCE, (
        f"the mean of {DROPOUT_DRAWS} draws is off by {error}, not by about {expected}"
    )
    return error


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return one output or several as several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def run_pass(function: Function, passes: str, call: Call) -> tuple[Tensor, ...]:
    """Return the outputs and, unless ``passes`` is forward, the gradients by the leaves of the call."""
    if passes == "forward":
        with torch.no_grad():
            return as_tuple(function(*call.arguments))
    outputs = as_tuple(function(*call.arguments))
    return (*(output.detach() for output in outputs), *_gradients(outputs, call))


def _gradients(outputs: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs[: len(call.output_gradients)], call.leaves, call.output_gradients)


def sampler(function: Function, passes: str, calls: Sequence[Call]) -> Sample:
    """Return a sample of ``passes`` (one of :data:`PASSES`) of ``function`` on each of ``calls``."""
    if passes not in PASSES:
        raise ValueError(f"passes: {passes!r} is unknown; choose one of {', '.join(PASSES)}")
    return (_graph_sampler if calls[0].arguments[0].is_cuda else _clock_sampler)(function, passes, calls)


def _clock_sampler(function: Function, passes: str, calls: Sequence[Call]) -> Sample:
    results: list[tuple[Tensor, ...]] = []

    def seconds() -> float:
        results.clear()
        total = 0.0
        for call in calls:
            outputs = as_tuple(function(*call.arguments)) if passes == "backward" else None
            start = time.perf_counter()
            results.append(run_pass(function, passes, call) if outputs is None else _gradients(outputs, call))
            total += time.perf_counter() - start
        return total / len(calls)

    return Sample(seconds, results)


def _graph_sampler(function: Function, passes: str, calls: Sequence[Call]) -> Sample:
    _warm_up(lambda: run_pass(function, passes, calls[0]))
    if passes != "backward":
        graph, results = _captured(lambda: [run_pass(function, passes, call) for call in calls])
        return Sample(_replayed(None, graph, len(calls)), results)
    forward, outputs = _captured(lambda: [as_tuple(function(*call.arguments)) for call in calls])

    def backward() -> list[tuple[Tensor, ...]]:
        # Outputs leave the list one by one: the memory they saved is free for the backward passes that follow.
        return [_gradients(outputs.pop(0), call) for call in calls]

    graph, gradients = _captured(backward, pool=forward.pool())
    return Sample(_replayed(forward, graph, len(calls)), gradients)


def _warm_up(run: Callable[[], object]) -> None:
    """Compile kernels and create handles on a stream of their own: a capture allows neither."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _captured(run: Callable[[], list], pool: object = None) -> tuple[torch.cuda.CUDAGraph, list]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = run()
    return graph, results


def _replayed(before: torch.cuda.CUDAGraph | None, timed: torch.cuda.CUDAGraph, calls: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds() -> float:
        if before is not None:
            before.replay()
        torch.cuda._sleep(COVER_CYCLES)
        start.record()
        timed.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return seconds


def in_turns(
    candidate: Callable[[], float],
    baseline: Callable[[], float],
    device: str,
    repeat: Callable[..., None] | None = None,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Take samples of both in turns; the ratio is candidate over baseline, above 1 where the baseline is faster.

    ``repeat(run, setup, rounds)`` calls ``setup`` and then ``run``, which returns its seconds, so many times;
    pytest-benchmark does it its own way.

    Returns:
        ``seconds`` and ``baseline_seconds`` (all samples), their medians, and the median ``ratio`` of the pairs with
        its quartiles and range.
    """
    seconds: list[float] = []
    baseline_seconds: list[float] = []
    for _ in range(WARM_UP_ROUNDS[device]):
        baseline(), candidate()

    def run() -> float:
        seconds.append(candidate())
        return seconds[-1]

    (repeat or _repeat)(run, lambda: baseline_seconds.append(baseline()), rounds or ROUNDS[device])
    return compared(seconds, baseline_seconds)


def compared(seconds: list[float], baseline_seconds: list[float]) -> dict[str, Any]:
    """Return what `in_turns` returns for samples that were taken in turns."""
    ratios = [one / other for one, other in zip(seconds, baseline_seconds, strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "baseline_seconds": baseline_seconds,
        "baseline_median_seconds": statistics.median(baseline_seconds),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [first, third],
        "ratio_range": [min(ratios), max(ratios)],
    }


def _repeat(run: Callable[[], float], setup: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        setup()
        run()


def rates(work: Work, dtype: torch.dtype, device: str, seconds: float) -> dict[str, float | str]:
    """Return the work, the rates that follow from ``seconds`` and, on a GPU, the share of its measured roofline."""
    notes: dict[str, float | str] = {"gflop": work.flop / 1e9, "gigabytes": work.bytes / 1e9}
    notes |= {"tflop_per_second": work.flop / seconds / 1e12, "terabytes_per_second": work.bytes / seconds / 1e12}
    if device == "cuda":
        computing, moving = work.flop / product_rate(dtype), work.bytes / copy_rate()
        notes["roofline_share"] = max(computing, moving) / seconds
        notes["bound"] = "compute" if computing >= moving else "memory"
        notes |= {"product_rate": product_rate(dtype), "copy_rate": copy_rate()}
    return notes


@lru_cache
def product_rate(dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product of random numbers on the current GPU."""
    left, right = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device="cuda").to(dtype) for _ in range(2))
    return FLOP_OF_A_MULTIPLY_ADD * PRODUCT_SIDE**3 / _device_seconds(lambda: left @ right)


@lru_cache
def copy_rate() -> float:
    """Return the bytes a second, read and written, of a large copy on the current GPU."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _device_seconds(lambda: target.copy_(source))


def _device_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(WARM_UP_CALLS + ROOFLINE_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[WARM_UP_CALLS:])


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of GPU memory of a plain run, above what was in use before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernels(run: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Return the kernels that a run launches (on a CPU the operators that it calls): name, calls, seconds.

    The longest come first. A backward pass includes the forward pass before it.
    """
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    found = [
        {
            "kernel": event.key[:160],  # names of C++ templates have thousands of characters
            "calls": event.count,
            "seconds": (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6,
        }
        for event in profile.key_averages()
        # Ranges that something marked, such as the optimizer's step, hold kernels that are counted by themselves.
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted(found, key=lambda entry: entry["seconds"], reverse=True)
