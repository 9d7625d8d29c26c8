"""The skip gate at each scale and at all four: tokens added, channels gated, the decoder's feature concatenated.

    python -m pytest benchmarks/test_skip_gate.py -m gpu --benchmark-only

On a CPU the composed form is held to being no slower than the published steps.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import pytest
import torch
from torch import Tensor

from uctrans.kernels import skip_gate

from .harness import FLOP_OF_A_MULTIPLY_ADD, OPERATOR, PATCH, Call, Case, Work, comparisons, operator_backend

CHANNELS = (64, 128, 256, 512)
DECODER_FACTOR = 2
ARGUMENTS = 7  # of one gate
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}


def gates(
    pixels: int,
    batch: int,
    dtype: torch.dtype,
    scales: tuple[int, ...] = (0, 1, 2, 3),
    layout: str = "channels-last",
    channels: tuple[int, ...] = CHANNELS,
    device: str = "cuda",
    **options: object,
) -> Case:
    """Return the case of the gates at some scales of square images, in one call."""

    def draw(generator: torch.Generator) -> Call:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        def feature(width: int, side: int) -> Tensor:
            return normal(batch, width, side, side).contiguous(memory_format=LAYOUTS[layout])

        arguments, gradients = [], []
        for scale in scales:
            width, side = channels[scale], pixels >> scale
            arguments += [feature(width, side), feature(width, pixels // PATCH), feature(width, side // DECODER_FACTOR)]
            arguments += [part for _ in range(2) for part in (normal(width, width) / width**0.5, normal(width))]
            gradients.append(feature(2 * width, side))
        return Call(tuple(argument.requires_grad_() for argument in arguments), tuple(gradients))

    def work(passes: str) -> Work:
        return reduce(add, (work_at(scale, passes) for scale in scales))

    def work_at(scale: int, passes: str) -> Work:
        """Count a gate of means, which needs two passes over the map it gates, forward and backward.

        In elements, with ``e`` the encoder feature, ``r`` the tokens, ``d`` the decoder feature and ``up(d)`` as the
        result holds it:

            forward   2 e + 2 r + 2 d + (e + up(d))
            backward  2 e + 2 r + 2 e + up(d) + (e + r + d)
        """
        width, side = channels[scale], pixels >> scale
        encoder = batch * width * side**2  # and up(d), as wide
        tokens, decoder = batch * width * (pixels // PATCH) ** 2, encoder / DECODER_FACTOR**2
        flop = FLOP_OF_A_MULTIPLY_ADD * batch * width * 2 * width
        forward = Work(flop, (4 * encoder + 2 * tokens + 2 * decoder) * dtype.itemsize)
        backward = Work(2 * flop, (6 * encoder + 3 * tokens + decoder) * dtype.itemsize)
        return {"forward": forward, "backward": backward, "both": forward + backward}[passes]

    backends = {OPERATOR: operator_backend(device), "reference": "reference", "composed": "composed"}
    scale = "all" if len(scales) > 1 else scales[0] + 1
    return Case(
        name="skip gate",
        sizes={"pixels": pixels, "batch": batch, "detail": f"scale {scale}, {layout}"},
        device=device,
        dtype=dtype,
        candidates={name: on_backend(backend) for name, backend in backends.items()},
        exact=on_backend("reference"),
        draw=draw,
        work=work,
        tolerance=TOLERANCES[dtype],
        **options,
    )


def on_backend(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that gates every ``ARGUMENTS`` arguments on ``backend``."""

    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        starts = range(0, len(arguments), ARGUMENTS)
        return tuple(skip_gate(*arguments[start : start + ARGUMENTS], backend=backend) for start in starts)

    return function


ON_CPU = {"device": "cpu", "passes": ("forward", "both")}
CLAIMED = {"claimed": {"reference": 1.0}}
ON_GPU = {"compiled": ("reference",)}
CASES = [
    gates(32, 2, torch.float32, (0, 3), channels=(4, 8, 16, 32), **ON_CPU),
    *(
        gates(pixels, batch, torch.float32, (scale,), layout, **ON_CPU, **CLAIMED)
        for pixels, batch in ((224, 1), (224, 4), (512, 1))
        for layout in LAYOUTS
        for scale in range(len(CHANNELS))
    ),
    gates(224, 32, torch.bfloat16, (0,), **ON_GPU),
    *(gates(224, batch, torch.bfloat16, **ON_GPU) for batch in (32, 4)),
    gates(512, 4, torch.bfloat16, **ON_GPU),
    *(gates(224, 32, torch.bfloat16, (scale,), **ON_GPU) for scale in (1, 2, 3)),
    gates(224, 32, torch.bfloat16, layout="contiguous", **ON_GPU),
    gates(224, 32, torch.float32, **ON_GPU),
]


@pytest.mark.parametrize(("case", "passes", "candidate"), comparisons(CASES))
def test_skip_gate(compare, case, passes, candidate):
    compare(case, passes, candidate)
