"""The attention block with its projections, on each backend.

    python -m pytest benchmarks/test_attention_block.py -m "not gpu" --benchmark-only

On a CPU the composed form is held to what is claimed of it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from uctrans.layers import ChannelAttention

from .harness import FLOP_OF_A_MULTIPLY_ADD, OPERATOR, PATCH, SEGMENTS, Call, Case, Work, comparisons, operator_backend

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def block(
    pixels: int,
    batch: int,
    dtype: torch.dtype,
    segments: tuple[int, ...] = SEGMENTS,
    heads: int = 4,
    device: str = "cuda",
    **options: object,
) -> Case:
    """Return the case of square images; the weights are arguments, the same for all candidates."""
    tokens, channels = (pixels // PATCH) ** 2, sum(segments)
    squares = sum(width * width for width in segments)

    def draw(generator: torch.Generator) -> Call:
        def normal() -> Tensor:
            return torch.randn(batch, tokens, channels, generator=generator, device=device, dtype=dtype)

        torch.manual_seed(0)
        weights = ChannelAttention(segments, heads, 0.0, "auto").to(device, dtype).parameters()
        inputs = (normal().requires_grad_(), normal().requires_grad_())
        return Call((*inputs, *(weight.detach().requires_grad_() for weight in weights)), (normal(),))

    def work(passes: str) -> Work:
        """Count the cheaper order of products; backward has two products for each, one a factor."""
        projected_first = tokens * heads * (squares + 2 * channels**2) + 2 * tokens * heads * channels**2
        correlated_first = 2 * tokens * channels**2 + heads * squares * channels + 2 * heads * channels**3
        flop = FLOP_OF_A_MULTIPLY_ADD * batch * (min(projected_first, correlated_first) + tokens * squares)
        inputs = 2 * batch * tokens * channels + (heads + 1) * squares + 2 * heads * channels**2
        output = batch * tokens * channels
        products = {"forward": 1, "backward": 2, "both": 3}[passes]
        return Work(products * flop, (products * inputs + min(products, 2) * output) * dtype.itemsize)

    backends = {OPERATOR: operator_backend(device), "reference": "reference", "composed": "composed"}
    return Case(
        name="attention block",
        sizes={"pixels": pixels, "batch": batch},
        device=device,
        dtype=dtype,
        candidates={name: on_backend(segments, heads, backend) for name, backend in backends.items()},
        exact=on_backend(segments, heads, "reference"),
        draw=draw,
        work=work,
        tolerance=TOLERANCES[dtype],
        **options,
    )


def on_backend(segments: tuple[int, ...], heads: int, backend: str) -> Callable[..., Tensor]:
    """Return the block on ``backend`` as a function of tokens, context and weights."""
    module = ChannelAttention(segments, heads, 0.0, backend).to("meta")
    names = [name for name, _ in module.named_parameters()]

    def function(tokens: Tensor, context: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, weights, strict=True)), (tokens, context))

    return function


ON_CPU = {"device": "cpu", "passes": ("forward", "both")}
ON_GPU = {"compiled": ("reference",)}
CASES = [
    block(64, 2, torch.float32, (8, 16, 32, 64), **ON_CPU),
    *(
        block(pixels, batch, torch.float32, claimed={"reference": claimed}, **ON_CPU)
        for pixels, batch, claimed in ((224, 4, 1.0), (512, 1, 1.65), (1024, 1, 4.0))
    ),
    *(block(224, batch, torch.bfloat16, **ON_GPU) for batch in (32, 4)),
    *(block(1024, batch, torch.bfloat16, **ON_GPU) for batch in (4, 1)),
]


@pytest.mark.parametrize(("case", "passes", "candidate"), comparisons(CASES))
def test_attention_block(compare, case, passes, candidate):
    compare(case, passes, candidate)
