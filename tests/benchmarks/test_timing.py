"""What a sample times: on a CPU for real, and the order of graphs and events with a GPU played by a recorder."""

import contextlib
import statistics
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.race import CLOCK, paired, target_notes, work_notes
from benchmarks.roofline import Ceilings, Work
from benchmarks.timing import Call, Sample, run_pass, sampler

ELAPSED_MILLISECONDS = 6.0


def product_calls(count):
    generator = torch.Generator().manual_seed(0)
    leaves = [tuple(torch.randn(4, 4, generator=generator, requires_grad=True) for _ in range(2)) for _ in range(count)]
    return [Call(pair, pair, torch.randn(4, 4, generator=generator)) for pair in leaves]


def product(left, right):
    return left @ right


@pytest.mark.parametrize(("passes", "results"), [("forward", 1), ("backward", 2), ("both", 3)])
def test_samples_on_a_cpu_hold_the_results_of_the_pass(passes, results):
    (call,) = product_calls(1)
    sample = sampler(product, passes, [call])
    assert sample() > 0
    left, right = call.arguments
    everything = (left @ right, call.output_gradient @ right.t(), left.t() @ call.output_gradient)
    wanted = {"forward": everything[:1], "backward": everything[1:], "both": everything}[passes]
    assert len(sample.results) == results
    torch.testing.assert_close(sample.results, wanted)


def test_forward_is_outside_the_time_of_backward():
    (call,) = product_calls(1)

    def slow_forward(left, right):
        time.sleep(0.2)
        return left @ right

    assert sampler(slow_forward, "forward", [call])() > 0.2
    assert sampler(slow_forward, "backward", [call])() < 0.1


def test_unknown_passes_are_refused():
    with pytest.raises(ValueError, match="sideways"):
        sampler(product, "sideways", product_calls(1))


@pytest.fixture
def played_gpu(monkeypatch):
    """torch.cuda that runs captured work at once and writes down what is replayed and recorded."""
    log = []
    graphs = []

    class Graph:
        def __init__(self):
            self.name = f"graph {len(graphs)}"
            graphs.append(self)

        def replay(self):
            log.append(f"replay {self.name}")

        def pool(self):
            return f"pool of {self.name}"

    class Event:
        count = 0

        def __init__(self, enable_timing):
            assert enable_timing
            self.name = ("start", "end")[Event.count % 2]
            Event.count += 1

        def record(self):
            log.append(self.name)

        def synchronize(self):
            log.append(f"wait for {self.name}")

        def elapsed_time(self, end):
            assert (self.name, end.name) == ("start", "end")
            return ELAPSED_MILLISECONDS

    @contextlib.contextmanager
    def capture(graph, pool=None):
        log.append(f"capture {graph.name} in {pool}")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
        "Stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: log.append("cover"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


@pytest.mark.parametrize("passes", ["forward", "both"])
def test_one_graph_of_all_calls_is_replayed_between_two_events(played_gpu, passes):
    prepared = product_calls(3)
    sample = timing._graphed_sampler(product, passes, prepared)
    assert played_gpu == ["capture graph 0 in None"]
    assert sample() == pytest.approx(ELAPSED_MILLISECONDS / 1e3 / 3)
    assert played_gpu[1:] == ["cover", "start", "replay graph 0", "end", "wait for end"]
    torch.testing.assert_close(sample.results, run_pass(product, passes, prepared[0]))


def test_backward_replays_its_forward_outside_the_events_and_shares_its_memory(played_gpu):
    prepared = product_calls(3)
    sample = timing._graphed_sampler(product, "backward", prepared)
    assert played_gpu == ["capture graph 0 in None", "capture graph 1 in pool of graph 0"]
    assert sample() == pytest.approx(ELAPSED_MILLISECONDS / 1e3 / 3)
    assert played_gpu[2:] == ["replay graph 0", "cover", "start", "replay graph 1", "end", "wait for end"]
    torch.testing.assert_close(sample.results, run_pass(product, "both", prepared[0])[1:])


