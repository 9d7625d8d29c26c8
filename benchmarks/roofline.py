"""The least time that an operation can take on a GPU: its operations over the peak rate, its bytes over the bandwidth.

Work is ideal work, the same for every candidate: products that the mathematics asks for, each input read once and each
output written once. What a candidate does beyond it (a map stored and read again, Gram matrices, padding) shows as a
smaller fraction of the roofline, never as more work done.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Of a head, products of C x S x N multiply-adds. Forward: scores, output. Backward, with no stored map: the scores
# again, the map's gradient, and the gradients of query, key and value.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5
FLOP_OF_A_MULTIPLY_ADD = 2

COPY_BYTES = 4 << 30
PRODUCT_SIDE = 8192
WARMUP_RUNS = 3
TIMED_RUNS = 10


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes moved to and from device memory."""

    flop: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What a GPU reaches: operations a second by dtype, bytes a second (read and written), and where that is from."""

    flop_rates: dict[torch.dtype, float]
    bandwidth: float
    source: str

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The roofline: the longer of computing and moving."""
        return max(work.flop / self.flop_rates[dtype], work.bytes / self.bandwidth)

    def bound(self, work: Work, dtype: torch.dtype) -> str:
        """``compute`` or ``memory``, whichever takes longer."""
        return "compute" if work.flop / self.flop_rates[dtype] >= work.bytes / self.bandwidth else "memory"

    def as_json(self) -> dict[str, object]:
        """The ceilings under plain names."""
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flop_rates.items()}
        return {"flop_rates": rates, "bandwidth": self.bandwidth, "source": self.source}


KNOWN_CEILINGS = {
    "NVIDIA H200": Ceilings(
        {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 67e12},
        bandwidth=4.3e12,
        source="8192^3 bfloat16 product of random numbers and a device-to-device copy, measured on an H200; "
        "float32: data sheet, IEEE products on the CUDA cores",
    )
}


def attention_work(
    passes: str, batch: int, heads: int, tokens: int, segments: Sequence[int], key_channels: int, dtype: torch.dtype
) -> Work:
    """Work of channel attention between its projections, all scales and heads: ``forward``, ``backward`` or ``both``.

    Forward reads query, key and value and writes the mean over heads; backward reads these three and the gradient of
    the mean, and writes three gradients. Statistics of the rows are left out: a thousandth of the bytes.
    """
    if passes == "both":
        sizes = (batch, heads, tokens, segments, key_channels, dtype)
        return attention_work("forward", *sizes) + attention_work("backward", *sizes)
    channels = sum(segments)
    product = FLOP_OF_A_MULTIPLY_ADD * batch * heads * channels * key_channels * tokens
    inputs = batch * heads * tokens * (channels + 2 * key_channels)
    output = batch * tokens * channels
    if passes == "forward":
        return Work(FORWARD_PRODUCTS * product, (inputs + output) * dtype.itemsize)
    if passes == "backward":
        return Work(BACKWARD_PRODUCTS * product, (2 * inputs + output) * dtype.itemsize)
    raise ValueError(f"passes must be forward, backward or both; got {passes!r}")


def block_work(
    mode: str, batch: int, heads: int, tokens: int, segments: Sequence[int], key_channels: int, dtype: torch.dtype
) -> Work:
    """Work of the attention block with its projections, in the cheaper of its two orders of multiplication.

    ``inference`` is one forward pass; ``training`` adds two products for each product, one a factor, and reads the
    inputs and weights again to write their gradients.
    """
    channels = sum(segments)
    squares = sum(width * width for width in segments)
    projections = tokens * heads * (squares + 2 * key_channels**2)
    projected_first = projections + FORWARD_PRODUCTS * tokens * heads * channels * key_channels
    correlated_first = (
        FORWARD_PRODUCTS * tokens * channels * key_channels  # the correlation, the last product with the tokens
        + heads * squares * key_channels  # query weights
        + 2 * heads * channels * key_channels**2  # key and value weights
    )
    flop = FLOP_OF_A_MULTIPLY_ADD * batch * (min(projected_first, correlated_first) + tokens * squares)
    inputs = batch * tokens * (channels + key_channels) + (heads + 1) * squares + 2 * heads * key_channels**2
    output = batch * tokens * channels
    if mode == "inference":
        return Work(flop, (inputs + output) * dtype.itemsize)
    if mode == "training":
        return Work(3 * flop, (3 * inputs + 2 * output) * dtype.itemsize)
    raise ValueError(f"mode must be inference or training; got {mode!r}")


