"""What an operator around the network's convolutions could save: the candidates, all in plain PyTorch.

Three questions. A 3x3 convolution over ``[skip, up(d)]``: is it faster split, with the upsampled half convolved on the
small map? Batch norm, ReLU and max-pool after a convolution: how far are eager and compiled calls from the memory they
must move? And the two convolutions that are matrix products, patch embedding and output head: is the convolution or the
product faster?
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .candidates import compiled
from .roofline import FLOP_OF_A_MULTIPLY_ADD, Work
from .timing import Call
from .workloads import CHANNELS

KERNEL_SIDE = 3
# Of an axis upsampled twice, what the three taps of a kernel come to on the small map. By phase of the output and tap
# of the small kernel; and by tap of the kernel of a transposed convolution with stride 2.
PHASES = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))
TRANSPOSED = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
DECODER_OUTPUTS = (64, 64, 128, 256)  # of the published decoder, at each scale


@dataclass(frozen=True)
class BlockProblem:
    """One workload: scale, sizes, dtype and device; always channels-last, which convolutions like best."""

    pixels: int
    batch: int
    dtype: torch.dtype
    scale: int
    channels: tuple[int, ...] = CHANNELS
    outputs: tuple[int, ...] = DECODER_OUTPUTS
    device: str = "cuda"

    @property
    def side(self) -> int:
        """Height and width of the map at this scale."""
        return self.pixels >> self.scale

    def as_json(self) -> dict[str, object]:
        """The sizes under plain names."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = {"pixels": self.pixels, "batch": self.batch, "dtype": dtype, "device": self.device}
        return sizes | {"scale": self.scale, "detail": f"scale {self.scale + 1}, channels-last"}

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{self.pixels}px-B{self.batch}-scale_{self.scale + 1}"

    def normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Standard normal numbers, channels-last, that require a gradient."""
        drawn = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return drawn.contiguous(memory_format=torch.channels_last).requires_grad_()


def over_concatenated(joined: Tensor, skip: Tensor, decoder: Tensor, weight: Tensor) -> Tensor:
    """The concatenated map is there already: what a decoder does after ``skip_gate``."""
    return F.conv2d(joined, weight, padding=1)


def concatenating(joined: Tensor, skip: Tensor, decoder: Tensor, weight: Tensor) -> Tensor:
    """Upsample, concatenate, convolve."""
    upsampled = F.interpolate(decoder, size=skip.shape[2:], mode="nearest")
    return F.conv2d(torch.cat([skip, upsampled], dim=1), weight, padding=1)


def four_phases(joined: Tensor, skip: Tensor, decoder: Tensor, weight: Tensor) -> Tensor:
    """The upsampled half as one 2x2 convolution of the small map for each phase of the output, then interleaved."""
    weight_skip, weight_decoder = weight.split([skip.shape[1], decoder.shape[1]], dim=1)
    fold = torch.tensor(PHASES, dtype=weight.dtype, device=weight.device)  # [phase, small tap, tap]
    kernels = torch.einsum("apk,bql,oikl->aboipq", fold, fold, weight_decoder)
    rows, columns = decoder.shape[2:]
    phases = F.conv2d(decoder, kernels.flatten(0, 2), padding=1).unflatten(1, (4, -1))
    corners = [phases[:, 2 * a + b, :, a : a + rows, b : b + columns] for a in (0, 1) for b in (0, 1)]
    interleaved = torch.stack(corners, dim=-1).unflatten(-1, (2, 2))  # [B, out, rows, columns, phase, phase]
    interleaved = interleaved.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    return F.conv2d(skip, weight_skip, padding=1) + interleaved


def transposed(joined: Tensor, skip: Tensor, decoder: Tensor, weight: Tensor) -> Tensor:
    """The same four phases in one call: a transposed 4x4 convolution with stride 2."""
    weight_skip, weight_decoder = weight.split([skip.shape[1], decoder.shape[1]], dim=1)
    fold = torch.tensor(TRANSPOSED, dtype=weight.dtype, device=weight.device)  # [tap of four, tap]
    kernel = torch.einsum("pk,ql,oikl->iopq", fold, fold, weight_decoder)
    upsampled_half = F.conv_transpose2d(decoder, kernel, stride=2, padding=1)
    return F.conv2d(skip, weight_skip, padding=1) + upsampled_half


CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "concatenating": concatenating,
    "over the concatenated map": over_concatenated,
    "four phases": four_phases,
    "transposed": transposed,
}


def convolution_call(problem: BlockProblem, candidate: str) -> Call:
    """Arguments of all :data:`CONVOLUTIONS`; gradients are taken by those that ``candidate`` reads."""
    generator = torch.Generator(problem.device).manual_seed(0)
    width, side, out = problem.channels[problem.scale], problem.side, problem.outputs[problem.scale]
    skip = problem.normal(generator, problem.batch, width, side, side)
    decoder = problem.normal(generator, problem.batch, width, side // 2, side // 2)
    weight = problem.normal(generator, out, 2 * width, KERNEL_SIDE, KERNEL_SIDE)
    gradient = problem.normal(generator, problem.batch, out, side, side).detach()
    with torch.no_grad():
        joined = torch.cat([skip, F.interpolate(decoder, scale_factor=2.0, mode="nearest")], dim=1)
    joined = joined.contiguous(memory_format=torch.channels_last).requires_grad_()
    read = (joined, weight) if candidate == "over the concatenated map" else (skip, decoder, weight)
    return Call((joined, skip, decoder, weight), read, gradient)


def convolution_work(problem: BlockProblem, passes: str) -> Work:
    """Work of the convolution over the concatenated map: it is read and the result written; backward twice that."""
    width, out = problem.channels[problem.scale], problem.outputs[problem.scale]
    pixels = problem.batch * problem.side**2
    flop = FLOP_OF_A_MULTIPLY_ADD * pixels * KERNEL_SIDE**2 * 2 * width * out
    elements = pixels * (2 * width + out)
    times = {"forward": 1, "both": 3}[passes]
    return Work(times * flop, times * elements * problem.dtype.itemsize)


def patch_convolution(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution whose stride is the side of its kernel, as published."""
    return F.conv2d(feature, weight, bias, stride=weight.shape[-1])


