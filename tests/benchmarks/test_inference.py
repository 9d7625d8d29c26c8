"""The race of inference: every candidate's logits are checked, alone and captured, and both ways to take time."""

from dataclasses import replace

import pytest
import torch

from benchmarks import inference
from benchmarks.inference import GPU_PROBLEMS, KINDS, LATENCY, THROUGHPUT, Latency, Throughput, exact_logits, target
from benchmarks.network_race import Arena
from benchmarks.networks import CANDIDATES, MODELS, OURS, NetworkProblem, one_by_one
from benchmarks.records import Record, read_lines
from tests.benchmarks.test_training_step import Benchmark
from tests.support import HostRecorder

SMALL = NetworkProblem("uctransnet", 2, pixels=32, base_channels=4, device="cpu")
UNCOMPILED = [name for name, variant in CANDIDATES.items() if variant.compile_mode is None]


@pytest.mark.parametrize("candidate", UNCOMPILED)
def test_logits_of_every_candidate_are_right(candidate):
    work = Throughput(SMALL, CANDIDATES[candidate].on("cpu"))
    assert 0 <= work.check()["relative_error"] <= 2e-2
    assert work.sampler()() > 0
    assert not work.model.training


def test_weights_of_ours_are_cast_as_those_of_the_shipped_predictor():
    def dtype(candidate):
        work = Throughput(SMALL, CANDIDATES[candidate].on("cpu"))
        return next(module for module in work.model.modules() if isinstance(module, torch.nn.Conv2d)).weight.dtype

    cast = [name for name in UNCOMPILED if dtype(name) == torch.bfloat16]
    assert cast == [OURS, "composed bf16"]


def test_captured_inference_is_checked_where_it_is_replayed(monkeypatch):
    made = []

    def recorder():
        made.append(HostRecorder())
        return made[-1]

    monkeypatch.setattr(inference, "CudaRecorder", recorder)
    work = Latency(SMALL, replace(CANDIDATES[OURS].on("cpu"), graphed=True))
    work.check()
    assert [(one.warm_ups, one.recordings, one.replays) for one in made] == [(1, 1, 2)]


def test_other_logits_are_refused(monkeypatch):
    exact = exact_logits(SMALL)
    monkeypatch.setattr(inference, "exact_logits", lambda problem: 1.1 * exact)
    with pytest.raises(AssertionError, match="logits are off by"):
        Latency(SMALL, CANDIDATES["published"]).check()
    monkeypatch.setattr(inference, "exact_logits", lambda problem: exact * float("nan"))
    with pytest.raises(AssertionError, match="logits are off by"):
        Latency(SMALL, CANDIDATES["published"]).check()


def test_the_network_is_what_is_compiled(monkeypatch):
    compiled = []

    def compile_nothing(function, **settings):
        compiled.append((function, settings["mode"]))
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    work = Latency(SMALL, CANDIDATES["compiled, own graphs"])
    work.runner()()
    assert compiled == [(work.model, "max-autotune")]


def test_latency_is_that_of_single_calls():
    calls = []
    sample = one_by_one(lambda: calls.append(1), "cpu", 3)
    before = len(calls)
    assert 0 < sample() < 1
    assert len(calls) == before + 3


def test_a_race_goes_into_the_record(tmp_path):
    record = Record(tmp_path / "record.jsonl", torch.device("cpu"))
    arena = Arena("inference, latency", Latency)
    arena.race(Benchmark(), record, "test", SMALL, "published", 10.0)
    arena.close()
    line = read_lines(record.path)[-1]
    assert line["group"] == "inference, latency"
    assert line["info"]["target"] == 10.0
    assert line["info"]["met"] == (line["info"]["ratio"] >= 10.0)
    assert line["info"]["relative_error"] <= 5e-3


def test_targets_are_those_of_the_claims():
    assert KINDS == {1: LATENCY, 32: THROUGHPUT}
    assert [(problem.model, problem.batch) for problem in GPU_PROBLEMS] == [
        (model, size) for model in MODELS for size in (1, 32)
    ]
    for problem in GPU_PROBLEMS:
        assert target(problem, "published") == {1: 10.0, 32: 5.0}[problem.batch]
        assert target(problem, "compiled") == target(problem, "compiled, own graphs")
        assert target(problem, "compiled") == {1: 1.5, 32: 1.3}[problem.batch]
        assert target(problem, OURS) is None
    assert target(SMALL, "published") is None
