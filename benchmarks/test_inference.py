"""Inference of the whole network: the latency of one image, and the throughput of batches.

    python -m pytest benchmarks/test_inference.py -m gpu --benchmark-only --record NAME.jsonl

Every candidate takes turns with the project's own, each with ``cudnn.benchmark`` as it is faster with; logits are
compared with exact ones first. :mod:`benchmarks.inference` says what is timed.
"""

import pytest

from .inference import ARENAS, GPU_PROBLEMS, KINDS, LATENCY, THROUGHPUT, target
from .networks import CANDIDATES, MODELS, OURS, NetworkProblem, is_compiled
from .race import CLOCK

# By batch. What compiles takes minutes: it comes after the rest of the same network, and where the batch is large after
# the first workloads of the operators.
FIRST_PLACES = {1: -95, 32: -85}
FIRST_PLACES_OF_COMPILED = {1: -82, 32: 17}
PLACES_BETWEEN_MODELS = 45
UCTRANSNET, DUAL_BRANCH = (NetworkProblem(model, 1, pixels=48, base_channels=2, device="cpu") for model in MODELS)
CPU_RACES = [
    (LATENCY, UCTRANSNET, OURS),
    (LATENCY, UCTRANSNET, "published"),
    (LATENCY, DUAL_BRANCH, "published"),
    (THROUGHPUT, UCTRANSNET, "composed bf16"),
]


def races() -> list:
    """Candidates on small problems on a CPU, and on those of a GPU, in the order of their importance."""
    on_cpu = [
        pytest.param(kind, problem, candidate, id=f"cpu-{kind}-{problem}-{candidate}")
        for kind, problem, candidate in CPU_RACES
    ]
    return on_cpu + [on_gpu(problem, candidate) for problem in GPU_PROBLEMS for candidate in CANDIDATES]


def on_gpu(problem: NetworkProblem, candidate: str):
    """One race, with its place in the order."""
    place = (FIRST_PLACES_OF_COMPILED if is_compiled(candidate) else FIRST_PLACES)[problem.batch]
    place += PLACES_BETWEEN_MODELS * MODELS.index(problem.model)
    kind = KINDS[problem.batch]
    marks = [pytest.mark.gpu, pytest.mark.priority(place)]
    return pytest.param(kind, problem, candidate, marks=marks, id=f"{kind}-{problem}-{candidate}")


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize(("kind", "problem", "candidate"), races())
def test_inference(request, benchmark, record, kind, problem, candidate):
    ARENAS[kind].race(benchmark, record, request.node.name, problem, candidate, target(problem, candidate))
