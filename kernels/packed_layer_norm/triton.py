"""Triton kernels of the packed layer norms: a row of tokens is read once, for all its scales and for their whole.

A program holds rows whole, one tile a scale, so that means and variances are taken of registers. Statistics are
float32, and backward takes them again instead of reading them. Gradients by weights and biases are summed over the
rows of a program, then over programs in a fixed order.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..partial_sums import add_parts

# Elements a program holds of one tensor: 32 a thread. Backward holds up to seven such tensors, which is what fits into
# the registers of a thread. Four warps and a row of up to 1024 channels make about one warp a row.
ELEMENTS_A_PROGRAM = 4096
NUM_WARPS = 4
MOST_WARPS = 32

# Backward's programs loop over rows, as each writes a partial sum as long as a row: two for each of 132
# multiprocessors. A constant, so that results do not depend on the GPU's size.
BACKWARD_PROGRAMS = 2 * 132


@triton.jit
def _zeros(ROWS: tl.constexpr, TILE: tl.constexpr):
    return tl.zeros([ROWS, TILE], tl.float32)


@triton.jit
def _load(ptr, packed_offsets, offs_channel, mask_row, WIDTH: tl.constexpr):
    """Rows of one scale in float32, zero outside of them."""
    mask = mask_row[:, None] & (offs_channel < WIDTH)[None, :]
    offsets = packed_offsets[:, None] + offs_channel[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, TILE]


@triton.jit
def _load_channels(ptr, offs_channel, WIDTH: tl.constexpr):
    return tl.load(ptr + offs_channel, mask=offs_channel < WIDTH, other=0.0).to(tl.float32)[None, :]  # [1, TILE]


@triton.jit
def _store(ptr, packed_offsets, offs_channel, mask_row, values, WIDTH: tl.constexpr):
    mask = mask_row[:, None] & (offs_channel < WIDTH)[None, :]
    offsets = packed_offsets[:, None] + offs_channel[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _centre(tokens, mean, offs_channel, WIDTH: tl.constexpr):
    return tl.where((offs_channel < WIDTH)[None, :], tokens - mean[:, None], 0.0)  # [ROWS, TILE]


@triton.jit
def _inverse_deviation(sum_of_squares, remainder, width, eps):
    """``remainder`` is the mean of what was squared: near zero, so that nothing cancels."""
    return tl.rsqrt(tl.maximum(sum_of_squares / width - remainder * remainder, 0.0) + eps)


@triton.jit
def _standardise(tokens, offs_channel, eps, WIDTH: tl.constexpr):
    """Rows of one scale with mean 0 and variance 1, and the factor that made the variance so.

    The mean of a row far from zero is rounded, so the mean of the centred row is subtracted once more.
    """
    centred = _centre(tokens, tl.sum(tokens, axis=1) / WIDTH, offs_channel, WIDTH)
    remainder = tl.sum(centred, axis=1) / WIDTH
    factor = _inverse_deviation(tl.sum(centred * centred, axis=1), remainder, WIDTH, eps)  # [ROWS]
    return (centred - remainder[:, None]) * factor[:, None], factor


@triton.jit
def _standardise_whole(tokens, eps, WIDTHS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """:func:`_standardise` of rows that lie in several tiles."""
    mean = tl.sum(tokens[0], axis=1)
    for scale in tl.static_range(1, len(WIDTHS)):
        mean += tl.sum(tokens[scale], axis=1)
    mean = mean / WIDTH
    remainder = tl.zeros_like(mean)
    sum_of_squares = tl.zeros_like(mean)
    centred = ()
    for scale in tl.static_range(len(WIDTHS)):
        tile = _centre(tokens[scale], mean, tl.arange(0, TILES[scale]), WIDTHS[scale])
        remainder += tl.sum(tile, axis=1)
        sum_of_squares += tl.sum(tile * tile, axis=1)
        centred = centred + (tile,)
    remainder = remainder / WIDTH
    factor = _inverse_deviation(sum_of_squares, remainder, WIDTH, eps)  # [ROWS]
    standardised = ()
    for scale in tl.static_range(len(WIDTHS)):
        standardised = standardised + ((centred[scale] - remainder[:, None]) * factor[:, None],)
    return standardised, factor


@triton.jit
def _scale_and_shift(standardised, weight_ptr, bias_ptr, offs_channel, WIDTH: tl.constexpr):
    return standardised * _load_channels(weight_ptr, offs_channel, WIDTH) + _load_channels(
        bias_ptr, offs_channel, WIDTH
    )


@triton.jit
def _gradient_through(d_standardised, standardised, mean, slope, factor):
    """The gradient by rows, given that by standardised rows and its means, plain and against the standardised rows."""
    return (d_standardised - mean[:, None] - standardised * slope[:, None]) * factor[:, None]


@triton.jit
def _scale_gradient(tokens, gradient, weight_ptr, offs_channel, eps, WIDTH: tl.constexpr):
    """The gradient by the rows of one scale, and each row's part of the gradient by the weight."""
    standardised, factor = _standardise(tokens, offs_channel, eps, WIDTH)
    d_standardised = gradient * _load_channels(weight_ptr, offs_channel, WIDTH)
    mean = tl.sum(d_standardised, axis=1) / WIDTH
    slope = tl.sum(d_standardised * standardised, axis=1) / WIDTH
    return _gradient_through(d_standardised, standardised, mean, slope, factor), gradient * standardised


