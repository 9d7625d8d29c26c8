"""The harness: the time of a sample, wrong candidates, and the arithmetic of pairs, work and rates."""

import contextlib
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Call, Case, Work, checked_sample, compare, in_turns, rates, run_pass, sampler

ELAPSED_MILLISECONDS = 6.0


def product(left, right):
    return left @ right


def draw(generator, side=8):
    left, right = (torch.randn(side, side, generator=generator).requires_grad_() for _ in range(2))
    return Call((left, right), (torch.randn(side, side, generator=generator),))


def case(**changes):
    settings = {
        "name": "product",
        "sizes": {"side": 8},
        "device": "cpu",
        "dtype": torch.float32,
        "candidates": {"operator": product, "reference": product},
        "exact": product,
        "draw": draw,
        "work": lambda passes: Work(1e3, 1e2),
        "tolerance": 1e-5,
    }
    return Case(**settings | changes)


def calls(count):
    generator = torch.Generator().manual_seed(0)
    return [draw(generator) for _ in range(count)]


@pytest.mark.parametrize(("passes", "kept"), [("forward", slice(1)), ("backward", slice(1, 3)), ("both", slice(3))])
def test_samples_on_a_cpu_hold_the_results_of_the_pass(passes, kept):
    (call,) = calls(1)
    sample = sampler(product, passes, [call])
    assert sample.seconds() > 0
    (left, right), (gradient,) = call.arguments, call.output_gradients
    wanted = (left @ right, gradient @ right.t(), left.t() @ gradient)[kept]
    torch.testing.assert_close(sample.results[0], wanted)


def test_forward_is_outside_the_time_of_backward():
    def slow_forward(left, right):
        time.sleep(0.2)
        return left @ right

    assert sampler(slow_forward, "forward", calls(1)).seconds() > 0.2
    assert sampler(slow_forward, "backward", calls(1)).seconds() < 0.1


def test_unknown_passes_are_refused():
    with pytest.raises(ValueError, match="sideways"):
        sampler(product, "sideways", calls(1))


@pytest.mark.parametrize(
    ("wrong", "passes", "message"),
    [
        (lambda left, right: left @ right * 1.001, "forward", "relative errors"),
        (lambda left, right: left.detach() @ right + 0 * left, "backward", "relative errors"),
        (lambda left, right: left.detach() @ right + 0 * left, "both", "relative errors"),
        (lambda left, right: left @ right * torch.nan, "forward", "not finite"),
    ],
)
def test_a_wrong_candidate_is_refused(wrong, passes, message):
    with pytest.raises(AssertionError, match=message):
        compare(case(candidates={"operator": product, "wrong": wrong}), passes, "wrong")
    with pytest.raises(AssertionError, match=message):
        compare(case(candidates={"operator": wrong, "reference": product}), passes, "reference")


def dropped(left, right, p):
    return torch.dropout(left @ right, p, train=True)


@pytest.mark.parametrize(("p", "is_right"), [(0.25, True), (0.0, False), (0.1, False)])
def test_a_candidate_must_drop_at_the_rate(p, is_right):
    torch.manual_seed(0)
    dropping = case(dropout_p=0.25, draw=lambda generator: draw(generator, side=64))
    with contextlib.nullcontext() if is_right else pytest.raises(AssertionError, match="is off by"):
        checked_sample(dropping, "forward", lambda left, right: dropped(left, right, p), dropping.calls("forward"))


def test_a_race_has_all_samples_and_notes():
    notes, seconds = compare(case(), "both", "reference")
    assert len(seconds) == len(notes["baseline_seconds"]) == harness.ROUNDS["cpu"]
    assert (notes["candidate"], notes["side"], notes["dtype"], notes["gflop"]) == ("reference", 8, "float32", 1e-6)
    assert notes["relative_error"] < 1e-6


def test_pairs_give_the_median_of_their_ratios():
    warm_up = [100.0] * harness.WARM_UP_ROUNDS["cpu"]
    candidate, baseline = iter([*warm_up, 2.0, 9.0, 8.0]), iter([*warm_up, 1.0, 3.0, 2.0])
    outcome = in_turns(lambda: next(candidate), lambda: next(baseline), "cpu", rounds=3)
    assert outcome == {
        "seconds": [2.0, 9.0, 8.0],
        "median_seconds": 8.0,
        "baseline_seconds": [1.0, 3.0, 2.0],
        "baseline_median_seconds": 2.0,
        "ratio": 3.0,
        "ratio_quartiles": [2.5, 3.5],
        "ratio_range": [2.0, 4.0],
    }


