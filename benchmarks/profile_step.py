"""Where the time of a training step goes: kernels by their share, and how many are launched.

    python -m benchmarks.profile_step --model uctransnet --batch 4

The step is the one that races (:mod:`benchmarks.training_step`): for ours the project's own, captured as a CUDA graph
and replayed on a GPU. Its time is taken without the profiler. On a CPU, operators stand where kernels do.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch

from .kernel_shares import profile_table, shares
from .network_race import Worker
from .networks import CANDIDATES, MODELS, OURS, NetworkProblem, in_a_row
from .training_step import training

TIMED_SAMPLES = 10
STEPS_A_SAMPLE = 1
PROFILED_STEPS = 2


def profiled(problem: NetworkProblem, candidate: str) -> tuple[dict[str, Any], list[float]]:
    """What a step consists of (see :func:`benchmarks.kernel_shares.shares`), and the seconds of each timed step.

    On a GPU convolutions are chosen by ``cudnn.benchmark``, as in training.
    """
    return Worker(tuned_convolutions=True, in_own_thread=False)(partial(_profiled, problem, candidate))


def _profiled(problem: NetworkProblem, candidate: str) -> tuple[dict[str, Any], list[float]]:
    variant = CANDIDATES[candidate].on(problem.device)
    work = training(problem, variant)
    run = work.runner()
    sample = in_a_row(run, problem.device, STEPS_A_SAMPLE)  # it has warmed up, and is captured where it is to be
    seconds = [sample() for _ in range(TIMED_SAMPLES)]
    on_gpu = torch.device(problem.device).type == "cuda"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as profile:
        for _ in range(PROFILED_STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    about = {"candidate": candidate, "variant": str(variant), "backend": variant.backend, "dtype": variant.dtype}
    found = shares(profile.key_averages(), on_gpu, PROFILED_STEPS)
    return problem.as_json() | about | found | {"median_seconds": statistics.median(seconds)}, seconds


def main() -> None:
    """Print the profile of one step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODELS[0], choices=MODELS)
    parser.add_argument("--candidate", default=OURS, choices=CANDIDATES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--base-channels", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args())
    candidate = given.pop("candidate")
    info, _ = profiled(NetworkProblem(**given), candidate)
    print(f"{NetworkProblem(**given)}, {info['variant']}\n\n{profile_table(info)}")


if __name__ == "__main__":
    main()
