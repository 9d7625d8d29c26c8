"""The benchmarks of the skip path: work by hand, every candidate exact, targets where they are claimed."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.roofline import Work, reconstruction_work, skip_gate_work
from benchmarks.skip_path import (
    CLAIMED,
    GPU_PROBLEMS,
    SKIP_CANDIDATES,
    TOLERANCES_OF_THE_WHOLE_PATH,
    SkipProblem,
    operator_or_reason,
    skip_calls,
    skip_entrant,
    skip_path,
    target,
)

SMALL = {"channels": (4, 8), "patch": 4, "device": "cpu"}
UNCOMPILED = [name for name in SKIP_CANDIDATES if "compiled" not in name]


def test_work_of_a_gate_by_hand():
    sizes = (2, 4, 8, 3, 5, 4, 2, torch.bfloat16)
    encoder, upsampled = 2 * 3 * 32, 2 * 5 * 32
    tokens, decoder = encoder // 16, upsampled // 4
    flop = 2 * 2 * 3 * 8
    read_forward, written_forward = 2 * (encoder + tokens + decoder), encoder + upsampled
    assert skip_gate_work("forward", *sizes) == Work(flop, 2 * (read_forward + written_forward))
    read_backward = 2 * encoder + 2 * (encoder + tokens) + upsampled
    written_backward = encoder + tokens + decoder
    assert skip_gate_work("backward", *sizes) == Work(2 * flop, 2 * (read_backward + written_backward))
    assert skip_gate_work("both", *sizes) == skip_gate_work("forward", *sizes) + skip_gate_work("backward", *sizes)


def test_work_of_a_reconstruction_by_hand():
    token_map = 3 * 49 * 8 * 4
    assert reconstruction_work("forward", 3, 49, 8, torch.float32) == Work(2 * 3 * 49 * 64, 2 * token_map)
    assert reconstruction_work("both", 3, 49, 8, torch.float32) == Work(6 * 3 * 49 * 64, 5 * token_map)


@pytest.mark.parametrize("work", [skip_gate_work, reconstruction_work])
def test_unknown_passes_are_refused(work):
    sizes = (1, 4, 4, 2, 2, 2, 2) if work is skip_gate_work else (1, 4, 2)
    with pytest.raises(ValueError, match="sideways"):
        work("sideways", *sizes, torch.float32)


def test_work_of_all_scales_is_the_sum_of_each():
    first, second, both = (SkipProblem(32, 2, torch.float32, scales) for scales in ((0,), (1,), (0, 1)))
    assert both.work("both") == first.work("both") + second.work("both")
    whole = SkipProblem(32, 2, torch.float32, (0,), with_reconstruction=True).work("both")
    assert whole == first.work("both") + reconstruction_work("both", 2, 4, 64, torch.float32)


@pytest.mark.parametrize("with_reconstruction", [False, True], ids=["gate", "whole path"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("passes", timing.PASSES)
@pytest.mark.parametrize("candidate", UNCOMPILED)
def test_candidates_are_exact(candidate, passes, channels_last, with_reconstruction):
    problem = SkipProblem(16, 3, torch.float32, (0, 1), channels_last, with_reconstruction, **SMALL)
    entrant = skip_entrant(problem, candidate, passes, count=1)
    assert entrant.sample() > 0
    limit = TOLERANCES_OF_THE_WHOLE_PATH[torch.float32] if with_reconstruction else 1e-5
    assert 0 <= entrant.notes["relative_error"] <= limit
    assert entrant.notes["variant"] == {"reference": "reference"}.get(candidate, "composed")


def test_another_function_does_not_race(monkeypatch):
    def skip_gate(encoder_feature, tokens, decoder_feature, *weights, backend, **settings):
        gate = 0.5 if backend == "reference" else 1.0
        return torch.cat([gate * encoder_feature, F.interpolate(decoder_feature, scale_factor=2.0)], dim=1)

    problem = SkipProblem(16, 2, torch.float32, (0,), **SMALL)
    monkeypatch.setattr("uctrans.layers.gate.skip_gate", skip_gate)
    assert skip_entrant(problem, "reference", "forward", count=1).sample() > 0
    with pytest.raises(AssertionError, match="relative errors"):
        skip_entrant(problem, "composed", "forward", count=1)
    assert "relative errors" in operator_or_reason(problem, "forward", count=1)


def test_maps_have_the_layout_and_the_sizes_of_their_scale():
    problem = SkipProblem(16, 2, torch.float32, (0, 1), **SMALL)
    (call,) = skip_calls(problem, 1)
    sizes = [tuple(feature.shape) for feature in call.arguments]
    assert sizes == [(2, 4, 16, 16), (2, 4, 4, 4), (2, 4, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 4, 4)]
    assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in call.arguments)
    outputs = skip_path(problem)(*call.arguments)
    assert [output.shape for output in outputs] == [gradient.shape for gradient in call.output_gradient]


def test_targets_are_those_of_the_claims():
    first, every, whole = CLAIMED
    assert target(first, "operator") == 0.75
    assert target(every, "operator") == 0.60
    assert target(first, "reference") == target(every, "reference") == 3.0
    assert target(first, "reference compiled") == 1.3
    assert target(whole, "reference compiled") == 3.0
    assert target(whole, "operator") is None
    assert target(SkipProblem(224, 4, torch.bfloat16, (0,)), "operator") is None
    assert GPU_PROBLEMS[:3] == CLAIMED
    assert len(GPU_PROBLEMS) == 2 * 2 * 2 * 3 * 5 + 2 * 2 * 4 + 1
