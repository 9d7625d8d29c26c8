"""The skip path as it is timed: one scale or all four in one call, the gate alone or with reconstruction before it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn

from uctrans.layers import ChannelGate, Reconstruct

from . import gate
from .candidates import OPERATOR, operator_backend
from .roofline import Work, reconstruction_work, skip_gate_work
from .selection import Entrant
from .timing import Call
from .workloads import CHANNELS, PATCH, module_entrant

DECODER_FACTOR = 2
SKIP_CANDIDATES = (OPERATOR, "reference compiled", "reference", "composed")

# Where batch norm is near zero, rounding decides on which side of the ReLU a token is, and with it the gradient of all
# its pixels. The paper's own steps reach 4e-3, 2e-2 and 5e-2 with two images.
TOLERANCES_OF_THE_WHOLE_PATH = {torch.float32: 1e-2, torch.float16: 4e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class SkipProblem:
    """One workload: which scales, sizes, dtype, layout and device, and whether reconstruction is part of it."""

    pixels: int
    batch: int
    dtype: torch.dtype
    scales: tuple[int, ...]
    channels_last: bool = True
    with_reconstruction: bool = False
    channels: tuple[int, ...] = CHANNELS
    patch: int = PATCH
    device: str = "cuda"

    @property
    def grid(self) -> int:
        """Tokens in a row of an image, the same at every scale."""
        return self.pixels // self.patch

    @property
    def layout(self) -> str:
        """Name of the memory format."""
        return "channels-last" if self.channels_last else "contiguous"

    @property
    def place(self) -> str:
        """Name of the scale, or ``all scales``."""
        return "all scales" if len(self.scales) > 1 else f"scale {self.scales[0] + 1}"

    def work(self, passes: str) -> Work:
        """Ideal work of all scales together."""
        parts = []
        for scale in self.scales:
            width, side = self.channels[scale], self.pixels >> scale
            sizes = (side, side, width, width, self.patch >> scale, DECODER_FACTOR, self.dtype)
            parts.append(skip_gate_work(passes, self.batch, *sizes))
            if self.with_reconstruction:
                parts.append(reconstruction_work(passes, self.batch, self.grid**2, width, self.dtype))
        return reduce(add, parts)

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        return {
            "pixels": self.pixels,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "scales": list(self.scales),
            "layout": self.layout,
            "with_reconstruction": self.with_reconstruction,
            "detail": f"{self.place}, {self.layout}",
            "device": self.device,
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.pixels}px-B{self.batch}-{self.place}-{self.layout}".replace(" ", "_")


class SkipPath(nn.Module):
    """The gates of all scales of a problem, each after its reconstruction where that is part of it."""

    def __init__(self, problem: SkipProblem, backend: str):
        super().__init__()
        widths = [problem.channels[scale] for scale in problem.scales]
        patches = [problem.patch >> scale for scale in problem.scales]
        self.gates = nn.ModuleList(ChannelGate(width, width, backend) for width in widths)
        self.reconstructions = nn.ModuleList(
            Reconstruct(width, patch, backend) if problem.with_reconstruction else nn.Identity()
            for width, patch in zip(widths, patches, strict=True)
        )

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        """Encoder feature, token map and decoder feature of each scale -> the concatenated map of each scale."""
        encoder_features, token_maps, decoder_features = features[0::3], features[1::3], features[2::3]
        token_maps = [reconstruct(tokens) for reconstruct, tokens in zip(self.reconstructions, token_maps, strict=True)]
        scales = zip(self.gates, encoder_features, decoder_features, token_maps, strict=True)
        return tuple(gate(encoder, decoder, tokens) for gate, encoder, decoder, tokens in scales)


def skip_path(problem: SkipProblem) -> SkipPath:
    """The published skip path of ``problem``, in training mode."""
    torch.manual_seed(0)
    memory_format = torch.channels_last if problem.channels_last else torch.contiguous_format
    path = SkipPath(problem, "reference").to(problem.device, problem.dtype, memory_format=memory_format)
    return path.train()


def skip_calls(problem: SkipProblem, count: int, weights: Sequence[Tensor] = ()) -> list[Call]:
    """So many calls, each with features and output gradients of its own, all standard normal numbers."""
    generator = torch.Generator(problem.device).manual_seed(1)
    memory_format = torch.channels_last if problem.channels_last else torch.contiguous_format

    def normal(channels: int, side: int) -> Tensor:
        shape = (problem.batch, channels, side, side)
        drawn = torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)
        return drawn.contiguous(memory_format=memory_format)

    calls = []
    for _ in range(count):
        features: list[Tensor] = []
        gradients: list[Tensor] = []
        for scale in problem.scales:
            width, side = problem.channels[scale], problem.pixels >> scale
            features += [normal(width, side), normal(width, problem.grid), normal(width, side // DECODER_FACTOR)]
            gradients.append(normal(2 * width, side))
        leaves = tuple(feature.requires_grad_() for feature in features)
        calls.append(Call(leaves, (*leaves, *weights), tuple(gradients)))
    return calls


def skip_entrant(problem: SkipProblem, candidate: str, passes: str, count: int) -> Entrant:
    """``candidate`` ready to be timed: outputs and gradients of maps were compared with the paper's steps in float64.

    The gate alone is compared on the first and the last image. Batch norm ties images together: with reconstruction, on
    all.
    """
    check = gate.assert_exact
    if problem.with_reconstruction:
        check = partial(check, tolerances=TOLERANCES_OF_THE_WHOLE_PATH, images=range(problem.batch))
    backend = operator_backend(problem.device) if candidate == OPERATOR else candidate.removesuffix(" compiled")

    def calls(module: nn.Module) -> list[Call]:
        return skip_calls(problem, count, tuple(module.parameters()))

    compile_it = candidate.endswith(" compiled")
    return module_entrant(problem, skip_path(problem), backend, passes, calls, check, compile_it)


def operator_or_reason(problem: SkipProblem, passes: str, count: int) -> Entrant | str:
    """The operator as an opponent, or why it cannot run: the others are then timed alone."""
    try:
        return skip_entrant(problem, OPERATOR, passes, count)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error)[:500]}"


ALL_SCALES = tuple(range(len(CHANNELS)))
SCALES = (*((scale,) for scale in ALL_SCALES), ALL_SCALES)
HALF = torch.bfloat16

# The most important first: a short session measures these. The gate, then the whole path.
CLAIMED = [
    SkipProblem(224, 32, HALF, (0,)),
    SkipProblem(224, 32, HALF, ALL_SCALES),
    SkipProblem(224, 32, HALF, ALL_SCALES, with_reconstruction=True),
]
FURTHER = [
    SkipProblem(224, 4, HALF, ALL_SCALES),
    SkipProblem(512, 4, HALF, ALL_SCALES),
    *(SkipProblem(224, 32, HALF, (scale,)) for scale in ALL_SCALES),
    SkipProblem(224, 32, HALF, ALL_SCALES, channels_last=False),
    SkipProblem(224, 4, HALF, ALL_SCALES, with_reconstruction=True),
    SkipProblem(224, 32, HALF, (0,), with_reconstruction=True),
]
ALL = [
    SkipProblem(pixels, batch, dtype, scales, channels_last)
    for dtype, channels_last, pixels, batch, scales in itertools.product(
        (HALF, torch.float32), (True, False), (224, 512), (32, 4, 1), reversed(SCALES)
    )
]
ALL_WHOLE = [
    SkipProblem(pixels, batch, dtype, ALL_SCALES, channels_last, with_reconstruction=True)
    for dtype, channels_last, (pixels, batch) in itertools.product(
        (HALF, torch.float32), (True, False), ((224, 32), (224, 4), (224, 1), (512, 4))
    )
]
GPU_PROBLEMS = list(dict.fromkeys([*CLAIMED, *FURTHER, *ALL, *ALL_WHOLE]))

# Of 32 images at 224 pixels in bfloat16, channels-last. Of the operator, the share of the copy bandwidth at the first
# scale and at all; of the others, how many times as fast as they are the operator is.
BANDWIDTH_TARGETS = {(0,): 0.75, ALL_SCALES: 0.60}
GATE_TARGETS = {"reference": 3.0, "reference compiled": 1.3}
WHOLE_PATH_TARGETS = {"reference compiled": 3.0}


def target(problem: SkipProblem, candidate: str) -> float | None:
    """What the project sets out to reach, forward and backward, or ``None``."""
    claimed = (problem.pixels, problem.batch, problem.dtype, problem.channels_last) == (224, 32, HALF, True)
    if not claimed or problem.scales not in BANDWIDTH_TARGETS:
        return None
    if problem.with_reconstruction:
        return WHOLE_PATH_TARGETS.get(candidate) if problem.scales == ALL_SCALES else None
    if candidate == OPERATOR:
        return BANDWIDTH_TARGETS[problem.scales]
    return GATE_TARGETS.get(candidate)
