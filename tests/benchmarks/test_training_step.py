"""The race of training steps: every candidate's losses are checked, what is wrong or cannot run does not race."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import network_race, training_step
from benchmarks.errors import in_short
from benchmarks.network_race import Worker, fastest
from benchmarks.networks import CANDIDATES, MODELS, OURS, NetworkProblem, Variant, batch, in_a_row, network
from benchmarks.records import Record, read_lines
from benchmarks.training_step import (
    CHECKED_STEPS,
    GPU_PROBLEMS,
    ProjectTraining,
    Training,
    exact_losses,
    published_loss,
    target,
    training,
)
from tests.support import HostRecorder
from uctrans.training import TrainingError
from uctrans.training.losses import segmentation_loss

SMALL = NetworkProblem("uctransnet", 4, pixels=32, base_channels=4, device="cpu")
UNCOMPILED = [name for name, variant in CANDIDATES.items() if variant.compile_mode is None]


class Benchmark:
    """As much of pytest-benchmark as a race needs."""

    def __init__(self):
        self.group, self.extra_info = None, {}

    def pedantic(self, run, setup, rounds, iterations, warmup_rounds):
        for _ in range(rounds):
            setup()
            run()


@pytest.fixture
def arena():
    arena = network_race.Arena("training step", training)
    yield arena
    arena.close()


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "record.jsonl", torch.device("cpu"))


@pytest.fixture
def learning_fast(monkeypatch):
    """Let narrow networks learn as fast as those of the published width do."""
    monkeypatch.setattr(training_step, "LEARNING_RATE", 3e-3)
    exact_losses.cache_clear()
    yield
    exact_losses.cache_clear()


@pytest.mark.parametrize("candidate", UNCOMPILED)
def test_losses_of_every_candidate_are_right(candidate):
    work = training(SMALL, CANDIDATES[candidate].on("cpu"))
    notes = work.check()
    assert notes["losses_checked"] == "without dropout"
    assert len(notes["losses"]) == len(notes["exact_losses"]) == CHECKED_STEPS
    assert 0 <= notes["largest_loss_error"] <= 0.02
    sample = work.sampler()
    assert sample() > 0
    assert isinstance(work, ProjectTraining) == (candidate == OURS)


@pytest.mark.usefixtures("learning_fast")
@pytest.mark.parametrize("model", MODELS)
def test_the_loss_falls_so_that_a_wrong_gradient_would_show(model):
    losses = exact_losses(NetworkProblem(model, 4, pixels=48, base_channels=8, device="cpu"))
    assert losses[0] > losses[-1] * 1.1
    assert losses == sorted(losses, reverse=True)


@pytest.mark.usefixtures("learning_fast")
def test_a_step_that_learns_nothing_is_refused(monkeypatch):
    exact_losses(SMALL)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    with pytest.raises(RuntimeError, match=r"published cannot run .* off by"):
        fastest("published", SMALL, training)


def test_a_nan_is_refused(monkeypatch):
    monkeypatch.setattr(training_step, "exact_losses", lambda problem: [float("nan")] * CHECKED_STEPS)
    with pytest.raises(AssertionError, match="off by"):
        training(SMALL, CANDIDATES["published"]).check()


def test_a_compiled_step_is_compiled_with_its_loss_and_checked_as_it_races(monkeypatch):
    compiled = []

    def compile_nothing(function, **settings):
        compiled.append((function, settings))
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    exact = exact_losses(SMALL)
    monkeypatch.setattr(training_step, "exact_losses", lambda problem: exact)
    work = training(SMALL, CANDIDATES["compiled"].on("cpu"))
    ((function, settings),) = compiled
    assert function == work._loss_of_batch
    assert settings == {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False}
    assert work.check()["losses_checked"] == "with dropout"
    assert len(compiled) == 1  # not a second time for the check
    assert ProjectTraining(SMALL, Variant("composed", compile_mode="default", is_project=True)).step.args[0].forward
    assert compiled[1][0].training


@pytest.mark.parametrize("is_project", [False, True])
def test_a_captured_step_is_the_plain_one_and_all_are_recorded_in_one_way(monkeypatch, is_project):
    recorders = []

    def recorder(generators):
        recorders.append(HostRecorder(generators))
        return recorders[-1]

    monkeypatch.setattr(training_step, "CudaRecorder", recorder)
    losses = {}
    for graphed in (False, True):
        work = training(SMALL, Variant("composed", is_project=is_project, graphed=graphed), dropout=False)
        run = work.runner()
        losses[graphed] = []
        for _ in range(CHECKED_STEPS):
            run()
            losses[graphed].append(work.loss())
    assert losses[True] == losses[False]
    assert len(set(losses[True])) == CHECKED_STEPS
    (one,) = recorders
    assert (one.warm_ups, one.rehearsals, one.recordings, one.replays) == (1, 1, 1, CHECKED_STEPS - 2)
    assert one.generators == [work.generator]


def test_a_baseline_that_waits_for_the_device_is_refused_before_it_is_recorded(monkeypatch):
    made = HostRecorder()
    monkeypatch.setattr(training_step, "CudaRecorder", lambda generators: made)
    work = training(SMALL, Variant("composed"))
    loss_of = work.step.loss_of
    work.step.loss_of = lambda images, masks: loss_of(images, masks) * masks.any().item()
    run = work.runner()
    run()
    with pytest.raises(TrainingError, match="cannot be recorded as a CUDA graph"):
        run()
    assert made.recordings == 0


def test_the_loss_of_baselines_is_the_projects():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 16, 16, generator=generator)
    masks = (torch.rand(3, 16, 16, generator=generator) > 0.7).to(torch.uint8)
    torch.testing.assert_close(published_loss(logits, masks), segmentation_loss(logits, masks))


def test_the_published_step_is_as_the_script_has_it():
    work = Training(SMALL, CANDIDATES["published"])
    images, _ = work.step.data
    assert work.step.optimizer.defaults["fused"] is None
    assert images.is_contiguous()
    assert not images.is_contiguous(memory_format=torch.channels_last)
    assert {module.backend for module in work.model.modules() if hasattr(module, "backend")} == {"reference"}
    ours = Training(SMALL, CANDIDATES["reference bf16"].on("cpu"))
    images, _ = ours.step.data
    assert ours.optimizer.defaults["fused"] is True
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_all_variants_have_the_same_weights_and_images():
    variants = [variant.on("cpu") for variant in CANDIDATES.values()]
    states = [network(SMALL, variant).state_dict() for variant in variants]
    batches = [batch(SMALL, variant) for variant in variants]
    for state, (images, masks) in zip(states, batches, strict=True):
        assert all(torch.equal(state[key], value) for key, value in states[0].items())
        assert torch.equal(images, batches[0][0])
        assert torch.equal(masks, batches[0][1])
    share = batches[0][1].float().mean().item()
    assert 0.1 < share < 0.9


def test_a_race_goes_into_the_record(arena, record):
    arena.race(Benchmark(), record, "first", SMALL, "published", 8.0)
    arena.race(Benchmark(), record, "second", SMALL, OURS, None)
    _, first, second = read_lines(record.path)
    info = first["info"]
    assert (first["test"], first["group"], first["outcome"]) == ("first", "training step", "measured")
    assert info["candidate"] == "published"
    assert info["target_value"] == info["ratio"]
    assert info["met"] == (info["ratio"] >= 8.0)
    assert info["variant"] == "reference, float32, contiguous, eager"
    assert "composed" in info["against"] or "auto" in info["against"]
    assert info["images_per_second"] == pytest.approx(4 / info["median_seconds"])
    assert len(first["seconds"]) == len(info["operator_seconds"]) == 2
    assert second["info"]["candidate"] == OURS
    json.dumps(info)


def test_others_are_timed_alone_where_ours_cannot_run(arena, record, monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("no kernels here")

    monkeypatch.setattr(training_step, "ProjectTraining", refuse)
    arena.race(Benchmark(), record, "alone", SMALL, "published", 8.0)
    info = read_lines(record.path)[-1]["info"]
    assert "no kernels here" in info["ours_cannot_run"]
    assert "ratio" not in info
    assert "met" not in info
    with pytest.raises(RuntimeError, match="no kernels here"):
        arena.race(Benchmark(), record, "ours", SMALL, OURS, None)


def test_all_race_against_the_faster_of_ours(arena, record, monkeypatch):
    seconds = {OURS: 2.0, "ours compiled": 1.0, "published": 3.0}

    def enter(candidate, problem, make):
        worker = Worker(False)
        value = seconds[candidate]
        return network_race.Contender(lambda: value, value, worker, {"variant": candidate, "cudnn": "off"})

    monkeypatch.setattr(network_race, "fastest", enter)
    for candidate in ("published", "ours compiled", "published"):
        arena.race(Benchmark(), record, candidate, SMALL, candidate, None)
    infos = [line["info"] for line in read_lines(record.path)[1:]]
    assert [info["against"] for info in infos] == ["ours, off", "ours, off", "ours compiled, off"]
    assert [info["ratio"] for info in infos] == [1.5, 0.5, 3.0]
    arena.race(Benchmark(), record, "another", replace(SMALL, batch=1), "published", None)
    assert read_lines(record.path)[-1]["info"]["against"] == "ours, off"


def test_a_variant_is_tried_with_both_settings_of_cudnn(monkeypatch):
    monkeypatch.setattr(network_race, "_cudnn_settings", lambda variant, device: (False, True))
    seen = []

    class Work:
        def check(self):
            seen.append("check")
            return {}

        def sampler(self):
            tuned = torch.backends.cudnn.benchmark
            seen.append(tuned)
            return lambda: 1.0 if tuned else 2.0

    before = torch.backends.cudnn.benchmark
    contender = fastest("published", SMALL, lambda problem, variant: Work())
    assert seen == ["check", False, True]
    assert contender.notes["cudnn"] == "cudnn.benchmark on"
    assert contender.notes["settings_seconds"] == {"cudnn.benchmark off": 2.0, "cudnn.benchmark on": 1.0}
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize(
    ("skipped", "candidate"), [(0, "compiled, own graphs"), (2, "compiled, own graphs"), (2, OURS)]
)
def test_a_compiled_candidate_that_left_its_own_graphs_out_is_refused(monkeypatch, skipped, candidate):
    counters = torch._dynamo.utils.counters["inductor"]
    monkeypatch.setitem(counters, "cudagraph_skips", 5)  # of what was compiled before
    monkeypatch.setattr(network_race, "_cudnn_settings", lambda variant, device: (True,))

    class Work:
        def check(self):
            return {}

        def sampler(self):
            counters["cudagraph_skips"] += skipped
            return lambda: 1.0

    def enter():
        return fastest(candidate, replace(SMALL, device="cuda"), lambda problem, variant: Work())

    if candidate != OURS and skipped:
        with pytest.raises(RuntimeError, match="left out 2 of the CUDA graphs"):
            enter()
    else:
        assert enter().notes.get("cudagraph_skips") == (0 if candidate != OURS else None)
    assert not CANDIDATES["compiled, own graphs"].on("cpu").makes_own_graphs


def test_a_reason_names_the_first_of_the_errors():
    def capture():
        try:
            try:
                raise ValueError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("invalid capture")
        except RuntimeError as error:
            raise AssertionError("the step cannot be recorded") from error

    with pytest.raises(AssertionError) as caught:
        capture()
    assert in_short(caught.value) == (
        "AssertionError: the step cannot be recorded; "
        "first ValueError: operation not permitted when stream is capturing"
    )
    assert in_short(ValueError("alone")) == "ValueError: alone"


def test_settings_of_cudnn():
    assert network_race._cudnn_settings(CANDIDATES[OURS], "cuda") == (False, True)
    assert network_race._cudnn_settings(CANDIDATES["compiled, own graphs"], "cuda") == (True,)
    assert network_race._cudnn_settings(CANDIDATES[OURS], "cpu") == (False,)


def test_a_worker_does_its_backward_passes_itself():
    import threading

    seen = []

    def differentiate():
        leaf = torch.ones(1, requires_grad=True)
        product = leaf * 2
        product.register_hook(lambda gradient: seen.append(threading.get_ident()))
        product.backward()
        return threading.get_ident()

    own = Worker(False)
    assert seen == [own(differentiate)]
    assert not own(torch._C._is_multithreading_enabled)
    assert seen[0] != threading.get_ident()
    here = Worker(False, in_own_thread=False)
    assert here(threading.get_ident) == threading.get_ident()
    own.close()
    here.close()


def test_time_is_that_of_one_call():
    calls = []
    sample = in_a_row(lambda: calls.append(1), "cpu", 4)
    before = len(calls)
    assert 0 < sample() < 1
    assert len(calls) == before + 4


def test_targets_are_those_of_the_claims():
    assert [(problem.model, problem.batch) for problem in GPU_PROBLEMS] == [
        (model, size) for model in MODELS for size in (4, 32)
    ]
    for problem in GPU_PROBLEMS:
        assert (problem.pixels, problem.base_channels) == (224, 64)
        assert target(problem, "published") == {4: 8.0, 32: 5.0}[problem.batch]
        assert target(problem, "compiled") == target(problem, "compiled, own graphs")
        assert target(problem, "compiled") == {4: 1.5, 32: 1.25}[problem.batch]
        assert target(problem, OURS) is None
    assert target(SMALL, "published") is None
