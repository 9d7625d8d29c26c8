"""Triton kernels of the packed layer norms: a row of tokens is read once, for all its scales and for the whole row.

A program holds a whole row, one tile a scale, so that means and variances come from registers. Statistics are float32,
and backward computes them again instead of reading them. Gradients of weights and biases are summed over the rows of a
program, then over programs in a fixed order.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import add_parts


class Warps(NamedTuple):
    """How many warps hold a row: one for so many channels, and at most so many."""

    channels_a_warp: int
    most: int


# Forward, a thread holds 32 channels. Backward it holds 8, and as many of both gradients, of four sums over rows and of
# two weights: 16 spill, except in 8 warps, which may have more registers a thread than 16 warps.
FORWARD_WARPS = Warps(1024, 32)
BACKWARD_WARPS = Warps(256, 8)

# Backward's programs loop over rows, as each writes partial sums as long as a row: four for each of 132
# multiprocessors (a constant, so that results do not depend on the GPU), of at least four rows each.
BACKWARD_PROGRAMS = 4 * 132
FEWEST_ROWS = 4


@triton.jit
def _zeros(TILE: tl.constexpr):
    return tl.zeros([TILE], tl.float32)


@triton.jit
def _load(ptr, offs_channel, WIDTH: tl.constexpr):
    """Return the channels of one scale in float32, zero behind them."""
    return tl.load(ptr + offs_channel, mask=offs_channel < WIDTH, other=0.0).to(tl.float32)  # [TILE]


@triton.jit
def _store(ptr, offs_channel, values, WIDTH: tl.constexpr):
    tl.store(ptr + offs_channel, values.to(ptr.dtype.element_ty), mask=offs_channel < WIDTH)


@triton.jit
def _inverse_deviation(sum_of_squares, remainder, width, eps):
    """Return 1 / deviation; ``remainder``, the mean of what was squared, is near zero, so that nothing cancels."""
    return tl.rsqrt(tl.maximum(sum_of_squares / width - remainder * remainder, 0.0) + eps)


@triton.jit
def _standardise(tokens, offs_channel, eps, WIDTH: tl.constexpr):
    """Return the channels of one scale with mean 0 and variance 1, and the factor of their variance.

    The mean of a row far from zero is rounded, so the mean of the centred row is subtracted, too.
    """
    centred = tl.where(offs_channel < WIDTH, tokens - tl.sum(tokens) / WIDTH, 0.0)  # [TILE]
    remainder = tl.sum(centred) / WIDTH
    factor = _inverse_deviation(tl.sum(centred * centred), remainder, WIDTH, eps)
    return (centred - remainder) * factor, factor


@triton.jit
def _standardise_whole(tokens, eps, WIDTHS: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr):
    """Standardise all scales together; see :func:`_standardise`."""
    mean = 0.0
    for scale in tl.static_range(len(WIDTHS)):
        mean += tl.sum(tokens[scale])
    mean = mean / PACKED
    remainder = 0.0
    sum_of_squares = 0.0
    centred = ()
    for scale in tl.static_range(len(WIDTHS)):
        tile = tl.where(tl.arange(0, TILES[scale]) < WIDTHS[scale], tokens[scale] - mean, 0.0)  # [TILE]
        remainder += tl.sum(tile)
        sum_of_squares += tl.sum(tile * tile)
        centred = centred + (tile,)
    remainder = remainder / PACKED
    factor = _inverse_deviation(sum_of_squares, remainder, PACKED, eps)
    standardised = ()
    for scale in tl.static_range(len(WIDTHS)):
        standardised = standardised + ((centred[scale] - remainder) * factor,)
    return standardised, factor


@triton.jit
def _affine(standardised, weight_ptr, bias_ptr, offs_channel, WIDTH: tl.constexpr):
    return standardised * _load(weight_ptr, offs_channel, WIDTH) + _load(bias_ptr, offs_channel, WIDTH)


@triton.jit
def _scale_gradient(tokens, gradient, weight_ptr, offs_channel, eps, WIDTH: tl.constexpr):
    """Return the gradient of the channels of one scale, and this row's part of the gradient of the weight."""
    standardised, factor = _standardise(tokens, offs_channel, eps, WIDTH)
    d_standardised = gradient * _load(weight_ptr, offs_channel, WIDTH)
    mean = tl.sum(d_standardised) / WIDTH
    slope = tl.sum(d_standardised * standardised) / WIDTH
    return (d_standardised - mean - standardised * slope) * factor, gradient * standardised