def gathered(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The pixels of each patch side by side, which copies the map, then one product."""
    tokens = rearrange(feature, "b c (h p) (w q) -> b h w (p q c)", p=weight.shape[-2], q=weight.shape[-1])
    return F.linear(tokens, rearrange(weight, "o c p q -> o (p q c)"), bias).permute(0, 3, 1, 2)


def head_product(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution as the product that it is over channels-last pixels."""
    return F.linear(feature.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


EMBEDDINGS: dict[str, Callable[..., Tensor]] = {"convolution": patch_convolution, "gathered": gathered}
HEADS: dict[str, Callable[..., Tensor]] = {"convolution": patch_convolution, "product": head_product}


def product_call(problem: BlockProblem, patch: int, outputs: int) -> Call:
    """Arguments of :data:`EMBEDDINGS`, with the published patch of the scale, or of :data:`HEADS`, with patch 1."""
    generator = torch.Generator(problem.device).manual_seed(0)
    width, side = problem.channels[problem.scale], problem.side
    feature = problem.normal(generator, problem.batch, width, side, side)
    weight = problem.normal(generator, outputs, width, patch, patch)
    bias = torch.zeros(outputs, device=problem.device, dtype=problem.dtype, requires_grad=True)
    gradient = problem.normal(generator, problem.batch, outputs, side // patch, side // patch).detach()
    return Call((feature, weight, bias), (feature, weight, bias), gradient)


def product_work(problem: BlockProblem, patch: int, outputs: int, passes: str) -> Work:
    """Work of the product: the map is read and the result written; backward twice that."""
    width, pixels = problem.channels[problem.scale], problem.batch * problem.side**2
    flop = FLOP_OF_A_MULTIPLY_ADD * pixels * width * outputs
    times = {"forward": 1, "both": 3}[passes]
    return Work(times * flop, times * (pixels * width + pixels // patch**2 * outputs) * problem.dtype.itemsize)


class Block(nn.Module):
    """3x3 convolution, batch norm, ReLU, and max-pool where asked for; or less of it."""

    def __init__(self, width: int, with_convolution: bool, with_epilogue: bool, with_pool: bool):
        super().__init__()
        self.convolution = nn.Conv2d(width, width, KERNEL_SIDE, padding=1) if with_convolution else nn.Identity()
        self.epilogue = nn.Identity()
        if with_epilogue:
            self.epilogue = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2) if with_pool else None

    def forward(self, feature: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The map, and with a pool the pooled map too: an encoder needs both."""
        feature = self.epilogue(self.convolution(feature))
        return feature if self.pool is None else (feature, self.pool(feature))


BLOCKS = ("epilogue", "epilogue compiled", "convolution", "block", "block compiled")


def block(problem: BlockProblem, candidate: str, with_pool: bool) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
    """The function of one of :data:`BLOCKS`, and its weights."""
    torch.manual_seed(0)
    part = candidate.removesuffix(" compiled")
    with_epilogue = part != "convolution"
    width = problem.channels[problem.scale]
    module = Block(width, part != "epilogue", with_epilogue, with_pool and with_epilogue)
    module = module.to(problem.device, problem.dtype, memory_format=torch.channels_last).train()
    function = compiled(module, problem.device) if candidate.endswith(" compiled") else module
    return function, tuple(module.parameters())


def block_call(problem: BlockProblem, candidate: str, with_pool: bool, weights: Sequence[Tensor]) -> Call:
    """A map, with a gradient for each output."""
    generator = torch.Generator(problem.device).manual_seed(0)
    width, side = problem.channels[problem.scale], problem.side
    feature = problem.normal(generator, problem.batch, width, side, side)
    gradient = problem.normal(generator, problem.batch, width, side, side).detach()
    if not with_pool or candidate == "convolution":
        return Call((feature,), (feature, *weights), gradient)
    pooled = problem.normal(generator, problem.batch, width, side // 2, side // 2).detach()
    return Call((feature,), (feature, *weights), (gradient, pooled))


def epilogue_work(problem: BlockProblem, with_pool: bool, passes: str) -> Work:
    """Bytes of batch norm, ReLU and pool in training: the statistics ask for a pass of their own, forward and backward.

    Forward reads the map twice and writes the result; backward reads map and gradient twice and writes a gradient. A
    pool adds its result, and in backward its gradient twice.
    """
    elements = problem.batch * problem.channels[problem.scale] * problem.side**2
    pooled = elements / 4 if with_pool else 0.0
    moved = {"forward": 3 * elements + pooled, "both": 8 * elements + 3 * pooled}[passes]
    return Work(0.0, moved * problem.dtype.itemsize)