def test_rates_and_the_share_of_the_roofline(monkeypatch):
    monkeypatch.setattr(harness, "product_rate", lambda dtype: 4e12)
    monkeypatch.setattr(harness, "copy_rate", lambda: 1e12)
    notes = rates(Work(flop=2e12, bytes=1e11), torch.float32, "cuda", 2.0)
    assert (notes["tflop_per_second"], notes["terabytes_per_second"]) == (1.0, 0.05)
    assert (notes["roofline_share"], notes["bound"]) == (0.25, "compute")
    notes = rates(Work(flop=2e12, bytes=1e12), torch.float32, "cuda", 2.0)
    assert (notes["roofline_share"], notes["bound"]) == (0.5, "memory")
    assert "roofline_share" not in rates(Work(1.0, 1.0), torch.float32, "cpu", 2.0)
    assert Work(1.0, 2.0) + Work(3.0, 4.0) == Work(4.0, 6.0)


def test_calls_of_a_sample_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=60e6))
    assert harness.calls_in_a_sample(157e6, "cuda") == 2
    assert harness.calls_in_a_sample(20e6, "cuda") == 9
    assert harness.calls_in_a_sample(1.0, "cuda") == harness.MOST_CALLS
    assert harness.calls_in_a_sample(1.0, "cpu") == 1


def test_races_name_every_candidate_and_mark_those_on_a_gpu():
    both = [case(), case(device="cuda", compiled=("reference",), passes=("forward",))]
    parameters = harness.comparisons(both)
    names = [parameter.id for parameter in parameters]
    assert names[0] == "cpu-float32-side_8-forward-operator"
    assert names[-1] == "cuda-float32-side_8-forward-reference compiled"
    assert len(names) == 2 * 2 + 3
    on_gpu = [any(mark.name == "gpu" for mark in parameter.marks) for parameter in parameters]
    assert on_gpu == [False] * 4 + [True] * 3


def test_a_compiled_candidate_is_compiled_whole_and_for_fixed_shapes(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **settings: (function, settings))
    assert case().function("reference compiled") == (product, {"fullgraph": True, "dynamic": False})
    assert case().function("reference") is product


def test_kernels_are_listed_with_the_longest_first():
    found = harness.kernels(lambda: torch.ones(300, 300) @ torch.ones(300, 300), "cpu")
    assert "aten::mm" in [entry["kernel"] for entry in found]
    seconds = [entry["seconds"] for entry in found]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 0


@pytest.fixture
def played_gpu(monkeypatch):
    """Replace torch.cuda by one that runs captured work at once and writes down what is replayed and recorded."""
    log, graphs = [], []

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


def on_played_gpu(call):
    """Return a call whose first argument says that it is on a GPU, which is all that the harness asks."""
    first = call.arguments[0].detach().as_subclass(OnGpu).requires_grad_()
    return replace(call, arguments=(first, *call.arguments[1:]))


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("passes", ["forward", "both"])
def test_one_graph_of_all_calls_is_replayed_between_two_events(played_gpu, passes):
    prepared = [on_played_gpu(call) for call in calls(3)]
    sample = sampler(product, passes, prepared)
    assert played_gpu == ["capture graph 0 in None"]
    assert sample.seconds() == pytest.approx(ELAPSED_MILLISECONDS / 1e3 / 3)
    assert played_gpu[1:] == ["cover", "start", "replay graph 0", "end", "wait for end"]
    torch.testing.assert_close(sample.results[0], run_pass(product, passes, prepared[0]))


def test_backward_replays_its_forward_outside_the_events_and_shares_its_memory(played_gpu):
    prepared = [on_played_gpu(call) for call in calls(3)]
    sample = sampler(product, "backward", prepared)
    assert played_gpu == ["capture graph 0 in None", "capture graph 1 in pool of graph 0"]
    assert sample.seconds() == pytest.approx(ELAPSED_MILLISECONDS / 1e3 / 3)
    assert played_gpu[2:] == ["replay graph 0", "cover", "start", "replay graph 1", "end", "wait for end"]
    torch.testing.assert_close(sample.results[0], run_pass(product, "both", prepared[0])[1:])
