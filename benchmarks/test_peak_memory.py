"""Peak memory of a training step, and the largest batch of 224-pixel images that fits, with and without checkpointing.

    python -m pytest benchmarks/test_peak_memory.py -m gpu --benchmark-only --record NAME.jsonl

Every measurement is made in a process of its own (:mod:`benchmarks.peak_memory`).
"""

import functools

import pytest

from . import inference, training_step
from .network_race import release
from .networks import CANDIDATES, MODELS, OURS, OURS_COMPILED, NetworkProblem, is_compiled
from .peak_memory import MemoryProblem, measured_apart, target
from .race import target_notes

PLACE, PLACE_OF_COMPILED, PLACE_OF_CHECKPOINTING, PLACE_OF_LARGEST = -80, 22, -75, 32
SEARCHED = (OURS, "published", "composed bf16")
CPU_NETWORK = NetworkProblem(MODELS[0], 2, pixels=32, base_channels=2, device="cpu")


def on_gpu(problem: MemoryProblem, candidate: str, place: int):
    """One measurement, with its place in the order: the plain network comes before the dual-branch one."""
    marks = [pytest.mark.gpu, pytest.mark.priority(place + 45 * MODELS.index(problem.network.model))]
    return pytest.param(problem, candidate, marks=marks, id=f"{problem}-{candidate}")


def steps() -> list:
    """Peaks: of every candidate, and of those that are not compiled with checkpointing."""
    params = [pytest.param(MemoryProblem(CPU_NETWORK), "published", id=f"cpu-{CPU_NETWORK}-published")]
    for network in [NetworkProblem(model, batch) for model in MODELS for batch in (32, 4)]:
        for candidate in CANDIDATES:
            place = PLACE_OF_COMPILED if is_compiled(candidate) else PLACE
            params.append(on_gpu(MemoryProblem(network), candidate, place))
            if candidate in SEARCHED:
                params.append(on_gpu(MemoryProblem(network, True), candidate, PLACE_OF_CHECKPOINTING))
    return params


def searches() -> list:
    """Largest batches, with and without checkpointing."""
    return [
        on_gpu(MemoryProblem(NetworkProblem(model, 0), checkpointing), candidate, PLACE_OF_LARGEST)
        for model in MODELS
        for candidate in SEARCHED
        for checkpointing in (False, True)
    ]


@functools.lru_cache(maxsize=1)
def ours(problem: MemoryProblem) -> dict:
    """The peak of ours; it is asked for once for all the candidates that follow each other."""
    return measured_apart(problem, OURS)


@pytest.fixture
def free_memory():
    """All of the GPU but what this process cannot do without."""
    for arena in (training_step.ARENA, *inference.ARENAS.values()):
        arena.close()
    release()


@pytest.mark.usefixtures("in_budget", "free_memory")
@pytest.mark.parametrize(("problem", "candidate"), steps())
def test_peak_memory_of_a_training_step(request, benchmark, record, problem, candidate):
    benchmark.group = "peak memory of a training step"
    measure = ours if candidate == OURS else functools.partial(measured_apart, candidate=candidate)
    measured = benchmark.pedantic(measure, args=(problem,), rounds=1)
    assert measured["peak_bytes"] > 0
    notes = problem.as_json() | {"candidate": candidate} | measured
    if candidate not in (OURS, OURS_COMPILED):
        own = ours(problem)
        notes |= {"ours_peak_bytes": own["peak_bytes"], "ours_share": own["peak_bytes"] / measured["peak_bytes"]}
        notes |= target_notes(target(problem, candidate), notes["ours_share"], at_most=True)
        notes["target_of"] = f"share of the peak of {candidate}"
    benchmark.extra_info |= notes
    record.measured_test(request.node.name, benchmark.group, notes, [])


@pytest.mark.usefixtures("in_budget", "free_memory")
@pytest.mark.parametrize(("problem", "candidate"), searches())
def test_largest_batch_in_training(request, benchmark, record, problem, candidate):
    benchmark.group = "largest batch in training"
    found = benchmark.pedantic(measured_apart, args=(problem, candidate, True), rounds=1)
    assert found["largest_batch"] > 0
    # The batch is what is found, not what is given.
    notes = problem.as_json() | {"batch": found["largest_batch"], "candidate": candidate} | found
    benchmark.extra_info |= notes
    record.measured_test(request.node.name, benchmark.group, notes, [])
