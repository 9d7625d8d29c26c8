"""What is timed: one pair of identical modules on two backends, and a call in inference or training."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from uctrans.layers import ChannelAttention, set_backend

CHANNELS = (64, 128, 256, 512)
NUM_HEADS = 4
PATCH = 16
MODES = ("inference", "training")


def attention_block() -> ChannelAttention:
    """The published attention block, projections included."""
    torch.manual_seed(0)
    return ChannelAttention(CHANNELS, NUM_HEADS, dropout=0.1, backend="composed")


def attention_tokens(pixels: int, batch: int) -> list[Tensor]:
    """Normalised tokens and context of a square image: two (B, N, 960)."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, (pixels // PATCH) ** 2, sum(CHANNELS))
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def on_backends(module: nn.Module, *backends: str) -> list[nn.Module]:
    """A copy of ``module`` for each backend, with the same weights."""
    return [set_backend(copy.deepcopy(module), backend) for backend in backends]


def assert_same_function(modules: list[nn.Module], inputs: list[Tensor]) -> None:
    """Fail unless the modules agree in evaluation: a race between different functions would mean nothing."""
    with torch.inference_mode():
        outputs = [module.eval()(*inputs) for module in modules]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-4)


def call(module: nn.Module, inputs: list[Tensor], mode: str) -> Callable[[], None]:
    """One forward pass in inference mode, or one forward and backward pass in training mode."""
    if mode == "inference":
        module.eval()

        def run() -> None:
            with torch.inference_mode():
                module(*inputs)
    else:
        module.train()
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]

        def run() -> None:
            module.zero_grad(set_to_none=True)
            module(*leaves).square().mean().backward()

    return run
