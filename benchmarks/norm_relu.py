"""Batch norm and ReLU as they are timed, with the pool after a stage of an encoder and without.

One map of a level of the network, in training, channels-last.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uctrans.kernels import batch_norm_relu, batch_norm_relu_pool

from . import gate
from .candidates import OPERATOR, operator_backend
from .roofline import Work
from .selection import Entrant
from .timing import Call
from .workloads import CHANNELS, module_entrant

# "reference" calls batch norm, ReLU and pool one after the other, "composed" the ReLU in place, as networks do.
NORM_CANDIDATES = (OPERATOR, "composed compiled", "composed", "reference")

# Where the normalised map is near zero, rounding decides on which side of the ReLU a pixel is, and so its gradient.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# Where two pixels of a window are near each other, rounding decides which one has the gradient of the pooled map.
POOL_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
DEEPEST = len(CHANNELS)  # the level below the last scale, which keeps its width


@dataclass(frozen=True)
class NormProblem:
    """One workload: size of the image, level of its map, whether it is pooled too, dtype and device."""

    pixels: int
    batch: int
    dtype: torch.dtype
    level: int
    channels: tuple[int, ...] = CHANNELS
    device: str = "cuda"
    pools: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) of the map."""
        side = self.pixels >> self.level
        return self.batch, self.channels[min(self.level, len(self.channels) - 1)], side, side

    def work(self, passes: str) -> Work:
        """The least bytes with statistics of the batch, which ask for a pass of their own, forward and backward.

        Forward reads the map twice and writes the result; backward reads map and gradient twice and writes a gradient.
        The pooled map is written, and its gradient read twice.
        """
        batch, channels, height, width = self.shape
        elements = {"forward": 3, "backward": 5, "both": 8}[passes] * height * width
        if self.pools:
            elements += {"forward": 1, "backward": 2, "both": 3}[passes] * (height // 2) * (width // 2)
        return Work(0.0, batch * channels * elements * self.dtype.itemsize)

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = {"pixels": self.pixels, "batch": self.batch, "dtype": dtype, "device": self.device}
        return sizes | {
            "level": self.level,
            "detail": f"level {self.level + 1}, channels-last{', pooled' * self.pools}",
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.pixels}px-B{self.batch}-level_{self.level + 1}{'-pool' * self.pools}"


class NormRelu(nn.Module):
    """An operator with weights, running statistics and a backend; parameters are float32 beside half maps."""

    def __init__(self, channels: int, operator: Callable[..., Tensor | tuple[Tensor, Tensor]], backend: str):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.operator = operator
        self.backend = backend

    def forward(self, feature: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C, H, W), and the pooled map if there is one, with the statistics of the batch."""
        norm = self.norm
        return self.operator(
            feature,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            training=True,
            momentum=norm.momentum,
            eps=norm.eps,
            backend=self.backend,
        )


def norm_relu(problem: NormProblem) -> NormRelu:
    """The module of ``problem``, with weights of both signs."""
    torch.manual_seed(0)
    operator = batch_norm_relu_pool if problem.pools else batch_norm_relu
    module = NormRelu(problem.shape[1], operator, "reference")
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    return module.to(problem.device)


def norm_calls(problem: NormProblem, count: int, weights: tuple[Tensor, ...] = ()) -> list[Call]:
    """So many calls, each with a map and gradients of the outputs of its own, all standard normal numbers."""
    generator = torch.Generator(problem.device).manual_seed(1)
    batch, channels, height, width = problem.shape

    def normal(scale: int = 1) -> Tensor:
        size = (batch, channels, height // scale, width // scale)
        drawn = torch.randn(size, generator=generator, device=problem.device, dtype=problem.dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    def gradients() -> Tensor | tuple[Tensor, Tensor]:
        return (normal(), normal(2)) if problem.pools else normal()

    features = [normal().requires_grad_() for _ in range(count)]
    return [Call((feature,), (feature, *weights), gradients()) for feature in features]


def norm_entrant(problem: NormProblem, candidate: str, passes: str, count: int) -> Entrant:
    """``candidate`` ready to be timed: output and gradient were compared with PyTorch's batch norm in float64."""

    def calls(module: nn.Module) -> list[Call]:
        return norm_calls(problem, count, tuple(module.parameters()))

    def check(*arguments: object) -> float:
        tolerances = POOL_TOLERANCES if problem.pools else TOLERANCES
        return gate.assert_exact(*arguments, tolerances=tolerances, images=range(problem.batch))

    backend = operator_backend(problem.device) if candidate == OPERATOR else candidate.removesuffix(" compiled")
    compile_it = candidate.endswith(" compiled")
    return module_entrant(problem, norm_relu(problem), backend, passes, calls, check, compile_it)


def operator_or_reason(problem: NormProblem, passes: str, count: int) -> Entrant | str:
    """The operator as an opponent, or why it cannot run: the others are then timed alone."""
    try:
        return norm_entrant(problem, OPERATOR, passes, count)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error)[:500]}"


# Level by level at the batch of the claims, then at the published one; those of an encoder pooled too.
GPU_PROBLEMS = [
    NormProblem(224, batch, torch.bfloat16, level, pools=pools)
    for batch in (32, 4)
    for pools in (False, True)
    for level in range(DEEPEST + (not pools))
]

# At 32 images, forward and backward. Of the operator, the share of the copy bandwidth; of the others, how many times as
# fast as they are the operator is: bytes over bytes, 13 / 8 of separate calls (20.5 / 8.75 with the pool), and 10 / 8
# of a compiler that keeps the output to mask the gradient by, taken at that share.
LARGE_LEVELS = (0, 1, 2)  # maps beyond the cache, whose time is that of their bytes
BANDWIDTH_TARGET = 0.80
TARGETS = {OPERATOR: BANDWIDTH_TARGET, "composed": 1.3, "composed compiled": 1.0}
POOL_TARGETS = TARGETS | {"composed": 1.87}


def target(problem: NormProblem, candidate: str) -> float | None:
    """What the project sets out to reach, forward and backward, or ``None``."""
    is_claimed = problem in GPU_PROBLEMS and problem.batch == 32 and problem.level in LARGE_LEVELS
    return (POOL_TARGETS if problem.pools else TARGETS).get(candidate) if is_claimed else None