def skip_gate_work(
    passes: str,
    batch: int,
    height: int,
    width: int,
    channels: int,
    decoder_channels: int,
    patch: int,
    factor: int,
    dtype: torch.dtype,
) -> Work:
    """Work of the skip path at one scale: tokens of ``patch`` x ``patch`` pixels, a decoder ``factor`` times smaller.

    With ``e`` the encoder feature, ``r`` the tokens, ``d`` the decoder feature, and ``g`` the gradient of the result
    ``[y, up(d)]``, a gate of means asks for two passes. Forward: ``e``, ``r`` and ``d`` for their means, then again for
    the result, and the result written. Backward: ``g`` of the gated half, ``e`` and ``r`` for the gate's gradient, then
    again for theirs; ``g`` of the other half; and three gradients written. In elements:

        forward   2 e + 2 r + 2 d + (e + up(d))
        backward  2 e + 2 r + 2 e + up(d) + (e + r + d)

    A map that stays in the cache from one pass to the next can be faster than this work at the memory's bandwidth.
    Multiply-adds are those of the two linear layers, three times as many in backward and forward together.
    """
    if passes == "both":
        sizes = (batch, height, width, channels, decoder_channels, patch, factor, dtype)
        return skip_gate_work("forward", *sizes) + skip_gate_work("backward", *sizes)
    pixels = batch * height * width
    encoder, upsampled = channels * pixels, decoder_channels * pixels
    tokens, decoder = encoder / patch**2, upsampled / factor**2
    flop = FLOP_OF_A_MULTIPLY_ADD * batch * channels * (channels + decoder_channels)
    if passes == "forward":
        return Work(flop, (3 * encoder + 2 * tokens + 2 * decoder + upsampled) * dtype.itemsize)
    if passes == "backward":
        return Work(2 * flop, (5 * encoder + 3 * tokens + decoder + upsampled) * dtype.itemsize)
    raise ValueError(f"passes must be forward, backward or both; got {passes!r}")


def reconstruction_work(passes: str, batch: int, tokens: int, channels: int, dtype: torch.dtype) -> Work:
    """Work of a 1x1 convolution, batch norm and ReLU on the token grid, ``tokens`` an image.

    Forward reads tokens and writes the result, backward reads tokens and the result's gradient and writes theirs.
    """
    if passes == "both":
        sizes = (batch, tokens, channels, dtype)
        return reconstruction_work("forward", *sizes) + reconstruction_work("backward", *sizes)
    flop = FLOP_OF_A_MULTIPLY_ADD * batch * tokens * channels**2
    token_map = batch * tokens * channels * dtype.itemsize
    if passes == "forward":
        return Work(flop, 2 * token_map)
    if passes == "backward":
        return Work(2 * flop, 3 * token_map)
    raise ValueError(f"passes must be forward, backward or both; got {passes!r}")


def known_ceilings(name: str) -> Ceilings | None:
    """The recorded ceilings of the GPU that calls itself ``name``."""
    return KNOWN_CEILINGS.get(name)


def measured_ceilings() -> Ceilings:
    """Ceilings of the current GPU, measured now: a large copy, and 8192^3 products of random numbers."""
    bandwidth = 2 * COPY_BYTES / _median_seconds(_copy())
    flop_rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left, right = (torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device="cuda").to(dtype) for _ in range(2))
        seconds = _median_seconds(lambda left=left, right=right: left @ right)
        flop_rates[dtype] = FLOP_OF_A_MULTIPLY_ADD * PRODUCT_SIDE**3 / seconds
    return Ceilings(flop_rates, bandwidth, "measured in this run")


def copy_bandwidth(size: float, device: str) -> float:
    """Bytes a second, read and written, of a copy that moves ``size`` bytes on ``device`` into memory in use."""
    source = torch.ones(max(int(size) // 2, 1), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    if source.is_cuda:
        return 2 * source.numel() / _median_seconds(lambda: target.copy_(source))
    seconds = []
    for _ in range(WARMUP_RUNS + TIMED_RUNS):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[WARMUP_RUNS:])


def _copy() -> Callable[[], Tensor]:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _median_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(WARMUP_RUNS + TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[WARMUP_RUNS:])
