"""The kernels of a training step by their share, for the record; :mod:`benchmarks.profile_step` says what is profiled.

python -m pytest benchmarks/test_profile_step.py -m gpu --record NAME.jsonl
"""

import pytest

from .networks import MODELS, OURS, NetworkProblem
from .profile_step import profiled

# What a user gets first; the published operations in the same precision for comparison.
CANDIDATES = (OURS, "reference bf16")
GPU_CASES = [
    (NetworkProblem(model, batch), candidate) for candidate in CANDIDATES for batch in (4, 32) for model in MODELS
]
CPU_PROBLEM = NetworkProblem(MODELS[0], 1, pixels=32, base_channels=2, device="cpu")


@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize(
    ("problem", "candidate"),
    [
        pytest.param(CPU_PROBLEM, OURS, id=f"cpu-{CPU_PROBLEM}"),
        *(pytest.param(*case, marks=pytest.mark.gpu, id="-".join(map(str, case))) for case in GPU_CASES),
    ],
)
def test_profile_of_a_training_step(request, record, problem, candidate):
    info, seconds = profiled(problem, candidate)
    assert info["launches"] > 0
    record.measured_test(request.node.name, "profile of a training step", info, seconds)
