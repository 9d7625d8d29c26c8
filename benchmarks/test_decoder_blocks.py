"""Are what follows convolutions, convolutions over an upsampled half, patch embedding and head worth an operator?

    python -m pytest benchmarks/test_decoder_blocks.py -m gpu --benchmark-only --record NAME.jsonl

Plain PyTorch alone (:mod:`benchmarks.decoder_blocks`): it measures what an operator could win before one is written.
Every candidate takes turns with the baseline, the first of its list. Convolutions are those that cuDNN finds fastest,
as in training.
"""

import pytest
import torch

from . import timing
from .decoder_blocks import (
    BLOCKS,
    CONVOLUTIONS,
    EMBEDDINGS,
    HEADS,
    BlockProblem,
    block,
    block_call,
    convolution_call,
    convolution_work,
    epilogue_work,
    product_call,
    product_work,
)
from .gate import relative_error
from .race import CLOCK, paired, work_notes
from .roofline import copy_bandwidth

PASSES = ("forward", "both")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FIRST_PATCH, CLASSES = 16, 1  # as published, of the finest scale; and a binary mask
ROUNDS = {"cuda": 30, "cpu": 9}

CPU_PROBLEMS = [BlockProblem(224, 1, torch.float32, scale, device="cpu") for scale in range(4)]
GPU_PROBLEMS = [BlockProblem(224, batch, torch.bfloat16, scale) for batch in (32, 4) for scale in range(4)]


@pytest.fixture(autouse=True)
def tuned_convolutions(monkeypatch):
    """As ``uctrans train`` sets it: an untuned convolution would make any way around it look better."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def problems(on_cpu) -> list:
    on_gpu = [pytest.param(problem, marks=pytest.mark.gpu, id=str(problem)) for problem in GPU_PROBLEMS]
    return [*(pytest.param(problem, id=f"cpu-{problem}") for problem in on_cpu), *on_gpu]


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", CONVOLUTIONS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", problems(CPU_PROBLEMS))
def test_convolution_over_an_upsampled_half(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"convolution over an upsampled half, {passes}"
    race_of_equals(
        *(request, benchmark, record, problem, passes, candidate),
        CONVOLUTIONS,
        lambda name: convolution_call(problem, name),
        convolution_work(problem, passes),
    )


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", EMBEDDINGS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", problems(CPU_PROBLEMS))
def test_patch_embedding(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"patch embedding, {passes}"
    sizes = FIRST_PATCH >> problem.scale, problem.channels[problem.scale]
    race_of_equals(
        *(request, benchmark, record, problem, passes, candidate),
        EMBEDDINGS,
        lambda name: product_call(problem, *sizes),
        product_work(problem, *sizes, passes),
    )


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", HEADS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("problem", [problem for problem in problems(CPU_PROBLEMS) if problem.values[0].scale == 0])
def test_output_head(request, benchmark, record, problem, passes, candidate):
    benchmark.group = f"output head, {passes}"
    sizes = 1, CLASSES
    race_of_equals(
        *(request, benchmark, record, problem, passes, candidate),
        HEADS,
        lambda name: product_call(problem, *sizes),
        product_work(problem, *sizes, passes),
    )


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.usefixtures("in_budget")
@pytest.mark.parametrize("candidate", BLOCKS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("with_pool", [False, True], ids=["without_pool", "with_pool"])
@pytest.mark.parametrize("problem", problems(CPU_PROBLEMS[::2]))
def test_epilogue(request, benchmark, record, problem, with_pool, passes, candidate):
    pool = "-pool" if with_pool else ""
    benchmark.group = f"convolution-batch norm-ReLU{pool}, {passes}"
    torch._dynamo.reset()

    def sample_of(name):
        function, weights = block(problem, name, with_pool)
        return timing.sampler(function, passes, [block_call(problem, name, with_pool, weights)])

    work = epilogue_work(problem, with_pool, passes)
    entrant, baseline = sample_of(candidate), sample_of(BLOCKS[0])
    finish(request, benchmark, record, problem, passes, candidate, entrant, baseline, work, {})


def race_of_equals(request, benchmark, record, problem, passes, candidate, candidates, call, work):
    """Race one of ``candidates``, functions of the same, against the first, after their outputs were compared."""
    baseline = next(iter(candidates))
    samples = {
        name: timing.sampler(candidates[name], passes, [call(name)]) for name in dict.fromkeys((candidate, baseline))
    }
    for sample in samples.values():
        sample()
    error = relative_error(samples[candidate].results[0], samples[baseline].results[0].double())
    assert error <= TOLERANCES[problem.dtype], f"the output is off by {error}"
    notes = {"relative_error": error}
    finish(request, benchmark, record, problem, passes, candidate, samples[candidate], samples[baseline], work, notes)


def finish(request, benchmark, record, problem, passes, candidate, entrant, baseline, work, notes):
    """Race the entrant against the baseline; ``times_baseline`` is its time over the baseline's, median of pairs."""
    outcome = paired(benchmark, entrant, baseline, ROUNDS[problem.device])
    bandwidth = copy_bandwidth(work.bytes, problem.device)
    notes |= problem.as_json() | {"passes": passes, "candidate": candidate}
    notes |= work_notes(work, record.ceilings, record.measured, problem.dtype, outcome["median_seconds"])
    notes |= {"least_seconds": work.bytes / bandwidth, "copy_bandwidth": bandwidth, "threads": torch.get_num_threads()}
    notes["times_baseline"] = outcome.pop("ratio")
    notes["times_baseline_quartiles"] = outcome.pop("ratio_quartiles")
    notes["cudnn"] = f"cudnn.benchmark {'on' if torch.backends.cudnn.benchmark else 'off'}"
    seconds = outcome.pop("seconds")
    benchmark.extra_info |= notes | outcome
    record.measured_test(request.node.name, benchmark.group, notes | outcome, seconds)
