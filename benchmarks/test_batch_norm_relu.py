"""Batch norm and ReLU in training at the levels of the network, with the 2x2 max-pool of an encoder and without.

python -m pytest benchmarks/test_batch_norm_relu.py -m gpu --benchmark-only
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from uctrans.kernels import batch_norm_relu, batch_norm_relu_pool

from .harness import OPERATOR, Call, Case, Work, comparisons, operator_backend

CHANNELS = (64, 128, 256, 512, 512)  # by level; the deepest lies below the last scale
# Where the normalised map is near zero, rounding decides on which side of the ReLU a pixel lies, and so its gradient;
# with the pool also which of two pixels of a window near each other has the gradient. On one thread of a CPU, PyTorch's
# sums of a channel of 200,000 pixels move float32 maps by 1.5e-5 and gradients by 3e-3.
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 4e-2}
POOL_TOLERANCES = {torch.float32: 2e-2, torch.bfloat16: 6e-2}


def norm(
    pixels: int,
    batch: int,
    dtype: torch.dtype,
    level: int,
    pools: bool = False,
    channels: tuple[int, ...] = CHANNELS,
    device: str = "cuda",
    **options: object,
) -> Case:
    """Return the case of the map at a level of square images, channels-last; its parameters are float32."""
    width, side = channels[level], pixels >> level

    def draw(generator: torch.Generator) -> Call:
        def normal(divisor: int = 1) -> Tensor:
            shape = (batch, width, side // divisor, side // divisor)
            drawn = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            return drawn.contiguous(memory_format=torch.channels_last)

        def parameter() -> Tensor:
            return torch.randn(width, generator=generator, device=device).requires_grad_()

        statistics = (torch.zeros(width, device=device), torch.ones(width, device=device))
        gradients = (normal(), normal(2)) if pools else (normal(),)
        return Call((normal().requires_grad_(), parameter(), parameter(), *statistics), gradients)

    def work(passes: str) -> Work:
        """Count the fewest bytes with statistics of the batch, which need a pass of their own in both directions.

        Forward reads the map twice and writes the result; backward reads map and gradient twice and writes a gradient.
        The pooled map is written, and its gradient read twice.
        """
        elements = {"forward": 3, "backward": 5, "both": 8}[passes] * side**2
        if pools:
            elements += {"forward": 1, "backward": 2, "both": 3}[passes] * (side // 2) ** 2
        return Work(0.0, batch * width * elements * dtype.itemsize)

    backends = {OPERATOR: operator_backend(device), "reference": "reference", "composed": "composed"}
    operator = batch_norm_relu_pool if pools else batch_norm_relu
    return Case(
        name="batch norm, ReLU and pool" if pools else "batch norm and ReLU",
        sizes={"pixels": pixels, "batch": batch, "detail": f"level {level + 1}{', pooled' * pools}"},
        device=device,
        dtype=dtype,
        candidates={name: in_training(operator, backend) for name, backend in backends.items()},
        exact=in_training(operator, "reference"),
        draw=draw,
        work=work,
        tolerance=(POOL_TOLERANCES if pools else TOLERANCES)[dtype],
        **options,
    )


def in_training(operator: Callable[..., object], backend: str) -> Callable[..., object]:
    """Return the operator with statistics of the batch, as a function of tensors alone."""

    def function(*arguments: Tensor) -> object:
        return operator(*arguments, training=True, backend=backend)

    return function


ON_GPU = {"compiled": ("composed",)}
CASES = [
    *(norm(32, 2, torch.float32, 1, pools, (4, 8), "cpu") for pools in (False, True)),
    *(norm(224, 4, torch.float32, 0, pools, device="cpu", passes=("both",)) for pools in (False, True)),
    # Maps of the first levels are larger than the cache; at the last their time is that of launches.
    *(norm(224, 32, torch.bfloat16, level, pools=True, **ON_GPU) for level in range(4)),
    *(norm(224, 32, torch.bfloat16, level, **ON_GPU) for level in (0, 2, 4)),
    *(norm(224, 4, torch.bfloat16, 0, pools, **ON_GPU) for pools in (False, True)),
]


@pytest.mark.parametrize(("case", "passes", "candidate"), comparisons(CASES))
def test_batch_norm_relu(compare, case, passes, candidate):
    compare(case, passes, candidate)
