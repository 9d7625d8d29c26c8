"""The benchmark of batch norm and ReLU: work by hand, every candidate exact, targets where they are claimed."""

from dataclasses import replace

import pytest
import torch

from benchmarks import timing
from benchmarks.norm_relu import (
    GPU_PROBLEMS,
    NORM_CANDIDATES,
    NormProblem,
    norm_calls,
    norm_entrant,
    operator_or_reason,
    target,
)
from benchmarks.roofline import Work

SMALL = NormProblem(16, 3, torch.float32, 1, channels=(4, 6), device="cpu")
POOLED = replace(SMALL, pools=True)
UNCOMPILED = [name for name in NORM_CANDIDATES if "compiled" not in name]


def test_work_by_hand():
    elements = 3 * 6 * 8 * 8
    assert SMALL.work("forward") == Work(0.0, 3 * elements * 4)
    assert SMALL.work("both") == SMALL.work("forward") + SMALL.work("backward") == Work(0.0, 8 * elements * 4)
    windows = elements // 4
    assert POOLED.work("forward") == Work(0.0, (3 * elements + windows) * 4)
    assert POOLED.work("backward") == Work(0.0, (5 * elements + 2 * windows) * 4)
    assert POOLED.work("both") == POOLED.work("forward") + POOLED.work("backward")


@pytest.mark.parametrize("problem", [SMALL, POOLED], ids=str)
@pytest.mark.parametrize("passes", timing.PASSES)
@pytest.mark.parametrize("candidate", UNCOMPILED)
def test_candidates_are_exact(candidate, passes, problem):
    entrant = norm_entrant(problem, candidate, passes, count=1)
    assert entrant.sample() > 0
    assert 0 <= entrant.notes["relative_error"] <= 1e-5
    assert entrant.notes["variant"] == {"reference": "reference"}.get(candidate, "composed")


def test_another_function_does_not_race(monkeypatch):
    def without_the_relu(feature, weight, bias, *statistics, training, momentum, eps, backend):
        output = torch.nn.functional.batch_norm(feature, *statistics, weight, bias, training, momentum, eps)
        return output.relu() if backend == "reference" else output

    monkeypatch.setattr("benchmarks.norm_relu.batch_norm_relu", without_the_relu)
    assert norm_entrant(SMALL, "reference", "forward", count=1).sample() > 0
    with pytest.raises(AssertionError, match="relative errors"):
        norm_entrant(SMALL, "composed", "forward", count=1)
    assert "relative errors" in operator_or_reason(SMALL, "forward", count=1)


def test_maps_of_the_network_s_levels():
    (call,) = norm_calls(SMALL, 1)
    assert call.arguments[0].shape == call.output_gradient.shape == (3, 6, 8, 8)
    assert call.arguments[0].is_contiguous(memory_format=torch.channels_last)
    (call,) = norm_calls(POOLED, 1)
    assert [gradient.shape for gradient in call.output_gradient] == [(3, 6, 8, 8), (3, 6, 4, 4)]
    shapes = [problem.shape for problem in GPU_PROBLEMS[:5]]
    assert [shape[1:3] for shape in shapes] == [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]
    assert {problem.batch for problem in GPU_PROBLEMS} == {4, 32}
    # The map below the last scale is not pooled.
    assert [problem.shape for problem in GPU_PROBLEMS if problem.pools][:4] == shapes[:4]
    assert len({str(problem) for problem in GPU_PROBLEMS}) == len(GPU_PROBLEMS) == 2 * (5 + 4)


def test_targets_are_those_of_the_claims():
    first, *_, last = GPU_PROBLEMS
    assert target(first, "operator") == 0.8
    assert target(first, "composed") == 1.3
    assert target(first, "composed compiled") == 1.0
    assert target(replace(first, pools=True), "composed") == 1.87
    assert target(first, "reference") is None
    assert target(last, "operator") is None
    assert target(SMALL, "operator") is None
