"""One channel attention block, projections included, against the published sequence of operations.

On a CPU, the composed form in plain calls, held to what is claimed. On a GPU, what ``backend="auto"`` gives there, in
CUDA graphs as in :mod:`benchmarks.test_channel_attention`, against the published sequence as it is and compiled.
"""

import pytest
import torch

from . import timing
from .candidates import OPERATOR, Problem
from .race import CLOCK, measure
from .roofline import block_work
from .test_channel_attention import GPU_PROBLEMS, PLACES
from .workloads import MODES, assert_same_function, attention_block, attention_tokens, block_entrant, call, on_backends

BLOCK_CANDIDATES = {
    OPERATOR: ("auto", False),
    "reference": ("reference", False),
    "reference compiled": ("reference", True),
}
BLOCK_PASSES = ("forward", "both")
TARGET_OVER_REFERENCE = 4.0  # at 1024 pixels in bfloat16

CPU_PROBLEM = Problem(64, 2, torch.float32, segments=(8, 16, 32, 64), device="cpu")
# The first after the races that claims are made of, the others among those that follow.
GPU_BLOCKS = {
    Problem(1024, 4, torch.bfloat16): 2,
    Problem(1024, 32, torch.bfloat16): 4,
    Problem(1024, 1, torch.bfloat16): 5,
    Problem(1024, 4, torch.float32): 7,
    Problem(1024, 4, torch.bfloat16, 0.1): 8,
    Problem(1024, 1, torch.float32): 10,
    Problem(1024, 32, torch.float32): 11,
    Problem(224, 32, torch.bfloat16): 12,
}


def block_problems() -> list:
    """That of the CPU, and those of a GPU with their place among the races of the operator alone."""
    assert max(GPU_BLOCKS.values()) <= len(GPU_PROBLEMS)
    return [
        pytest.param(CPU_PROBLEM, id=f"cpu-{CPU_PROBLEM}"),
        *(
            pytest.param(problem, marks=[pytest.mark.gpu, pytest.mark.priority(PLACES * place - 1)], id=str(problem))
            for problem, place in GPU_BLOCKS.items()
        ),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("pixels", "batch", "rounds", "at_least"), [(224, 4, 15, 1.0), (512, 1, 15, 1.65), (1024, 1, 9, 4.0)]
)
def test_attention_block(benchmark, race, pixels, batch, rounds, at_least, mode):
    benchmark.group = f"attention block, {mode}"
    inputs = attention_tokens(pixels, batch)
    composed, reference = on_backends(attention_block(), "composed", "reference")
    assert_same_function([composed, reference], inputs)
    sizes = {"pixels": pixels, "batch": batch, "mode": mode}
    race(call(composed, inputs, mode), call(reference, inputs, mode), rounds, at_least, **sizes)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", BLOCK_CANDIDATES)
@pytest.mark.parametrize("passes", BLOCK_PASSES)
@pytest.mark.parametrize("problem", block_problems())
def test_attention_block_in_graphs(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"attention block, {passes}"
    work = block_work("inference" if passes == "forward" else "training", *problem.sizes)
    count = timing.calls_a_sample(work.bytes, problem.device)
    torch._dynamo.reset()
    backend, compile_it = BLOCK_CANDIDATES[candidate]
    entrant = block_entrant(problem, backend, passes, count, compile_it)
    operator = block_entrant(problem, BLOCK_CANDIDATES[OPERATOR][0], passes, count)
    claimed = candidate == "reference" and problem.pixels == 1024 and problem.dtype == torch.bfloat16
    target = TARGET_OVER_REFERENCE if claimed else None
    measure(benchmark, record, request.node.name, problem, passes, candidate, entrant, operator, work, target)
