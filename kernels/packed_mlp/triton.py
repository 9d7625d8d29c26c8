"""Triton kernels of the packed MLP: the two products of :mod:`uctrans.kernels.packed_linear` with other epilogues.

Forward, the first product writes the hidden layer before and behind GELU, and the second adds the residual. Backward,
the product that brings the gradient to the hidden layer multiplies it by GELU's slope. So three passes over maps are
gone that stand by themselves in PyTorch. GELU is taken of the float32 sum, before it is rounded.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed_linear.triton import (
    choose_tile,
    contiguous,
    launch_by_blocks,
    row_layout,
    sizes_of,
    with_contiguous_channels,
)
from ..packed_linear.triton_products import before_scale, of_scale, projected, projected_back

# Of a tile of the gradient: with the hidden layer's beside it, a larger one takes all registers there are.
MOST_BYTES_BACK = 128 * 64 * 2

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # of the standard normal distribution


@triton.jit
def _distribution(values):
    """Phi, the standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(values * SQRT_HALF)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def _expand(
    tokens_ptr,
    weights,
    biases,
    hidden_ptr,
    activation_ptr,
    rows,
    tokens_per_sample,
    stride_sample,
    stride_token,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """hidden = tokens weight^T + bias, where it is kept, and activation = GELU(hidden)."""
    hidden, scale, offs_row, offs_column = projected(
        tokens_ptr,
        weights,
        biases,
        rows,
        tokens_per_sample,
        stride_sample,
        stride_token,
        1,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_IN,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    offsets = before_scale(OUT_WIDTHS, scale) + offs_column[None, :] + offs_row.to(tl.int64)[:, None] * PACKED_OUT
    mask = (offs_row < rows)[:, None] & (offs_column < of_scale(OUT_WIDTHS, scale))[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    activation = hidden * _distribution(hidden)
    tl.store(activation_ptr + offsets, activation.to(activation_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def _contract(
    activation_ptr,
    weights,
    biases,
    residual_ptr,
    output_ptr,
    rows,
    tokens_per_sample,
    stride_sample,
    stride_token,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """output = residual + activation weight^T + bias; the residual lies like the output."""
    output, scale, offs_row, offs_column = projected(
        activation_ptr,
        weights,
        biases,
        rows,
        tokens_per_sample,
        stride_sample,
        stride_token,
        1,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_IN,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    offsets = before_scale(OUT_WIDTHS, scale) + offs_column[None, :] + offs_row.to(tl.int64)[:, None] * PACKED_OUT
    mask = (offs_row < rows)[:, None] & (offs_column < of_scale(OUT_WIDTHS, scale))[None, :]
    output += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def _contract_back(
    gradient_ptr,
    weights,
    hidden_ptr,
    d_hidden_ptr,
    rows,
    tokens_per_sample,
    stride_sample,
    stride_token,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    PACKED_IN: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """d_hidden = (gradient weight) GELU'(hidden), where GELU'(x) = Phi(x) + x phi(x)."""
    d_hidden, scale, offs_row, offs_column = projected_back(
        gradient_ptr,
        weights,
        rows,
        tokens_per_sample,
        stride_sample,
        stride_token,
        0,
        1,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_OUT,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    offsets = before_scale(IN_WIDTHS, scale) + offs_column[None, :] + offs_row.to(tl.int64)[:, None] * PACKED_IN
    mask = (offs_row < rows)[:, None] & (offs_column < of_scale(IN_WIDTHS, scale))[None, :]
    hidden = tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    d_hidden *= _distribution(hidden) + hidden * (DENSITY_AT_ZERO * tl.exp(-0.5 * hidden * hidden))
    tl.store(d_hidden_ptr + offsets, d_hidden.to(d_hidden_ptr.dtype.element_ty), mask=mask)


def forward(
    tokens: Tensor,
    residual: Tensor,
    expand_weights: Sequence[Tensor],
    expand_biases: Sequence[Tensor],
    contract_weights: Sequence[Tensor],
    contract_biases: Sequence[Tensor],
    keeps_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, sum C); hidden layer before GELU, empty (0,) unless it is kept, and behind it (B, N, sum R C)."""
    _, in_widths, hidden_widths = sizes_of(expand_weights)
    lead = tokens.shape[:2]
    activation = tokens.new_empty(*lead, sum(hidden_widths))
    hidden = torch.empty_like(activation) if keeps_hidden else tokens.new_empty(0)
    output = residual.new_empty(*lead, sum(in_widths))
    rows = lead.numel()
    if rows == 0:
        return output, hidden, activation
    tokens, residual = with_contiguous_channels(tokens), residual.contiguous()
    launch_by_blocks(
        _expand,
        choose_tile(tokens.dtype, rows, hidden_widths, max(in_widths)),
        rows,
        hidden_widths,
        (tokens, contiguous(expand_weights), contiguous(expand_biases), hidden if keeps_hidden else None, activation),
        (rows, *row_layout(tokens), in_widths, hidden_widths, sum(hidden_widths)),
    )
    launch_by_blocks(
        _contract,
        choose_tile(tokens.dtype, rows, in_widths, max(hidden_widths)),
        rows,
        in_widths,
        (activation, contiguous(contract_weights), contiguous(contract_biases), residual, output),
        (rows, *row_layout(activation), hidden_widths, in_widths, sum(in_widths)),
    )
    return output, hidden, activation


def hidden_gradient(gradient: Tensor, contract_weights: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """The gradient by the hidden layer before GELU: (B, N, sum C) -> (B, N, sum R C)."""
    _, hidden_widths, out_widths = sizes_of(contract_weights)
    d_hidden = torch.empty_like(hidden)
    rows = hidden.shape[:2].numel()
    if rows == 0:
        return d_hidden
    gradient = with_contiguous_channels(gradient)
    launch_by_blocks(
        _contract_back,
        choose_tile(gradient.dtype, rows, hidden_widths, max(out_widths), MOST_BYTES_BACK),
        rows,
        hidden_widths,
        (gradient, contiguous(contract_weights), hidden, d_hidden),
        (rows, *row_layout(gradient), hidden_widths, out_widths, sum(hidden_widths)),
    )
    return d_hidden