@triton.jit(do_not_specialize=["rows"])
def _normalise(
    tokens_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    rows,
    eps,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    offs_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_row = offs_row < rows
    for scale in tl.static_range(len(WIDTHS)):
        offs_channel = tl.arange(0, TILES[scale])
        offsets = offs_row.to(tl.int64) * PACKED + STARTS[scale]
        tokens = _load(tokens_ptr, offsets, offs_channel, mask_row, WIDTHS[scale])  # [ROWS, TILE]
        standardised, _ = _standardise(tokens, offs_channel, eps, WIDTHS[scale])
        output = _scale_and_shift(
            standardised, weight_ptr + STARTS[scale], bias_ptr + STARTS[scale], offs_channel, WIDTHS[scale]
        )
        _store(output_ptr, offsets, offs_channel, mask_row, output, WIDTHS[scale])


@triton.jit(do_not_specialize=["rows"])
def _normalise_twice(
    tokens_ptr,
    weight_ptr,
    bias_ptr,
    context_weight_ptr,
    context_bias_ptr,
    output_ptr,
    context_ptr,
    rows,
    eps,
    WIDTHS: tl.constexpr,
    STARTS: tl.constexpr,
    TILES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    offs_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_row = offs_row < rows
    row_offsets = offs_row.to(tl.int64) * PACKED
    tokens = _load_row(tokens_ptr, row_offsets, mask_row, WIDTHS, STARTS, TILES)
    whole, _ = _standardise_whole(tokens, eps, WIDTHS, TILES, PACKED)
    for scale in tl.static_range(len(WIDTHS)):
        offs_channel = tl.arange(0, TILES[scale])
        offsets = row_offsets + STARTS[scale]
        standardised, _ = _standardise(tokens[scale], offs_channel, eps, WIDTHS[scale])
        output = _scale_and_shift(
            standardised, weight_ptr + STARTS[scale], bias_ptr + STARTS[scale], offs_channel, WIDTHS[scale]
        )
        _store(output_ptr, offsets, offs_channel, mask_row, output, WIDTHS[scale])
        context = _scale_and_shift(
            whole[scale],
            context_weight_ptr + STARTS[scale],
            context_bias_ptr + STARTS[scale],
            offs_channel,
            WIDTHS[scale],
        )
        _store(context_ptr, offsets, offs_channel, mask_row, context, WIDTHS[scale])


@triton.jit(do_not_specialize=["rows"])
def _backward(
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
    ROWS: tl.constexpr,
):
    """The gradient by the tokens, and this program's part of [d_weight, d_bias]."""
    d_weight = _zero_row(ROWS, TILES)
    d_bias = _zero_row(ROWS, TILES)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        offs_row = block * ROWS + tl.arange(0, ROWS)
        mask_row = offs_row < rows
        row_d_weight = ()
        row_d_bias = ()
        for scale in tl.static_range(len(WIDTHS)):
            offs_channel = tl.arange(0, TILES[scale])
            offsets = offs_row.to(tl.int64) * PACKED + STARTS[scale]
            tokens = _load(tokens_ptr, offsets, offs_channel, mask_row, WIDTHS[scale])  # [ROWS, TILE]
            gradient = _load(gradient_ptr, offsets, offs_channel, mask_row, WIDTHS[scale])  # [ROWS, TILE]
            d_tokens, against_standardised = _scale_gradient(
                tokens, gradient, weight_ptr + STARTS[scale], offs_channel, eps, WIDTHS[scale]
            )
            _store(d_tokens_ptr, offsets, offs_channel, mask_row, d_tokens, WIDTHS[scale])
            row_d_weight = row_d_weight + (d_weight[scale] + against_standardised,)
            row_d_bias = row_d_bias + (d_bias[scale] + gradient,)
        d_weight = row_d_weight
        d_bias = row_d_bias
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * PACKED)
    _store_part(parts_ptr, d_weight, WIDTHS, STARTS, TILES)
    _store_part(parts_ptr + PACKED, d_bias, WIDTHS, STARTS, TILES)


@triton.jit(do_not_specialize=["rows"])
def _backward_twice(
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
    ROWS: tl.constexpr,
):
    """The gradient by the tokens, and this program's part of [d_weight, d_bias, d_context_weight, d_context_bias]."""
    d_weight = _zero_row(ROWS, TILES)
    d_bias = _zero_row(ROWS, TILES)
    d_context_weight = _zero_row(ROWS, TILES)
    d_context_bias = _zero_row(ROWS, TILES)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        offs_row = block * ROWS + tl.arange(0, ROWS)
        mask_row = offs_row < rows
        row_offsets = offs_row.to(tl.int64) * PACKED
        tokens = _load_row(tokens_ptr, row_offsets, mask_row, WIDTHS, STARTS, TILES)
        whole, factor = _standardise_whole(tokens, eps, WIDTHS, TILES, PACKED)

        mean = tl.zeros_like(factor)
        slope = tl.zeros_like(factor)
        d_whole = ()
        row_d_weight = ()
        row_d_bias = ()
        for scale in tl.static_range(len(WIDTHS)):
            offs_channel = tl.arange(0, TILES[scale])
            gradient = _load(
                context_gradient_ptr, row_offsets + STARTS[scale], offs_channel, mask_row, WIDTHS[scale]
            )  # [ROWS, TILE]
            d_scale = gradient * _load_channels(context_weight_ptr + STARTS[scale], offs_channel, WIDTHS[scale])
            mean += tl.sum(d_scale, axis=1) / PACKED
            slope += tl.sum(d_scale * whole[scale], axis=1) / PACKED
            d_whole = d_whole + (d_scale,)
            row_d_weight = row_d_weight + (d_context_weight[scale] + gradient * whole[scale],)
            row_d_bias = row_d_bias + (d_context_bias[scale] + gradient,)
        d_context_weight = row_d_weight
        d_context_bias = row_d_bias

        row_d_weight = ()
        row_d_bias = ()
        for scale in tl.static_range(len(WIDTHS)):
            offs_channel = tl.arange(0, TILES[scale])
            offsets = row_offsets + STARTS[scale]
            gradient = _load(gradient_ptr, offsets, offs_channel, mask_row, WIDTHS[scale])  # [ROWS, TILE]
            d_tokens, against_standardised = _scale_gradient(
                tokens[scale], gradient, weight_ptr + STARTS[scale], offs_channel, eps, WIDTHS[scale]
            )
            d_tokens += _gradient_through(d_whole[scale], whole[scale], mean, slope, factor)
            _store(d_tokens_ptr, offsets, offs_channel, mask_row, d_tokens, WIDTHS[scale])
            row_d_weight = row_d_weight + (d_weight[scale] + against_standardised,)
            row_d_bias = row_d_bias + (d_bias[scale] + gradient,)
        d_weight = row_d_weight
        d_bias = row_d_bias
    parts_ptr += tl.program_id(0).to(tl.int64) * (4 * PACKED)
    _store_part(parts_ptr, d_weight, WIDTHS, STARTS, TILES)
    _store_part(parts_ptr + PACKED, d_bias, WIDTHS, STARTS, TILES)
    _store_part(parts_ptr + 2 * PACKED, d_context_weight, WIDTHS, STARTS, TILES)
    _store_part(parts_ptr + 3 * PACKED, d_context_bias, WIDTHS, STARTS, TILES)


@triton.jit
def _load_row(ptr, row_offsets, mask_row, WIDTHS: tl.constexpr, STARTS: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for scale in tl.static_range(len(WIDTHS)):
        tile = _load(ptr, row_offsets + STARTS[scale], tl.arange(0, TILES[scale]), mask_row, WIDTHS[scale])
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _zero_row(ROWS: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for scale in tl.static_range(len(TILES)):
        tiles = tiles + (_zeros(ROWS, TILES[scale]),)
    return tiles


@triton.jit
def _store_part(part_ptr, sums, WIDTHS: tl.constexpr, STARTS: tl.constexpr, TILES: tl.constexpr):
    for scale in tl.static_range(len(WIDTHS)):
        offs_channel = tl.arange(0, TILES[scale])
        part = tl.sum(sums[scale], axis=0)  # [TILE]
        tl.store(part_ptr + STARTS[scale] + offs_channel, part, mask=offs_channel < WIDTHS[scale])


def packed_layer_norm(
    tokens: Tensor, segments: Sequence[int], weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """(B, N, sum C), (sum C,), (sum C,) -> (B, N, sum C) in ``dtype``."""
    output = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    if output.numel() == 0:
        return output
    tokens = tokens.contiguous()
    rows, layout, num_warps = _layout(tokens, segments)
    with torch.cuda.device_of(tokens):
        _normalise[(triton.cdiv(rows, layout["ROWS"]),)](
            tokens, weight.contiguous(), bias.contiguous(), output, rows, eps, **layout, num_warps=num_warps
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
    """(B, N, sum C), four (sum C,) -> twice (B, N, sum C) in ``dtype``: each scale by itself, all together."""
    output = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    context = torch.empty_like(output)
    if output.numel() == 0:
        return output, context
    tokens = tokens.contiguous()
    rows, layout, num_warps = _layout(tokens, segments)
    channels = [vector.contiguous() for vector in (weight, bias, context_weight, context_bias)]
    with torch.cuda.device_of(tokens):
        _normalise_twice[(triton.cdiv(rows, layout["ROWS"]),)](
            tokens, *channels, output, context, rows, eps, **layout, num_warps=num_warps
        )
    return output, context


def packed_layer_norm_backward(
    gradient: Tensor, tokens: Tensor, segments: Sequence[int], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients by the tokens, and by weight and bias together: (B, N, sum C), (2, sum C)."""
    d_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if tokens.numel() == 0:
        return d_tokens, weight.new_zeros(2, tokens.shape[-1])
    tokens = tokens.contiguous()
    rows, layout, num_warps = _layout(tokens, segments)
    programs = min(triton.cdiv(rows, layout["ROWS"]), BACKWARD_PROGRAMS)
    parts = torch.empty(programs, 2 * tokens.shape[-1], dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _backward[(programs,)](
            tokens,
            gradient.contiguous(),
            weight.contiguous(),
            d_tokens,
            parts,
            rows,
            eps,
            **layout,
            num_warps=num_warps,
        )
    return d_tokens, add_parts(parts, weight.dtype).view(2, -1)


def cross_layer_norm_backward(
    gradient: Tensor,
    context_gradient: Tensor,
    tokens: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    context_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients by the tokens, and by both weights and biases together: (B, N, sum C), (4, sum C)."""
    d_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if tokens.numel() == 0:
        return d_tokens, weight.new_zeros(4, tokens.shape[-1])
    tokens = tokens.contiguous()
    rows, layout, num_warps = _layout(tokens, segments)
    programs = min(triton.cdiv(rows, layout["ROWS"]), BACKWARD_PROGRAMS)
    parts = torch.empty(programs, 4 * tokens.shape[-1], dtype=torch.float32, device=tokens.device)
    with torch.cuda.device_of(tokens):
        _backward_twice[(programs,)](
            tokens,
            gradient.contiguous(),
            context_gradient.contiguous(),
            weight.contiguous(),
            context_weight.contiguous(),
            d_tokens,
            parts,
            rows,
            eps,
            **layout,
            num_warps=num_warps,
        )
    return d_tokens, add_parts(parts, weight.dtype).view(4, -1)


def _layout(tokens: Tensor, segments: Sequence[int]) -> tuple[int, dict[str, Any], int]:
    """Rows, how kernels lay them out, and warps."""
    tiles = tuple(triton.next_power_of_2(width) for width in segments)
    size = triton.next_power_of_2(sum(tiles))
    layout = {
        "WIDTHS": tuple(segments),
        "STARTS": tuple(accumulate(segments, initial=0))[:-1],
        "TILES": tiles,
        "PACKED": sum(segments),
        "ROWS": max(1, ELEMENTS_A_PROGRAM // size),
    }
    num_warps = min(NUM_WARPS * max(1, size // ELEMENTS_A_PROGRAM), MOST_WARPS)
    return tokens.shape[0] * tokens.shape[1], layout, num_warps
