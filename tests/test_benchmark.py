"""The benchmark command: what it times, what it refuses, what it writes."""

import json

import pytest
import torch

from uctrans.benchmark import BenchmarkConfig, BenchmarkError, available_backends, benchmark

CPU = torch.device("cpu")
SMALL = {"base_channels": 2, "sizes": (32, 48), "rounds": 3, "threads": 1, "device": "cpu"}


@pytest.fixture(autouse=True)
def plain_processor(monkeypatch):
    """Neither what other tests set for the interpreter of Triton, nor a backend from the environment."""
    for variable in ("TRITON_INTERPRET", "UCTRANS_BACKEND"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("model", ["uctransnet", "attention"])
def test_every_backend_is_timed_at_every_size(model, mode):
    result = benchmark(BenchmarkConfig(model=model, mode=mode, **SMALL))
    timed = [(timing.size, timing.backend) for timing in result.timings]
    assert timed == [(size, backend) for size in (32, 48) for backend in available_backends(CPU)]
    for timing in result.timings:
        assert len(timing.milliseconds) == len(timing.ratios) == 3
        assert min(timing.milliseconds) > 0
    table = str(result)
    assert all(f"{size:>6}  {backend}" in table for size, backend in timed)


def test_ratios_are_taken_against_the_baseline_in_the_same_round():
    baseline, other = benchmark(BenchmarkConfig(**{**SMALL, "sizes": (32,)})).timings
    assert baseline.backend == "reference"
    assert baseline.ratios == [1.0] * 3
    for ratio, ours, theirs in zip(other.ratios, other.milliseconds, baseline.milliseconds, strict=True):
        assert ratio == pytest.approx(theirs / ours)


class TestAvailableBackends:
    def test_the_processor_runs_the_paper_and_the_composed_form(self):
        assert available_backends(CPU) == ["reference", "composed"]

    @pytest.mark.gpu
    @pytest.mark.parametrize("model", ["uctransnet", "attention"])
    def test_a_gpu_runs_triton_too(self, model):
        pytest.importorskip("triton")
        assert available_backends(torch.device("cuda")) == ["reference", "composed", "triton"]
        timings = benchmark(BenchmarkConfig(**{**SMALL, "model": model, "device": "cuda"})).timings
        assert {timing.backend for timing in timings} == {"reference", "composed", "triton"}

    def test_so_does_the_interpreter(self, monkeypatch):
        """It stands in for the GPU here."""
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert available_backends(CPU) == ["reference", "composed", "triton"]


def test_chosen_backends_and_output(tmp_path):
    output = tmp_path / "results"
    benchmark(BenchmarkConfig(**{**SMALL, "sizes": (32,), "backends": ("composed",), "output": str(output)}))
    (written,) = output.iterdir()
    content = json.loads(written.read_text())
    assert [timing["backend"] for timing in content["timings"]] == ["composed"]
    assert content["config"]["base_channels"] == 2
    assert content["machine"]["torch"] == torch.__version__


def test_the_number_of_threads_is_given_back():
    before = torch.get_num_threads()
    benchmark(BenchmarkConfig(**{**SMALL, "threads": before + 1, "rounds": 1}))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"model": "unet"}, "no backends to compare"),
        ({"model": "resnet"}, "uctransnet, attention"),
        ({"mode": "both"}, "inference, training"),
        ({"sizes": ()}, "sizes"),
        ({"sizes": (0,)}, "sizes"),
        ({"model": "attention", "sizes": (30,)}, "multiples of 16"),
        ({"rounds": 0}, "rounds"),
        ({"batch": 0}, "batch"),
        ({"base_channels": 0}, "base_channels"),
        ({"threads": 0}, "threads"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"backends": ("triton",)}, "triton cannot run on cpu here; choose of reference, composed"),
        ({"backends": ("triton",), "model": "attention"}, "triton cannot run on cpu here"),
        ({"backends": ("fast",)}, "fast"),
    ],
)
def test_what_does_not_fit_is_refused(setting, named):
    with pytest.raises(BenchmarkError, match=named):
        benchmark(BenchmarkConfig(**{**SMALL, **setting}))
