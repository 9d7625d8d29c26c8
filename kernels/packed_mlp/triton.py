"""Triton kernels of the packed MLP: the two products of :mod:`uctrans.kernels.packed_linear` with other epilogues.

Forward, the first product writes the hidden layer before and after GELU, and the second adds the residual. Backward,
the product that brings the gradient to the hidden layer multiplies it by GELU's slope. PyTorch makes three passes over
maps for these. GELU is taken of the float32 sum, before it is rounded.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed_linear.triton import choose_tile, contiguous, launch_by_blocks, packed, rows_of, sizes_of
from ..packed_linear.triton_products import before_scale, of_scale, projected, projected_back

# Size of a tile of the gradient: together with the hidden layer's tile, a larger one takes more than all registers.
MOST_BYTES_BACK = 128 * 64 * 2

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)  # of the standard normal distribution


@triton.jit
def _distribution(values):
    """Return Phi, the standard normal distribution function."""
    return 0.5 + 0.5 * tl.erf(values * SQRT_HALF)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def expand_kernel(
    tokens,
    weights,
    biases,
    hidden_ptr,
    activation_ptr,
    rows,
    tokens_per_sample,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write hidden = tokens weight^T + bias, where it is kept, and activation = GELU(hidden)."""
    hidden, scale, offs_row, offs_column = projected(
        tokens,
        weights,
        biases,
        rows,
        tokens_per_sample,
        1,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_STEP,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    offsets = before_scale(OUT_WIDTHS, scale) + offs_column[None, :] + offs_row.to(tl.int64)[:, None] * PACKED_OUT
    mask = (offs_row < rows)[:, None] & (offs_column < of_scale(OUT_WIDTHS, scale))[None, :]
    if hidden_ptr is not None:
        tl.store(hidden_ptr + offsets, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    activation = hidden * _distribution(hidden)
    tl.store(activation_ptr + offsets, activation.to(activation_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def contract_kernel(
    activation,
    weights,
    biases,
    residual_ptr,
    output_ptr,
    rows,
    tokens_per_sample,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write output = residual + activation weight^T + bias; the residual lies like the output."""
    output, scale, offs_row, offs_column = projected(
        activation,
        weights,
        biases,
        rows,
        tokens_per_sample,
        1,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_STEP,
        GROUP,
    )  # [BLOCK_ROWS, BLOCK_COLUMNS]
    offsets = before_scale(OUT_WIDTHS, scale) + offs_column[None, :] + offs_row.to(tl.int64)[:, None] * PACKED_OUT
    mask = (offs_row < rows)[:, None] & (offs_column < of_scale(OUT_WIDTHS, scale))[None, :]
    output += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens_per_sample"])
def contract_back_kernel(
    gradient,
    weights,
    hidden_ptr,
    d_hidden_ptr,
    rows,
    tokens_per_sample,
    IN_WIDTHS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    PACKED_IN: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write d_hidden = (gradient weight) GELU'(hidden), where GELU'(x) = Phi(x) + x phi(x)."""
    d_hidden, scale, offs_row, offs_column = projected_back(
        gradient,
        weights,
        rows,
        tokens_per_sample,
        1,
        IN_WIDTHS,
        OUT_WIDTHS,
        COLUMN_BLOCKS,
        PRECISION,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_STEP,
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
    """Return the output (B, N, sum C) and the hidden layer before and after GELU (B, N, sum R).

    The hidden layer before GELU is empty, (0,), unless it is kept.
    """
    _, in_widths, hidden_widths = sizes_of(expand_weights)
    lead, rows = tokens.shape[:2], rows_of(tokens)
    activation = tokens.new_empty(*lead, sum(hidden_widths))
    hidden = torch.empty_like(activation) if keeps_hidden else tokens.new_empty(0)
    output = residual.new_empty(*lead, sum(in_widths))
    launch_by_blocks(
        expand_kernel,
        choose_tile(tokens.dtype, rows, hidden_widths, max(in_widths)),
        hidden_widths,
        tokens,
        expand_weights,
        tokens=packed(tokens),
        biases=contiguous(expand_biases),
        hidden_ptr=hidden if keeps_hidden else None,
        activation_ptr=activation,
        IN_WIDTHS=in_widths,
        OUT_WIDTHS=hidden_widths,
        PACKED_OUT=sum(hidden_widths),
    )
    launch_by_blocks(
        contract_kernel,
        choose_tile(tokens.dtype, rows, in_widths, max(hidden_widths)),
        in_widths,
        activation,
        contract_weights,
        activation=packed(activation),
        biases=contiguous(contract_biases),
        residual_ptr=residual.contiguous(),
        output_ptr=output,
        IN_WIDTHS=hidden_widths,
        OUT_WIDTHS=in_widths,
        PACKED_OUT=sum(in_widths),
    )
    return output, hidden, activation


def hidden_gradient(gradient: Tensor, contract_weights: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Return the gradient of the hidden layer before GELU: (B, N, sum C) -> (B, N, sum R)."""
    _, hidden_widths, out_widths = sizes_of(contract_weights)
    d_hidden = torch.empty_like(hidden)
    launch_by_blocks(
        contract_back_kernel,
        choose_tile(gradient.dtype, rows_of(gradient), hidden_widths, max(out_widths), MOST_BYTES_BACK),
        hidden_widths,
        gradient,
        contract_weights,
        gradient=packed(gradient),
        hidden_ptr=hidden,
        d_hidden_ptr=d_hidden,
        IN_WIDTHS=hidden_widths,
        OUT_WIDTHS=out_widths,
        PACKED_IN=sum(hidden_widths),
    )
    return d_hidden
