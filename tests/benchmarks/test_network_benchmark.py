"""Benchmarks of whole networks: candidates are checked, wrong ones are not timed, and each mode measures."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import candidates, steps
from benchmarks import network as module
from benchmarks.candidates import CANDIDATES, MODELS, OF_INFERENCE, OURS, Problem, Variant, batch, network
from benchmarks.network import in_a_row, in_own_process, largest, largest_batch, main, one_by_one, peak_memory
from benchmarks.records import read_lines
from benchmarks.steps import CHECKED_STEPS, Inference, Training, exact_logits, exact_losses
from tests.support import HostRecorder

SMALL = Problem("uctransnet", 2, pixels=32, base_channels=4, device="cpu")
TINY = ["--pixels", "48", "--base-channels", "2", "--batch", "1", "--device", "cpu"]
UNCOMPILED = [name for name, variant in CANDIDATES.items() if not variant.compiled]


@pytest.fixture
def learning_fast(monkeypatch):
    """Let narrow networks learn as fast as those of the published width do."""
    monkeypatch.setattr(steps, "LEARNING_RATE", 3e-3)
    exact_losses.cache_clear()
    yield
    exact_losses.cache_clear()


@pytest.fixture
def recorders(monkeypatch):
    """Put recorders on the host in the place of those of CUDA graphs, and return them as they are made."""
    made = []

    def make(generators=()):
        made.append(HostRecorder(generators))
        return made[-1]

    monkeypatch.setattr(steps, "CudaRecorder", make)
    return made


@pytest.mark.parametrize("candidate", UNCOMPILED)
def test_losses_and_logits_of_every_candidate_are_right_in_its_own_precision(candidate):
    variant = replace(CANDIDATES[candidate], graphed=False)
    if variant.backend == "triton":
        variant = replace(variant, backend="composed")
    notes = Training(SMALL, variant).check()
    assert notes["losses_checked"] == "without dropout"
    assert len(notes["losses"]) == len(notes["exact_losses"]) == CHECKED_STEPS
    assert 0 <= Inference(SMALL, variant).check()["relative_error"] <= 2e-2


@pytest.mark.usefixtures("learning_fast")
def test_the_loss_falls_so_that_a_wrong_gradient_would_show(monkeypatch):
    problem = replace(SMALL, batch=4, base_channels=8)
    losses = exact_losses(problem)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] * 1.1
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    with pytest.raises(AssertionError, match="off by"):
        Training(problem, CANDIDATES["published"]).check()


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_other_results_are_refused(monkeypatch, factor):
    losses, logits = exact_losses(SMALL), exact_logits(SMALL)
    monkeypatch.setattr(steps, "exact_losses", lambda problem: [factor * loss for loss in losses])
    monkeypatch.setattr(steps, "exact_logits", lambda problem: factor * logits)
    for work in (Training, Inference):
        with pytest.raises(AssertionError, match="off by"):
            work(SMALL, CANDIDATES["published"]).check()


@pytest.mark.parametrize("candidate", [OURS, "reference"])
def test_a_captured_step_is_checked_where_it_is_replayed(recorders, candidate):
    variant = replace(CANDIDATES[candidate], half=False)
    variant = replace(variant, backend="composed") if variant.backend == "triton" else variant
    Training(SMALL, variant).check()
    checked = recorders[-1]
    assert (checked.warm_ups, checked.rehearsals, checked.recordings, checked.replays) == (1, 1, 1, 3)
    inference = Inference(SMALL, variant)
    logits = [inference() for _ in range(4)]
    assert (recorders[-1].recordings, recorders[-1].replays) == (1, 2)
    torch.testing.assert_close(logits[-1], logits[0])


def test_weights_of_ours_are_cast_as_those_of_the_shipped_predictor():
    def dtype(backend):
        work = Inference(SMALL, Variant(backend, graphed=False))
        return next(part for part in work._network.modules() if isinstance(part, torch.nn.Conv2d)).weight.dtype

    assert (dtype("composed"), dtype("reference")) == (torch.bfloat16, torch.float32)


def test_the_published_step_is_as_the_script_has_it():
    work = Training(SMALL, CANDIDATES["published"])
    images, _ = work.run.train_data
    assert work.optimizer.defaults["fused"] is None
    assert images.is_contiguous()
    assert not images.is_contiguous(memory_format=torch.channels_last)
    backends = {part.backend for part in work.run.model.modules() if hasattr(part, "backend")}
    assert backends == {"reference"}
    assert Training(SMALL, Variant("reference", graphed=False)).optimizer.defaults["fused"] is True


def test_a_compiled_step_is_compiled_with_its_loss_and_not_twice(monkeypatch):
    compiled = []

    def compile_nothing(function, **settings):
        compiled.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    baseline = Training(SMALL, Variant("reference", half=False, graphed=False, compiled=True))
    compiled.clear()  # and the forward pass alone, which is not called
    assert baseline.check()["losses_checked"] == "with dropout"
    assert compiled == []
    Inference(SMALL, Variant("reference", graphed=False, compiled=True))
    assert compiled == [{"fullgraph": True, "dynamic": False}]


def test_all_candidates_have_the_same_weights_and_images():
    variants = [variant.on("cpu") for variant in CANDIDATES.values()]
    states = [network(SMALL, variant).state_dict() for variant in variants]
    batches = [batch(SMALL, variant) for variant in variants]
    for state, tensors in zip(states, batches, strict=True):
        assert all(torch.equal(state[key], value) for key, value in states[0].items())
        assert all(map(torch.equal, tensors, batches[0]))
    assert 0.1 < batches[0][1].float().mean().item() < 0.9


def test_a_sample_is_the_time_of_one_call():
    for sampled in (in_a_row, one_by_one):
        sample = sampled(partial(time.sleep, 0.01), "cpu")
        assert 0.01 <= sample() < 1


@pytest.mark.parametrize(
    ("mode", "model", "candidates"),
    [
        ("training", "uctransnet", "ours,published"),
        ("inference", "dual_branch_uctransnet", "unfolded,published,composed"),
    ],
)
def test_a_race_goes_into_the_record(mode, model, candidates, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(module, "ROUNDS", {"cpu": 2})
    record = tmp_path / "record.jsonl"
    words = ["--mode", mode, "--model", model, "--candidates", candidates, "--record", str(record)]
    assert main([*words, *TINY]) == 0
    _, *lines = read_lines(record)
    assert [line["info"]["candidate"] for line in lines] == candidates.split(",")
    if mode == "inference":
        assert lines[1]["info"]["times_as_fast_as_published"] == 1
        assert lines[0]["info"]["times_as_fast_as_published"] > 0
    for line in lines:
        assert len(line["seconds"]) == len(line["info"]["baseline_seconds"]) == 2
        assert line["info"]["images_per_second"] == pytest.approx(1 / line["info"]["median_seconds"])
    assert f"| {mode}: {model}, 48, 1, float32, cpu | {candidates.split(',')[-1]} |" in capsys.readouterr().out


def test_ours_is_folded_in_inference_and_unfolded_is_not():
    def norms(variant):
        work = Inference(SMALL, variant.on("cpu"))
        return sum(isinstance(part, torch.nn.BatchNorm2d) for part in work._network.modules())

    assert norms(CANDIDATES[OURS]) == 0
    assert norms(OF_INFERENCE["unfolded"]) == norms(CANDIDATES["published"]) > 0


@pytest.mark.slow
def test_the_engine_and_a_plain_session_run_its_export(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("onnx", "session"):
        assert Inference(SMALL, OF_INFERENCE[name].on("cpu")).check()["relative_error"] <= 1e-4
    assert len(list(tmp_path.rglob("*.onnx"))) == 1


def test_a_profile_names_what_a_step_calls(tmp_path, capsys):
    assert main(["--mode", "profile", "--candidates", OURS, "--record", str(tmp_path / "record.jsonl"), *TINY]) == 0
    assert "aten::convolution_backward" in capsys.readouterr().out
    info = read_lines(tmp_path / "record.jsonl")[-1]["info"]
    assert info["launches"] > 100
    assert info["kernel_seconds"] >= sum(entry["seconds"] for entry in info["kernels"])


def test_the_peak_of_memory_is_that_of_a_process_of_its_own():
    assert in_own_process(peak_memory, replace(SMALL, base_channels=2), "published")["peak_bytes"] > 1e8


def test_stages_are_checkpointed(monkeypatch):
    seen = []
    monkeypatch.setattr(candidates.uctrans, "set_checkpointing", seen.append)
    network(replace(SMALL, checkpointing=True), CANDIDATES["composed"])
    assert [model.name for model in seen] == ["uctransnet"]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 100, 1000])
def test_the_search_finds_the_largest_batch_within_a_sixteenth(size):
    tried = []

    def fits(candidate):
        tried.append(candidate)
        return candidate <= size

    found = largest(fits, deadline=float("inf"))
    assert size - max(1, size / 16) <= found <= size
    assert len(tried) == len(set(tried)) < 20


def test_batches_without_memory_do_not_fit(monkeypatch):
    class Work:
        def __init__(self, problem, variant):
            self.batch = problem.batch
            assert not variant.graphed

        def __call__(self):
            if self.batch > 11:
                raise torch.OutOfMemoryError("no memory")

        def loss(self):
            return 0.5

    monkeypatch.setattr(module, "Training", Work)
    assert largest_batch(SMALL, "published") == {"largest_batch": 11}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--candidates", "ours,magic"], "'magic' is unknown; choose of ours"),
        (["--mode", "memory", "--largest", "--device", "cpu"], "--largest: fills the memory of a GPU"),
        (["--candidates", "ours,onnx"], "--candidates: onnx takes part in --mode inference only"),
        (["--mode", "sideways"], "invalid choice: 'sideways'"),
        (["--model", "unet"], "invalid choice: 'unet'"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_launches_are_printed_for_every_backend(capsys, monkeypatch):
    monkeypatch.setattr(module, "BACKENDS", ("reference",))
    assert main(["--mode", "launches", "--model", MODELS[0], *TINY]) == 0
    assert capsys.readouterr().out.startswith("| operators | reference |")