@triton.jit
def _load_row(ptr, WIDTHS: tl.constexpr, STARTS: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for scale in tl.static_range(len(WIDTHS)):
        tiles = tiles + (_load(ptr + STARTS[scale], tl.arange(0, TILES[scale]), WIDTHS[scale]),)
    return tiles


@triton.jit
def _zero_row(TILES: tl.constexpr):
    tiles = ()
    for scale in tl.static_range(len(TILES)):
        tiles = tiles + (_zeros(TILES[scale]),)
    return tiles


@triton.jit
def _store_row(ptr, tiles, WIDTHS: tl.constexpr, STARTS: tl.constexpr, TILES: tl.constexpr):
    for scale in tl.static_range(len(WIDTHS)):
        _store(ptr + STARTS[scale], tl.arange(0, TILES[scale]), tiles[scale], WIDTHS[scale])


@triton.jit
def layer_norm_kernel(
    tokens_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    eps,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write each scale of a row, normalised by itself."""
    row_offset = tl.program_id(0).to(tl.int64) * PACKED
    for scale in tl.static_range(len(WIDTHS)):
        start = STARTS[scale]
        offs_channel = tl.arange(0, TILES[scale])
        tokens = _load(tokens_ptr + row_offset + start, offs_channel, WIDTHS[scale])  # [TILE]
        standardised, _ = _standardise(tokens, offs_channel, eps, WIDTHS[scale])
        output = _affine(standardised, weight_ptr + start, bias_ptr + start, offs_channel, WIDTHS[scale])
        _store(output_ptr + row_offset + start, offs_channel, output, WIDTHS[scale])


@triton.jit
def cross_layer_norm_kernel(
    tokens_ptr,
    weight_ptr,
    bias_ptr,
    context_weight_ptr,
    context_bias_ptr,
    output_ptr,
    context_ptr,
    eps,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write each scale of a row normalised by itself, and the row normalised as a whole."""
    row_offset = tl.program_id(0).to(tl.int64) * PACKED
    tokens = _load_row(tokens_ptr + row_offset, WIDTHS, STARTS, TILES)
    whole, _ = _standardise_whole(tokens, eps, WIDTHS, TILES, PACKED)
    for scale in tl.static_range(len(WIDTHS)):
        start = STARTS[scale]
        offs_channel = tl.arange(0, TILES[scale])
        standardised, _ = _standardise(tokens[scale], offs_channel, eps, WIDTHS[scale])
        output = _affine(standardised, weight_ptr + start, bias_ptr + start, offs_channel, WIDTHS[scale])
        _store(output_ptr + row_offset + start, offs_channel, output, WIDTHS[scale])
        context = _affine(
            whole[scale], context_weight_ptr + start, context_bias_ptr + start, offs_channel, WIDTHS[scale]
        )
        _store(context_ptr + row_offset + start, offs_channel, context, WIDTHS[scale])


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    tokens_ptr,
    gradient_ptr,
    weight_ptr,
    d_tokens_ptr,
    parts_ptr,
    rows,
    eps,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the gradient of the tokens, and a part of [d_weight, d_bias]."""
    d_weight = _zero_row(TILES)
    d_bias = _zero_row(TILES)
    row_offset = tl.program_id(0).to(tl.int64) * PACKED
    for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_d_weight = ()
        row_d_bias = ()
        for scale in tl.static_range(len(WIDTHS)):
            start = STARTS[scale]
            offs_channel = tl.arange(0, TILES[scale])
            tokens = _load(tokens_ptr + row_offset + start, offs_channel, WIDTHS[scale])  # [TILE]
            gradient = _load(gradient_ptr + row_offset + start, offs_channel, WIDTHS[scale])  # [TILE]
            d_tokens, weighted = _scale_gradient(tokens, gradient, weight_ptr + start, offs_channel, eps, WIDTHS[scale])
            _store(d_tokens_ptr + row_offset + start, offs_channel, d_tokens, WIDTHS[scale])
            row_d_weight = row_d_weight + (d_weight[scale] + weighted,)
            row_d_bias = row_d_bias + (d_bias[scale] + gradient,)
        d_weight = row_d_weight
        d_bias = row_d_bias
        row_offset += tl.num_programs(0).to(tl.int64) * PACKED
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * PACKED)
    _store_row(parts_ptr, d_weight, WIDTHS, STARTS, TILES)
    _store_row(parts_ptr + PACKED, d_bias, WIDTHS, STARTS, TILES)


@triton.jit(do_not_specialize=["rows"])
def cross_layer_norm_backward_kernel(
    tokens_ptr,
    gradient_ptr,
    context_gradient_ptr,
    weight_ptr,
    context_weight_ptr,
    d_tokens_ptr,
    parts_ptr,
    rows,
    eps,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Write the gradient of the tokens, and a part of [d_weight, d_bias, d_context_weight, d_context_bias]."""
    d_weight = _zero_row(TILES)
    d_bias = _zero_row(TILES)
    d_context_weight = _zero_row(TILES)
    d_context_bias = _zero_row(TILES)
    row_offset = tl.program_id(0).to(tl.int64) * PACKED
    for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
        tokens = _load_row(tokens_ptr + row_offset, WIDTHS, STARTS, TILES)
        whole, factor = _standardise_whole(tokens, eps, WIDTHS, TILES, PACKED)
        mean = 0.0
        slope = 0.0
        d_whole = ()
        row_d_weight = ()
        row_d_bias = ()
        for scale in tl.static_range(len(WIDTHS)):
            start = STARTS[scale]
            offs_channel = tl.arange(0, TILES[scale])
            gradient = _load(context_gradient_ptr + row_offset + start, offs_channel, WIDTHS[scale])  # [TILE]
            d_scale = gradient * _load(context_weight_ptr + start, offs_channel, WIDTHS[scale])
            mean += tl.sum(d_scale)
            slope += tl.sum(d_scale * whole[scale])
            d_whole = d_whole + (d_scale,)
            row_d_weight = row_d_weight + (d_context_weight[scale] + gradient * whole[scale],)
            row_d_bias = row_d_bias + (d_context_bias[scale] + gradient,)
        mean = mean / PACKED
        slope = slope / PACKED
        d_context_weight = row_d_weight
        d_context_bias = row_d_bias

        row_d_weight = ()
        row_d_bias = ()
        for scale in tl.static_range(len(WIDTHS)):
            start = STARTS[scale]
            offs_channel = tl.arange(0, TILES[scale])
            gradient = _load(gradient_ptr + row_offset + start, offs_channel, WIDTHS[scale])  # [TILE]
            d_tokens, weighted = _scale_gradient(
                tokens[scale], gradient, weight_ptr + start, offs_channel, eps, WIDTHS[scale]
            )
            d_tokens += (d_whole[scale] - mean - whole[scale] * slope) * factor
            _store(d_tokens_ptr + row_offset + start, offs_channel, d_tokens, WIDTHS[scale])
            row_d_weight = row_d_weight + (d_weight[scale] + weighted,)
            row_d_bias = row_d_bias + (d_bias[scale] + gradient,)
        d_weight = row_d_weight
        d_bias = row_d_bias
        row_offset += tl.num_programs(0).to(tl.int64) * PACKED
    parts_ptr += tl.program_id(0).to(tl.int64) * (4 * PACKED)
    _store_row(parts_ptr, d_weight, WIDTHS, STARTS, TILES)
    _store_row(parts_ptr + PACKED, d_bias, WIDTHS, STARTS, TILES)
    _store_row(parts_ptr + 2 * PACKED, d_context_weight, WIDTHS, STARTS, TILES)
    _store_row(parts_ptr + 3 * PACKED, d_context_bias, WIDTHS, STARTS, TILES)


def packed_layer_norm(
    tokens: Tensor, segments: Sequence[int], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Launch (B, N, sum C), (sum C,), (sum C,) -> (B, N, sum C) in ``dtype``."""
    output = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    if output.numel() > 0:
        layer_norm_kernel[(tokens.shape[0] * tokens.shape[1],)](
            tokens_ptr=tokens.contiguous(),
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            output_ptr=output,
            eps=eps,
            **_layout(segments, FORWARD_WARPS),
        )
    return output


def cross_layer_norm(
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    bias: Tensor,
    context_weight: Tensor,
    context_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launch (B, N, sum C), four (sum C,) -> twice (B, N, sum C) in ``dtype``: each scale by itself, all together."""
    output = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    context = torch.empty_like(output)
    if output.numel() > 0:
        cross_layer_norm_kernel[(tokens.shape[0] * tokens.shape[1],)](
            tokens_ptr=tokens.contiguous(),
            weight_ptr=weight.contiguous(),
            bias_ptr=bias.contiguous(),
            context_weight_ptr=context_weight.contiguous(),
            context_bias_ptr=context_bias.contiguous(),
            output_ptr=output,
            context_ptr=context,
            eps=eps,
            **_layout(segments, FORWARD_WARPS),
        )
    return output, context


def packed_layer_norm_backward(
    gradient: Tensor, tokens: Tensor, segments: Sequence[int], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens, and of weight and bias together: (B, N, sum C), (2, sum C)."""
    return _launch_backward(
        layer_norm_backward_kernel,
        tokens,
        segments,
        weight,
        sums=2,
        eps=eps,
        gradient_ptr=gradient.contiguous(),
        weight_ptr=weight.contiguous(),
    )


def cross_layer_norm_backward(
    gradient: Tensor,
    context_gradient: Tensor,
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    context_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the tokens, and of both weights and biases together: (B, N, sum C), (4, sum C)."""
    return _launch_backward(
        cross_layer_norm_backward_kernel,
        tokens,
        segments,
        weight,
        sums=4,
        eps=eps,
        gradient_ptr=gradient.contiguous(),
        context_gradient_ptr=context_gradient.contiguous(),
        weight_ptr=weight.contiguous(),
        context_weight_ptr=context_weight.contiguous(),
    )


def _launch_backward(
    kernel: Any, tokens: Tensor, segments: Sequence[int], weight: Tensor, *, sums: int, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the tokens, and ``sums`` vectors summed over the rows, in the weight's dtype."""
    d_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if tokens.numel() == 0:
        return d_tokens, weight.new_zeros(sums, tokens.shape[-1])
    rows = tokens.shape[0] * tokens.shape[1]
    programs = min(triton.cdiv(rows, FEWEST_ROWS), BACKWARD_PROGRAMS)
    parts = torch.empty(programs, sums * tokens.shape[-1], dtype=torch.float32, device=tokens.device)
    kernel[(programs,)](
        **arguments,
        tokens_ptr=tokens.contiguous(),
        d_tokens_ptr=d_tokens,
        parts_ptr=parts,
        rows=rows,
        **_layout(segments, BACKWARD_WARPS),
    )
    return d_tokens, add_parts(parts, weight.dtype).view(sums, -1)


def _layout(segments: Sequence[int], warps: Warps) -> dict[str, Any]:
    """Return the constants of a kernel and its warps; a tile is the least power of two that holds its scale."""
    tiles = tuple(triton.next_power_of_2(width) for width in segments)
    return {
        "WIDTHS": tuple(segments),
        "STARTS": tuple(accumulate(segments, initial=0))[:-1],
        "TILES": tiles,
        "PACKED": sum(segments),
        "num_warps": min(triton.next_power_of_2(triton.cdiv(sum(tiles), warps.channels_a_warp)), warps.most),
    }