def test_cold_calls_exceed_the_cache(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=60e6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert timing.calls_a_sample(157e6, "cuda") == 2
    assert timing.calls_a_sample(20e6, "cuda") == 9
    assert timing.calls_a_sample(1.0, "cuda") == timing.MOST_CALLS
    assert timing.calls_a_sample(1.0, "cpu") == 1


class PedanticBenchmark:
    """As much of pytest-benchmark's fixture as a race asks of it; reads the clock as its timer."""

    def pedantic(self, target, setup, rounds, iterations, warmup_rounds):
        self.seconds = []
        for _ in range(rounds):
            setup()
            start = CLOCK.read()
            target()
            self.seconds.append(CLOCK.read() - start)


def scripted(seconds):
    warm_up = iter([100.0] * 3 + list(seconds))
    return Sample(lambda: next(warm_up), [])


def test_pairs_give_the_median_of_their_ratios_and_the_clock_shows_device_time():
    benchmark = PedanticBenchmark()
    outcome = paired(benchmark, scripted([2.0, 9.0, 8.0]), scripted([1.0, 3.0, 2.0]), rounds=3)
    assert outcome["seconds"] == [2.0, 9.0, 8.0]
    assert benchmark.seconds == pytest.approx([2.0, 9.0, 8.0])
    assert outcome["operator_seconds"] == [1.0, 3.0, 2.0]
    assert (outcome["ratio"], outcome["ratio_range"]) == (3.0, [2.0, 4.0])
    assert outcome["ratio_quartiles"] == [2.5, 3.5]
    assert outcome["median_seconds"] == statistics.median([2.0, 9.0, 8.0])


def test_without_an_operator_there_is_no_ratio():
    outcome = paired(PedanticBenchmark(), scripted([2.0, 9.0]), None, rounds=2)
    assert outcome == {"seconds": [2.0, 9.0], "median_seconds": 5.5}


def test_rates_and_fractions_of_both_ceilings():
    known = Ceilings({torch.float32: 4e12}, bandwidth=1e12, source="known")
    measured = Ceilings({torch.float32: 2e12}, bandwidth=1e12, source="measured")
    notes = work_notes(Work(flop=2e12, bytes=1e11), known, measured, torch.float32, seconds=2.0)
    assert (notes["tflop_per_second"], notes["terabytes_per_second"]) == (1.0, 0.05)
    assert (notes["roofline_seconds"], notes["roofline_fraction"], notes["bound"]) == (0.5, 0.25, "compute")
    assert notes["roofline_fraction_measured_ceilings"] == 0.5
    assert "roofline_fraction" not in work_notes(Work(1.0, 1.0), None, None, torch.float32, seconds=2.0)


def test_targets_are_noted_as_met_or_missed():
    assert target_notes(2.5, 2.6)["met"]
    assert not target_notes(2.5, 2.4)["met"]
    assert target_notes(0.25, 0.2, at_most=True)["met"]
    assert target_notes(None, 2.0) == target_notes(2.0, None) == {}


def test_profile_keeps_the_longest_kernels_and_not_their_launches():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(key="launch", device_type=cpu, self_device_time_total=90.0),
        SimpleNamespace(key="short", device_type=cuda, self_device_time_total=1.0),
        SimpleNamespace(key="x" * 500 + "a", device_type=cuda, self_device_time_total=2.0),
        SimpleNamespace(key="x" * 500 + "b", device_type=cuda, self_device_time_total=3.0),
    ]
    assert list(timing.longest_kernels(events).items()) == [("x" * timing.KERNEL_NAME_LENGTH, 5.0), ("short", 1.0)]


def test_the_profiler_describes_events_as_expected():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2).sum()
    (event, *_) = profile.key_averages()
    assert event.device_type == torch.autograd.DeviceType.CPU
    assert event.self_device_time_total == 0
    assert timing.longest_kernels(profile.key_averages()) == {}
