"""One training step of the whole network, against baselines that are hard to beat.

    python -m pytest benchmarks/test_training_step.py -m gpu --benchmark-only --record NAME.jsonl

Every candidate takes turns with the project's own step, each with ``cudnn.benchmark`` as it is faster with; the losses
of a few steps are compared with exact ones first. :mod:`benchmarks.training_step` says what each of them does.
"""

import pytest

from .networks import CANDIDATES, MODELS, OURS, NetworkProblem, is_compiled
from .race import CLOCK
from .training_step import ARENA, GPU_PROBLEMS, target

# By batch. What compiles takes minutes: it comes after the rest of the same network, and where the batch is large after
# the first workloads of the operators.
FIRST_PLACES = {4: -100, 32: -90}
FIRST_PLACES_OF_COMPILED = {4: -84, 32: 12}
PLACES_BETWEEN_MODELS = 45
UCTRANSNET, DUAL_BRANCH = (NetworkProblem(model, 2, pixels=48, base_channels=2, device="cpu") for model in MODELS)
CPU_RACES = [(UCTRANSNET, OURS), (UCTRANSNET, "published"), (DUAL_BRANCH, "composed bf16")]


def races() -> list:
    """Candidates on small problems on a CPU, and on those of a GPU, in the order of their importance."""
    on_cpu = [pytest.param(problem, candidate, id=f"cpu-{problem}-{candidate}") for problem, candidate in CPU_RACES]
    return on_cpu + [on_gpu(problem, candidate) for problem in GPU_PROBLEMS for candidate in CANDIDATES]


def on_gpu(problem: NetworkProblem, candidate: str):
    """One race, with its place in the order."""
    place = (FIRST_PLACES_OF_COMPILED if is_compiled(candidate) else FIRST_PLACES)[problem.batch]
    place += PLACES_BETWEEN_MODELS * MODELS.index(problem.model)
    marks = [pytest.mark.gpu, pytest.mark.priority(place)]
    return pytest.param(problem, candidate, marks=marks, id=f"{problem}-{candidate}")


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize(("problem", "candidate"), races())
def test_training_step(request, benchmark, record, problem, candidate):
    ARENA.race(benchmark, record, request.node.name, problem, candidate, target(problem, candidate))
