"""Peak memory: the search for the largest batch, what a measurement is given, and what it says when it fails."""

from dataclasses import replace

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.networks import MODELS, OURS, NetworkProblem
from benchmarks.peak_memory import MemoryProblem, largest_batch, measured_apart, peak, search, target

SMALL = MemoryProblem(NetworkProblem("uctransnet", 2, pixels=32, base_channels=2, device="cpu"))


def always():
    return True


@pytest.mark.parametrize("largest", [1, 7, 8, 9, 31, 100, 1000])
def test_the_search_finds_the_largest_batch_within_a_sixteenth(largest):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= largest

    fitting, too_large = search(fits, always)
    assert fitting <= largest < too_large
    assert too_large - fitting <= max(1, fitting / 16)
    assert len(tried) == len(set(tried)) < 20


def test_nothing_fits():
    assert search(lambda size: False, always) == (0, 1)


def test_a_search_that_runs_out_of_time_says_what_it_knows():
    answers = iter([True, True, True, False])
    assert search(lambda size: size <= 20, lambda: next(answers)) == (16, 32)
    answers = iter([True, True, False])
    assert search(lambda size: True, lambda: next(answers)) == (16, None)


class Work:
    """A training step whose memory ends at eight images, with an error that is no lack of memory from forty on."""

    def __init__(self, problem, variant):
        self.batch, self.model = problem.batch, None
        assert not variant.graphed

    def runner(self):
        return self.run

    def run(self):
        if self.batch >= 40:
            raise RuntimeError("an index is too large")
        if self.batch > 11:
            raise torch.OutOfMemoryError("no memory")

    def loss(self):
        return 0.5


def test_batches_without_memory_do_not_fit(monkeypatch):
    monkeypatch.setattr(peak_memory, "training", Work)
    assert largest_batch(SMALL, "published") == {"largest_batch": 11, "too_large_batch": 12, "errors": []}


def test_other_errors_end_the_search_and_are_told(monkeypatch):
    monkeypatch.setattr(peak_memory, "training", Work)
    monkeypatch.setattr(peak_memory, "FIRST_BATCH", 64)
    found = largest_batch(SMALL, "published")
    assert found["largest_batch"] == 0
    assert found["errors"] == ["64 images: RuntimeError: an index is too large"]


def test_a_loss_that_is_not_finite_does_not_count(monkeypatch):
    monkeypatch.setattr(peak_memory, "training", Work)
    monkeypatch.setattr(Work, "loss", lambda self: float("nan"))
    assert "not finite" in largest_batch(SMALL, "published")["errors"][0]


def test_a_process_of_its_own_measures():
    measured = measured_apart(SMALL, "published")
    assert measured["peak_bytes"] > 1e8  # torch alone
    assert measured["variant"] == "reference, float32, contiguous, eager"


def test_a_process_that_fails_says_why():
    broken = replace(SMALL, network=replace(SMALL.network, base_channels=0))
    with pytest.raises(RuntimeError, match=r"(?s)published in uctransnet-0ch.*base_channels must be"):
        measured_apart(broken, "published")


def test_stages_are_checkpointed(monkeypatch):
    seen = []
    monkeypatch.setattr(peak_memory.uctrans, "set_checkpointing", seen.append)
    peak(replace(SMALL, checkpointing=True), "composed bf16")
    assert [model.name for model in seen] == ["uctransnet"]


def test_the_command_line_gets_the_problem(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(peak_memory, "largest_batch", lambda problem, candidate: given.append((problem, candidate)))
    problem = MemoryProblem(NetworkProblem("dual_branch_uctransnet", 3, 64, 8, "cpu"), checkpointing=True)
    monkeypatch.setattr("sys.argv", ["peak_memory", *problem.arguments("published", largest=True)])
    peak_memory.main()
    assert given == [(problem, "published")]
    assert capsys.readouterr().out == "null\n"


def test_targets_are_those_of_the_claims():
    for model in MODELS:
        claimed = MemoryProblem(NetworkProblem(model, 32))
        assert target(claimed, "published") == 0.4
        assert target(claimed, "compiled") == target(claimed, "compiled, own graphs") == 0.8
        assert target(claimed, OURS) is None
        assert target(replace(claimed, checkpointing=True), "published") is None
        assert target(MemoryProblem(NetworkProblem(model, 4)), "published") is None
