"""Loss and Dice of a training step in one read of the logits, against PyTorch's operations over whole maps.

    python -m pytest benchmarks/test_segmentation_sums.py -m gpu --benchmark-only --minutes 4 --record NAME.jsonl

On a CPU, composed against the plain steps, which it must not be slower than. On a GPU, the operators, composed, and the
plain steps as they are and compiled, in CUDA graphs as in :mod:`benchmarks.test_channel_attention`.
"""

import pytest
import torch

from uctrans.training.losses import loss_and_dice

from . import timing
from .candidates import OPERATOR
from .race import CLOCK, measure
from .segmentation_loss import LOSS_CANDIDATES, LossProblem, loss_calls, loss_entrant, plain_loss_and_dice

CPU_PROBLEMS = [LossProblem(32, 2, torch.float32, classes, "cpu") for classes in (1, 3)]
GPU_PROBLEMS = [
    LossProblem(224, 4, torch.bfloat16),
    LossProblem(224, 32, torch.bfloat16),
    LossProblem(224, 4, torch.bfloat16, classes=3),
    LossProblem(224, 32, torch.bfloat16, classes=3),
    LossProblem(224, 4, torch.float32),
    LossProblem(224, 32, torch.float32),
]
PLACES, FIRST_PLACE = 10, 8  # beside the places of attention and the skip path
LARGE_WORK = 1e7  # bytes; fewer rounds on a processor


def problems() -> list:
    """Those of the CPU, and those of a GPU in the order of their importance."""
    params = [pytest.param(problem, id=f"cpu-{problem}") for problem in CPU_PROBLEMS]
    for place, problem in enumerate(GPU_PROBLEMS):
        marks = [pytest.mark.gpu, pytest.mark.priority(PLACES * place + FIRST_PLACE)]
        params.append(pytest.param(problem, marks=marks, id=str(problem)))
    return params


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", LOSS_CANDIDATES)
@pytest.mark.parametrize("passes", ["both", "forward"])
@pytest.mark.parametrize("problem", problems())
def test_loss_and_dice(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"loss and Dice, {passes}"
    work = problem.work(passes)
    count = timing.calls_a_sample(work.bytes, problem.device)
    torch._dynamo.reset()
    entrant = loss_entrant(problem, candidate, passes, count)
    try:
        operator = loss_entrant(problem, OPERATOR, passes, count)
    except (AssertionError, RuntimeError) as error:
        operator = f"{type(error).__name__}: {str(error)[:500]}"
    measure(benchmark, record, request.node.name, problem, passes, candidate, entrant, operator, work, None)


@pytest.mark.parametrize("passes", ["forward", "both"])
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("batch", [4, 32])
def test_loss_and_dice_on_a_processor(benchmark, race, batch, classes, passes):
    problem = LossProblem(224, batch, torch.float32, classes, "cpu")
    benchmark.group = f"loss and Dice, {classes} classes, {passes}"
    (call,) = loss_calls(problem, 1)

    def loss_alone(function):
        return lambda *arguments: function(*arguments)[0]

    ours, theirs = loss_alone(loss_and_dice), loss_alone(plain_loss_and_dice)
    for result, expected in zip(
        timing.run_pass(ours, passes, call), timing.run_pass(theirs, passes, call), strict=True
    ):
        torch.testing.assert_close(result, expected)
    race(
        lambda: timing.run_pass(ours, passes, call),
        lambda: timing.run_pass(theirs, passes, call),
        rounds=15 if problem.work(passes).bytes > LARGE_WORK else 41,
        at_least=1.0,
        pixels=224,
        batch=batch,
        classes=classes,
        passes=passes,
    )
