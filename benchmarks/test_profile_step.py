"""The kernels of a training step by their share, for the record; :mod:`benchmarks.profile_step` says what is profiled.

python -m pytest benchmarks/test_profile_step.py -m gpu --record NAME.jsonl
"""

import pytest
import torch

from .profile_step import StepProblem, profiled

MODELS = ("uctransnet", "dual_branch_uctransnet")
# What a user gets first; the published operations for comparison.
GPU_PROBLEMS = [
    StepProblem(model, batch, backend) for backend in ("auto", "reference") for batch in (4, 32) for model in MODELS
]
CPU_PROBLEM = StepProblem("uctransnet", 1, pixels=32, base_channels=2, dtype=torch.float32, device="cpu")


@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(CPU_PROBLEM, id=f"cpu-{CPU_PROBLEM}"),
        *(pytest.param(problem, marks=pytest.mark.gpu, id=str(problem)) for problem in GPU_PROBLEMS),
    ],
)
def test_profile_of_a_training_step(request, record, problem):
    info, seconds = profiled(problem)
    assert info["launches"] > 0
    record.measured_test(request.node.name, "profile of a training step", problem.as_json() | info, seconds)
