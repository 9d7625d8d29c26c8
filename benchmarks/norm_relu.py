"""Batch norm and ReLU as they are timed: one map of a level of the network, in training, channels-last."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uctrans.kernels import batch_norm_relu

from . import gate
from .candidates import OPERATOR, operator_backend
from .roofline import Work
from .selection import Entrant
from .timing import Call
from .workloads import CHANNELS, module_entrant

# "reference" calls batch norm and ReLU one after the other, "composed" the ReLU in place, as networks do.
NORM_CANDIDATES = (OPERATOR, "composed compiled", "composed", "reference")

# Where the normalised map is near zero, rounding decides on which side of the ReLU a pixel is, and so its gradient.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
DEEPEST = len(CHANNELS)  # the level below the last scale, which keeps its width


@dataclass(frozen=True)
class NormProblem:
    """One workload: size of the image, level of its map, dtype and device."""

    pixels: int
    batch: int
    dtype: torch.dtype
    level: int
    channels: tuple[int, ...] = CHANNELS
    device: str = "cuda"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, C, H, W) of the map."""
        side = self.pixels >> self.level
        return self.batch, self.channels[min(self.level, len(self.channels) - 1)], side, side

    def work(self, passes: str) -> Work:
        """The least bytes with statistics of the batch, which ask for a pass of their own, forward and backward.

        Forward reads the map twice and writes the result; backward reads map and gradient twice and writes a gradient.
        """
        batch, channels, height, width = self.shape
        map_bytes = batch * channels * height * width * self.dtype.itemsize
        return Work(0.0, {"forward": 3, "backward": 5, "both": 8}[passes] * map_bytes)

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = {"pixels": self.pixels, "batch": self.batch, "dtype": dtype, "device": self.device}
        return sizes | {"level": self.level, "detail": f"level {self.level + 1}, channels-last"}

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.pixels}px-B{self.batch}-level_{self.level + 1}"


class NormRelu(nn.Module):
    """Batch norm and ReLU with weights, running statistics and a backend; parameters are float32 beside half maps."""

    def __init__(self, channels: int, backend: str):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.backend = backend

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), with the statistics of the batch."""
        norm = self.norm
        return batch_norm_relu(
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
    module = NormRelu(problem.shape[1], "reference")
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    return module.to(problem.device)


def norm_calls(problem: NormProblem, count: int, weights: tuple[Tensor, ...] = ()) -> list[Call]:
    """So many calls, each with a map and an output gradient of its own, all standard normal numbers."""
    generator = torch.Generator(problem.device).manual_seed(1)

    def normal() -> Tensor:
        drawn = torch.randn(problem.shape, generator=generator, device=problem.device, dtype=problem.dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    features = [normal().requires_grad_() for _ in range(count)]
    return [Call((feature,), (feature, *weights), normal()) for feature in features]


def norm_entrant(problem: NormProblem, candidate: str, passes: str, count: int) -> Entrant:
    """``candidate`` ready to be timed: output and gradient were compared with PyTorch's batch norm in float64."""

    def calls(module: nn.Module) -> list[Call]:
        return norm_calls(problem, count, tuple(module.parameters()))

    def check(*arguments: object) -> float:
        return gate.assert_exact(*arguments, tolerances=TOLERANCES, images=range(problem.batch))

    backend = operator_backend(problem.device) if candidate == OPERATOR else candidate.removesuffix(" compiled")
    compile_it = candidate.endswith(" compiled")
    return module_entrant(problem, norm_relu(problem), backend, passes, calls, check, compile_it)


def operator_or_reason(problem: NormProblem, passes: str, count: int) -> Entrant | str:
    """The operator as an opponent, or why it cannot run: the others are then timed alone."""
    try:
        return norm_entrant(problem, OPERATOR, passes, count)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error)[:500]}"


# Level by level at the batch of the claims, then at the published one.
GPU_PROBLEMS = [NormProblem(224, batch, torch.bfloat16, level) for batch in (32, 4) for level in range(DEEPEST + 1)]

# At 32 images, forward and backward. Of the operator, the share of the copy bandwidth; of the others, how many times as
# fast as they are the operator is: bytes over bytes, 13 / 8 of separate calls, and 10 / 8 of a compiler that keeps the
# output to mask the gradient by, taken at that share.
LARGE_LEVELS = (0, 1, 2)  # maps beyond the cache, whose time is that of their bytes
BANDWIDTH_TARGET = 0.80
TARGETS = {OPERATOR: BANDWIDTH_TARGET, "composed": 1.3, "composed compiled": 1.0}


def target(problem: NormProblem, candidate: str) -> float | None:
    """What the project sets out to reach, forward and backward, or ``None``."""
    is_claimed = problem in GPU_PROBLEMS and problem.batch == 32 and problem.level in LARGE_LEVELS
    return TARGETS.get(candidate) if is_claimed else None
