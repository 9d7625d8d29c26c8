"""Inference of a whole network as it is timed: images on the device to logits on the device.

``latency`` is the time of one call with nothing before or after it, the host's part included, as a user meets it;
``throughput`` is device time, of calls that follow each other. All that is captured, ours and the others, goes through
the project's :class:`uctrans.graphs.CapturedForward`, its copies into and out of the graph included.

Ours has its weights cast to bfloat16 once, as :func:`uctrans.inference.predictor.load_predictor` does; the published
operations are under plain autocast, which casts them at every call.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from uctrans.graphs import CapturedForward, CudaRecorder
from uctrans.weight_casts import keep_weights_cast

from .gate import relative_error
from .network_race import Arena
from .networks import (
    MODELS,
    NetworkProblem,
    Variant,
    autocast,
    batch,
    compiled,
    in_a_row,
    network,
    one_by_one,
    without_tf32,
)

LATENCY, THROUGHPUT = "latency", "throughput"
CALLS_A_SAMPLE = {LATENCY: 10, THROUGHPUT: 5}
# Of the logits, ‖result - exact‖ / ‖exact‖ against float32 without TF32. With 16 base channels, on a CPU, the published
# operations reach 2.4e-3 in bfloat16; float32 on a GPU has TF32 in convolutions.
TOLERANCES = {"bfloat16": 2e-2, "float32": 5e-3}

# Times as fast as these ours should be, by batch.
TARGETS = {
    "published": {1: 10.0, 32: 5.0},
    "compiled": {1: 1.5, 32: 1.3},
    "compiled, own graphs": {1: 1.5, 32: 1.3},
}
KINDS = {1: LATENCY, 32: THROUGHPUT}
GPU_PROBLEMS = [NetworkProblem(model, batch_size) for model in MODELS for batch_size in KINDS]


def target(problem: NetworkProblem, candidate: str) -> float | None:
    """How many times as fast as ``candidate`` the project sets out to be, or ``None``."""
    is_claimed = replace(problem, device="cuda") in GPU_PROBLEMS
    return TARGETS.get(candidate, {}).get(problem.batch) if is_claimed else None


class Inference:
    """A network in evaluation, as often as it is asked for, on one batch; ``kind`` is latency or throughput."""

    kind: str

    def __init__(self, problem: NetworkProblem, variant: Variant):
        self.problem, self.variant = problem, variant
        self.model = network(problem, variant).eval()
        if variant.half and variant.backend != "reference":
            keep_weights_cast(self.model, torch.bfloat16)
        self.images, _ = batch(problem, variant)
        self._network = compiled(self.model, variant)

    def runner(self) -> Callable[[], Tensor]:
        """What returns the logits, captured anew where the variant is captured."""
        forward = CapturedForward(self._forward, CudaRecorder()) if self.variant.graphed else self._forward

        def run() -> Tensor:
            with torch.no_grad():
                return forward(self.images)

        return run

    def sampler(self) -> Callable[[], float]:
        """Seconds a call."""
        seconds_of = {LATENCY: one_by_one, THROUGHPUT: in_a_row}[self.kind]
        return seconds_of(self.runner(), self.problem.device, CALLS_A_SAMPLE[self.kind])

    def check(self) -> dict[str, Any]:
        """Fail unless the logits are those of the paper's own operations in float32; their relative error."""
        exact, run = exact_logits(self.problem), self.runner()
        tolerance = TOLERANCES[self.variant.dtype]
        errors = [relative_error(run().float(), exact.double()) for _ in range(4)]  # plain, rehearsed, replayed twice
        # Written so that a NaN fails.
        assert all(error <= tolerance for error in errors), f"logits are off by {errors}, allowed {tolerance}"
        return {"relative_error": max(errors)}

    def _forward(self, images: Tensor) -> Tensor:
        if self.variant.makes_own_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.problem, self.variant):
            return self._network(images)


class Latency(Inference):
    """One call at a time."""

    kind = LATENCY


class Throughput(Inference):
    """Calls that follow each other."""

    kind = THROUGHPUT


@lru_cache(maxsize=1)
def exact_logits(problem: NetworkProblem) -> Tensor:
    """Logits of the paper's own operations, in float32 without TF32."""
    with without_tf32():
        return Throughput(problem, Variant("reference", half=False, graphed=False)).runner()()


ARENAS = {
    LATENCY: Arena("inference, latency", Latency),
    THROUGHPUT: Arena("inference, throughput", Throughput),
}
